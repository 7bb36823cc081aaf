"""kdfast export: a trained classifier as ONNX, as a PyTorch exported program (.pt2), or as bare safetensors.

The exported network takes normalized images [B, 3, size, size] float32, any B, and gives logits [B, C]; normalization and classes
are in the file's metadata. ONNX is run with onnxruntime after export and must agree with PyTorch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from kdfast import files
from kdfast.commands.command_line import parse
from kdfast.commands.rehearsal import check_fits
from kdfast.engine.ranges import Checked, Pixels, Range
from kdfast.engine.terminal import Terminal
from kdfast.imports import require
from kdfast.models import build, load_weights, save_weights
from kdfast.runs import artifact
from kdfast.runs.artifact import Classifier

AGREEMENT = 1e-3  # largest accepted difference of logits, as a fraction of the largest logit


@dataclass(frozen=True)
class Export(Checked):
    """Export a trained classifier."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run folder or a weights file."""
    format: Literal["onnx", "pt2", "safetensors"] = "onnx"
    """Format of the file; pt2 is PyTorch's (torch.export)."""
    out: Path | None = None
    """File to write; none: beside the weights, with the format as its ending."""
    model: str | None = None
    """Architecture of a weights file that does not name its own."""
    image_size: Pixels | None = None
    """Side of the square input in pixels; none: as trained."""
    opset: Annotated[int | None, Range("must be at least 18, the lowest that PyTorch writes", lambda value: value >= 18, most=1000)] = None
    """Version of ONNX's operators; none: PyTorch's choice (onnx)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset is not None and self.format != "onnx":
            raise ValueError(f"opset has no effect with format {self.format}: leave it out")


def run(arguments: Sequence[str]) -> None:
    """Runs the command."""
    export(parse(Export, arguments, "export"))


def export(options: Export) -> Path:
    """Writes the file and returns its path.

    Raises:
        ValueError: weights that cannot be used, a file that cannot be written, or an exported network that disagrees with PyTorch's.
        ImportError: the format needs a package that is not installed.
    """
    loaded = artifact.load(options.weights, model=options.model)
    size = options.image_size or (loaded.preparation.image_size if loaded.preparation else None)
    if size is None:
        raise ValueError(f"{loaded.path} does not say its image size: give --image-size")
    out = options.out or loaded.path.with_suffix(f".{options.format}")
    if options.format == "safetensors" and out.resolve() == loaded.path.resolve():
        raise ValueError(f"{out} is the file that would be exported: give --out")
    files.check_writable(out, "--out")
    check_fits(loaded.model, str(loaded.path), size, loaded.spec.num_classes)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    writers: dict[str, Callable[[Classifier, Tensor, Path], float]]
    writers = {"onnx": partial(_onnx, opset=options.opset), "pt2": _pt2, "safetensors": _safetensors}
    with files.replacing(out) as temporary, torch.no_grad():
        worst = writers[options.format](loaded, images, temporary)
    Terminal().print(f"{out}: agrees with PyTorch to {worst:.1e} of the largest logit")
    if loaded.preparation is None:
        Terminal().print(f"note: {out} carries no normalization, no image size and no class names, since {loaded.path} has none")
    return out


def _metadata(loaded: Classifier, images: Tensor) -> dict[str, str]:
    facts, size = dict(loaded.facts), images.shape[-1]
    if loaded.preparation is not None:
        shorter = round(size * 256 / 224)
        resizing = {"center-crop": f"the shorter side to {shorter}, then the middle {size} x {size}", "squash": f"to {size} x {size}"}
        evaluation = loaded.preparation.evaluation
        facts["preparation"] = {**facts["preparation"], "image_size": size, "resizing": resizing.get(evaluation, evaluation)}
    return {artifact.METADATA: json.dumps({"spec": loaded.spec.to_json(), **facts})}


def _difference(ours: Tensor, exported: Tensor, what: str) -> float:
    worst = ((ours - exported).abs().max() / ours.abs().max()).item()
    if not worst <= AGREEMENT:
        raise ValueError(f"the exported {what} network disagrees with PyTorch's by {worst:.1e} of the largest logit; nothing was written")
    return worst


def _onnx(loaded: Classifier, images: Tensor, path: Path, opset: int | None) -> float:
    # torch.onnx needs onnxscript
    onnx, onnxruntime, _ = (require(name, extra="onnx", what="export to onnx") for name in ("onnx", "onnxruntime", "onnxscript"))
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise ValueError(f"opset must be from 18 to {newest}, the newest of the installed onnx, got {opset}")
    program = torch.onnx.export(
        loaded.model,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
        opset_version=opset,
    )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _metadata(loaded, images))
    if opset not in (None, *(known.version for known in proto.opset_import if known.domain == "")):
        raise ValueError(f"opset {opset}: PyTorch and onnx could not convert this network to it; nothing was written")
    path.write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    one, four = (session.run(None, {"images": x.numpy()})[0] for x in (images[:1], images))
    return _difference(loaded.model(images), torch.cat([torch.from_numpy(one), torch.from_numpy(four[1:])]), "ONNX")


def _pt2(loaded: Classifier, images: Tensor, path: Path) -> float:
    program = torch.export.export(loaded.model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=_metadata(loaded, images))
    with path.open("rb") as file:
        again = torch.export.load(file).module()
    return _difference(loaded.model(images), torch.cat([again(images[:1]), again(images[1:])]), "pt2")


def _safetensors(loaded: Classifier, images: Tensor, path: Path) -> float:
    save_weights(loaded.model, path, _metadata(loaded, images) if loaded.facts else {})
    again = build(loaded.spec)
    load_weights(again, path)
    return _difference(loaded.model(images), again.eval()(images), "safetensors")
