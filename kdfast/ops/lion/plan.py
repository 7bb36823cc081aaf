"""Repeats the kernel launches of the optimizer's last step.

Sorting tensors and making the tables that tell a kernel where they are takes the host longer than a GPU needs for a step of many small
tensors. If the tensors are those of the last step, LaunchPlan does neither: it checks them in a few calls for all together, writes the
gradients' addresses into the tables if these have changed, and launches.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain
from operator import getitem, is_, itemgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch.compile's check of its inputs. One call compares Python type, dtype, device, sizes, strides and flags (negative, sparse, without
# memory, wrapped by a transform) of all tensors, and sees that none is given twice. It holds no tensor.
from torch._C._dynamo.guards import TensorGuards

from kdfast.ops.lion.rows import Options, Row, count_steps

_STATE = {"momentum": "exp_avg", "scale": "exp_avg_scale", "compensation": "kahan_comp", "step": "step"}  # field of Row: key in the state


class Launch(NamedTuple):
    """One call of a kernel, which has stepped some rows."""

    key: Hashable  # finds the table again when a later step makes one of its own
    kernel: ModuleType
    table: Any  # tells the kernel where the tensors are
    rows: list[Row]


class LaunchPlan:
    """The launches of one step, to be repeated while the same tensors are in the same place.

    A plan holds no tensor of the caller: whoever drops a gradient or a momentum has its memory back.

    Args:
        key: all that the launches depend on besides tensors.
        groups: the optimizer's param_groups.
        state: the optimizer's state.
        launches: the step's launches, each with the place of the group whose options it took.
        can_repeat: whether these launches were the whole step. If not, the plan is only of use for its tables.
    """

    def __init__(
        self, key: Hashable, groups: list[dict[str, Any]], state: Any, launches: list[tuple[int, Launch]], can_repeat: bool
    ) -> None:
        params = _all_params(groups)
        self.tables = {each.key: each.table for _, each in launches}
        self.is_on_cpu = all(param.is_cpu for param in params)
        self._gpus = {param.device for param in params if param.is_cuda}
        self._key = None
        if not can_repeat or self._is_captured():
            return
        self._key = key
        rows = [row for _, each in launches for row in each.rows]
        places = [row.number for row in rows]
        place_in_state = {id(param): place for place, param in enumerate(state)}
        owners = [place_in_state[id(params[place])] for place in places]
        states = [(owner, name) for owner, row in zip(owners, rows) for field, name in _STATE.items() if getattr(row, field) is not None]
        self._count = len(rows)
        self._without_grad = sorted(set(range(len(params))).difference(places))
        self._pick_params, self._pick_keys = _picker(places), _picker(owners)
        self._pick_states = _picker([owner for owner, _ in states])
        self._names = [name for _, name in states]
        self._steps = [self._count + i for i, name in enumerate(self._names) if name == "step"]
        self._streams = current_streams(self._gpus)
        self._launches: list[tuple[ModuleType, Any, int, slice]] = []  # kernel, table, place of its group, places among all gradients
        first = 0
        for group, each in launches:
            own = slice(first, first + len(each.rows))
            self._launches.append((each.kernel, each.table, group, own))
            first = own.stop
        tensors = self._collect(params, state)
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[])
        self._addresses = _addresses(tensors)

    def _collect(self, params: list[Any], state: Any) -> list[Any]:
        """Parameters, state and gradients, each in the order of launches; an empty list if the state does not belong to them."""
        try:
            own = self._pick_params(params)
            if not all(map(is_, own, self._pick_keys(list(state)))):
                return []
            return [*own, *map(getitem, self._pick_states(list(state.values())), self._names), *[param.grad for param in own]]
        except LookupError:
            return []

    def _is_captured(self) -> bool:
        """Whether a CUDA graph is being captured, which has tables of its own."""
        return bool(self._gpus) and torch.cuda.is_current_stream_capturing()

    def find(self, key: Hashable, groups: list[dict[str, Any]], state: Any) -> list[Tensor] | None:
        """The tensors that `repeat` steps; None if the plan does not fit them."""
        if key != self._key:
            return None
        if self._is_captured() or current_streams(self._gpus) != self._streams:
            return None
        params = _all_params(groups)
        if self._without_grad and any(params[place].grad is not None for place in self._without_grad):
            return None
        tensors = self._collect(params, state)
        if len(tensors) != len(self._addresses) or not self._guards.check(*tensors):
            return None
        addresses, gradients = _addresses(tensors), slice(len(tensors) - self._count, None)
        if addresses != self._addresses:
            if addresses[: gradients.start] != self._addresses[: gradients.start]:
                return None
            self._addresses, moved = addresses, addresses[gradients]
            for kernel, table, _, own in self._launches:
                kernel.move_gradients(table, moved[own])
        return tensors

    def repeat(self, tensors: list[Tensor], options: list[Options], factors: list[Tensor | None], found_inf: Tensor | None) -> None:
        """Launches all again.

        Args:
            tensors: the result of find().
            options: for each group.
            factors: for each group, the factor of its gradients.
            found_inf: 0-dim; where it is not 0 nothing changes.
        """
        count_steps([tensors[place] for place in self._steps], found_inf)
        for kernel, table, group, _ in self._launches:
            kernel.step(table, options[group], factors[group], found_inf)
        torch.autograd.graph.increment_version(tensors[: -self._count])  # lets a backward pass that needs the old values raise


def current_streams(gpus: Iterable[torch.device]) -> list[int]:
    """The CUDA streams of launches; a table is there for the launches that follow its copy in a stream."""
    return [torch.cuda.current_stream(device).cuda_stream for device in gpus]


def _all_params(groups: list[dict[str, Any]]) -> list[Any]:
    return groups[0]["params"] if len(groups) == 1 else list(chain.from_iterable(group["params"] for group in groups))


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that picks the items of a list at these places."""
    if places == list(range(len(places))):
        return itemgetter(slice(len(places)))
    return lambda items: [items[place] for place in places]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
