"""Feature taps: the tensors that modules named by path compute during a forward pass, beside the model's own output."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdfast.ops import checks

T = TypeVar("T")
_Tensors = dict[int, tuple[Tensor, int | None]]
"""Index of a tap -> its tensor and the tensor's version."""


class Taps(nn.Module):
    """Runs a model and returns, beside its output, the tensors that pass the modules named by `paths`.

    "layer2.1" taps that module's output, "fc:input" the first argument of its call. A compiled model keeps its paths.

    The taps are forward hooks that do nothing outside a call of this wrapper, so the model can also be used alone; they are removed with
    the wrapper. The parameters are the model's own, in `taps.model`: save that one's state dict, because the wrapper's carries the prefix
    "model.". Compile the wrapper, or tap before the first call of a compiled model: torch.compile does not look for new hooks afterwards.

    Args:
        model: any module.
        paths: module paths as `model.named_modules()` spells them, each with or without ":input".

    Raises:
        ValueError: a path that names no module of the model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 3))
        >>> taps = kdfast.models.Taps(model, ["1", "2:input"])
        >>> logits, (hidden, same) = taps(torch.randn(2, 3, 2, 2))
        >>> logits.shape, hidden.shape, hidden is same
        (torch.Size([2, 3]), torch.Size([2, 5]), True)
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        super().__init__()
        checks.is_a("model", model, nn.Module)
        if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(path, str) for path in paths):
            raise TypeError(f"Taps: paths must be a list of module paths, got {paths!r}")
        modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
        self.model = model
        self.paths = tuple(paths)
        self._calls: list[_Tensors] = []  # the call under way, if any
        self._handles = []
        names = [path.removesuffix(":input") for path in self.paths]
        for name in names:
            if name not in modules:
                near = difflib.get_close_matches(name, list(modules), n=5, cutoff=0.3)
                hint = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
                raise ValueError(f"Taps: {type(model).__name__} has no module {name!r}{hint}")
        for index, (path, name) in enumerate(zip(self.paths, names)):
            at_input = path != name
            register = modules[name].register_forward_pre_hook if at_input else modules[name].register_forward_hook
            self._handles.append(register(_Hook(self._calls, index, path, at_input), with_kwargs=True))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """Calls the model.

        Args:
            args: the model's.
            kwargs: the model's.

        Returns:
            The model's output, and one tensor for each path, in their order, attached to the graph.

        Raises:
            RuntimeError: a tapped module did not run, ran more than once, or its tensor was changed in place afterwards (as an in-place
                ReLU does), so it would be a guess which value is meant.
            TypeError: a tapped module's output or input is not a tensor.
        """
        return self.during(lambda: self.model(*args, **kwargs))

    def during(self, call: Callable[[], T]) -> tuple[T, tuple[Tensor, ...]]:
        """Taps the model while `call` runs, which calls it once in whatever way.

        Returns:
            The value that `call` returned, and the tensors. Raises as a call of the wrapper does.
        """
        tensors: _Tensors = {}
        self._calls.append(tensors)
        try:
            output = call()
        finally:
            self._calls.clear()
        for index, path in enumerate(self.paths):
            if index not in tensors:
                raise RuntimeError(f"Taps: {path!r} did not run (or the model was compiled before it was tapped)")
            tensor, version = tensors[index]
            if version is not None and tensor._version != version:
                raise RuntimeError(f"Taps: the model changes the tensor of {path!r} in place later on; tap the module after it")
        return output, tuple(tensors[index][0] for index in range(len(self.paths)))

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", ()):
            handle.remove()


class _Hook:
    """One tap. A class and not a closure, so that a deep copy of the wrapper has its own taps."""

    def __init__(self, calls: list[_Tensors], index: int, path: str, at_input: bool):
        self.calls, self.index, self.path, self.at_input = calls, index, path, at_input

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        if not self.calls:
            return
        tensors = self.calls[-1]
        value = (*args, *kwargs.values(), None)[0] if self.at_input else output
        if not isinstance(value, Tensor):
            raise TypeError(f"Taps: {self.path!r} must be a tensor, got {type(value).__name__}")
        if self.index in tensors:
            raise RuntimeError(f"Taps: {self.path!r} runs more than once in a forward pass; tap the module around it")
        # the version counts changes in place; in inference mode and in a graph being traced they are not counted
        uncounted = torch.compiler.is_compiling() or value.is_inference()
        tensors[self.index] = value, None if uncounted else value._version


def tap_shapes(model: nn.Module, paths: Sequence[str], image_shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes that Taps would give for one image, found by running a black one in evaluation mode.

    Changes nothing: training flags are restored, BatchNorm's statistics and the random state are not touched.

    Args:
        model: any module; the image is made on its first parameter's device and in its dtype.
        paths: as for Taps.
        image_shape: (channels, height, width).

    Returns:
        One shape for each path, without the batch dimension.

    Raises:
        ValueError: a path that names no module of the model.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> kdfast.models.tap_shapes(model, ["0", "1"], (3, 6, 6))
        ((8, 4, 4), (128,))
    """
    checks.is_a("model", model, nn.Module)
    if not isinstance(image_shape, Sequence) or len(image_shape) != 3:
        raise ValueError(f"tap_shapes: image_shape must be (channels, height, width), got {image_shape!r}")
    for size in image_shape:
        checks.are_counts(image_shape=size)
    example = next(model.parameters(), torch.empty(0))
    training = {module: module.training for module in model.modules()}
    taps = Taps(model, paths)
    try:
        taps.eval()
        with torch.no_grad():
            _, features = taps(torch.zeros(1, *image_shape, device=example.device, dtype=example.dtype))
    finally:
        for module, flag in training.items():
            module.training = flag
    return tuple(tuple(feature.shape[1:]) for feature in features)
