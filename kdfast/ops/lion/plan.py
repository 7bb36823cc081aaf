"""Repeats the kernel launches of the optimizer's last step.

Sorting tensors and making the tables that tell a kernel where they are takes the host longer than a GPU needs for a step of many small
tensors. If the tensors are those of the last step, LaunchPlan does neither: it checks them in a few calls for all together, writes the
gradients' addresses into the tables if these have changed, and launches.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import attrgetter, getitem, is_, itemgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch.compile's check of its inputs. One call compares Python type, dtype, device, sizes, strides and flags (negative, sparse, without
# memory, wrapped by a transform) of all tensors, and sees that none is given twice. It holds no tensor.
from torch._C._dynamo.guards import TensorGuards

from kdfast.ops.lion.rows import Options, Row

_STATE = {"momentum": "exp_avg", "scale": "exp_avg_scale", "compensation": "kahan_comp", "step": "step"}  # field of Row: key in the state
_PARAMS, _GRAD = itemgetter("params"), attrgetter("grad")


class Launch(NamedTuple):
    """One call of a kernel, which has stepped some rows."""

    key: Hashable  # finds the table again when a later step makes one of its own
    kernel: ModuleType
    table: Any  # tells the kernel where the tensors are
    rows: list[Row]


class _PlannedLaunch(NamedTuple):
    kernel: ModuleType
    table: Any
    group: int  # whose options apply
    params: slice  # places in the plan's list of tensors
    state: slice
    stream: int | None


def launch(
    kernel: ModuleType,
    table: Any,
    like: Row,
    written: list[Tensor],
    options: Options,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Calls the step of a kernel with the options of a group."""
    device = like.param.device
    kernel.step(
        like,
        table,
        written,
        lr=options.lr_on(device),
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
        rounding=options.rounding,
        cautious=options.cautious,
        maximize=options.maximize,
        grad_factor=None if grad_factor is None else grad_factor.to(device, torch.float32),
        found_inf=None if found_inf is None else found_inf.to(device, torch.float32),
    )


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
        self.tables = {each.key: each.table for _, each in launches}
        self._key = key if can_repeat else None
        if not can_repeat:
            return
        params = _all_params(groups)
        self.is_on_cpu = all(param.is_cpu for param in params)
        places = [row.number for _, each in launches for row in each.rows]
        self._count = len(places)
        self._without_grad = sorted(set(range(len(params))).difference(places))
        place_in_state = {id(param): place for place, param in enumerate(state)}
        states: list[tuple[int, str]] = []
        self._launches: list[_PlannedLaunch] = []
        first = 0
        for group, each in launches:
            start = len(states)
            for row in each.rows:
                place = place_in_state[id(params[row.number])]
                states += [(place, name) for field, name in _STATE.items() if getattr(row, field) is not None]
            own, own_state = slice(first, first + len(each.rows)), slice(self._count + start, self._count + len(states))
            self._launches.append(_PlannedLaunch(each.kernel, each.table, group, own, own_state, current_stream(each.rows[0].param.device)))
            first = own.stop
        self._pick_params = _picker(places)
        self._pick_keys = _picker([place_in_state[id(params[place])] for place in places])
        self._pick_states = _picker([place for place, _ in states])
        self._names = [name for _, name in states]
        self._steps = [self._count + i for i, name in enumerate(self._names) if name == "step"]
        tensors = self._collect(params, state)
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[])
        self._addresses = _addresses(tensors)

    def _collect(self, params: list[Any], state: Any) -> list[Any]:
        """Parameters, state and gradients, each in the order of launches; an empty list if the state does not belong to them."""
        try:
            own = self._pick_params(params)
            if not all(map(is_, own, self._pick_keys(list(state)))):
                return []
            return [*own, *map(getitem, self._pick_states(list(state.values())), self._names), *map(_GRAD, own)]
        except LookupError:
            return []

    def find(self, key: Hashable, groups: list[dict[str, Any]], state: Any) -> list[Tensor] | None:
        """The tensors that `repeat` steps; None if the plan does not fit them."""
        if key != self._key:
            return None
        params = _all_params(groups)
        if self._without_grad and any(params[place].grad is not None for place in self._without_grad):
            return None
        tensors = self._collect(params, state)
        if len(tensors) != len(self._addresses) or not self._guards.check(*tensors):
            return None
        addresses, gradients = _addresses(tensors), slice(len(tensors) - self._count, None)
        have_moved = addresses != self._addresses
        if have_moved and addresses[: gradients.start] != self._addresses[: gradients.start]:
            return None
        if not self.is_on_cpu and not self._can_launch_here(tensors, have_moved):
            return None
        if have_moved:
            self._addresses, moved = addresses, addresses[gradients]
            self._launches = [each._replace(table=each.kernel.move_gradients(each.table, moved[each.params])) for each in self._launches]
        return tensors

    def _can_launch_here(self, tensors: list[Tensor], have_moved: bool) -> bool:
        """False where a CUDA graph would have to fill a table for moved gradients, or where the tables belong to another stream."""
        if torch.cuda.is_current_stream_capturing():
            return not have_moved
        return all(each.stream == current_stream(tensors[each.params.start].device) for each in self._launches)

    def steps(self, tensors: list[Tensor]) -> list[Tensor]:
        """The counters of steps among the tensors that find() has returned."""
        return [tensors[place] for place in self._steps]

    def repeat(self, tensors: list[Tensor], options: list[Options], factors: list[Tensor | None], found_inf: Tensor | None) -> None:
        """Launches all again.

        Args:
            tensors: the result of find().
            options: for each group.
            factors: for each group, the factor of its gradients.
            found_inf: 0-dim; where it is not 0 nothing changes.
        """
        for kernel, table, group, params, state, _ in self._launches:
            like = Row(tensors[params.start], tensors[params.start - self._count], tensors[state.start])
            launch(kernel, table, like, tensors[params] + tensors[state], options[group], factors[group], found_inf)


def current_stream(device: torch.device) -> int | None:
    """The CUDA stream of launches. None on a CPU, and while a graph is captured: it keeps its tables and has a stream of its own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(device).cuda_stream


def _all_params(groups: list[dict[str, Any]]) -> list[Any]:
    return groups[0]["params"] if len(groups) == 1 else list(chain.from_iterable(map(_PARAMS, groups)))


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """A function that picks the items of a list at these places."""
    if places == list(range(len(places))):
        return itemgetter(slice(len(places)))
    return itemgetter(*places) if len(places) > 1 else lambda items: [items[place] for place in places]


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
