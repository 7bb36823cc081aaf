"""Lion driven by the inputs of PyTorch's own optimizer tests: an OptimizerInfo as torch.testing has one for each of its optimizers."""

import copy
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kdfast.optim import Lion

pytest.importorskip("expecttest", reason="torch.testing's optimizer inputs need it")

OWN_OPTIONS = [
    {"cautious": True, "weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"rounding": "kahan"},
    {"rounding": "stochastic"},
    {"momentum_dtype": torch.float64},
    {"max_grad_norm": 1.0},
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(scope="module")
def optimizers() -> Any:
    """The module of torch.testing. Imported late: it takes seconds and freezes the flags of torch.backends, which are released again."""
    from torch.testing._internal import common_optimizers

    torch.backends.__allow_nonbracketed_mutation_flag = True
    return common_optimizers


@pytest.fixture(scope="module")
def info(optimizers: Any) -> Any:
    """Lion's OptimizerInfo: every input of every optimizer of PyTorch whose options Lion has, and some of Lion's own."""

    def inputs(device: Any = None) -> list[Any]:
        accepted = set(inspect.signature(Lion).parameters) - {"capturable"}  # needs a GPU
        theirs = [each.kwargs for other in optimizers.optim_db for each in other.optim_inputs_func(device="cpu")]
        fitting = [kwargs for kwargs in theirs if set(kwargs) <= accepted]
        unique = {str(kwargs): kwargs for kwargs in fitting + OWN_OPTIONS}
        return [optimizers.OptimizerInput(params=None, kwargs=kwargs, desc=text) for text, kwargs in unique.items()]

    return optimizers.OptimizerInfo(
        Lion,
        optim_inputs_func=inputs,
        optim_error_inputs_func=optimizers.get_error_inputs_for_all_optims,
        scheduler_inputs=tuple(each for other in optimizers.optim_db for each in other.scheduler_inputs),
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=("foreach", "fused", "maximize", "capturable", "cautious", "rounding", "momentum_dtype", "max_grad_norm"),
        supports_complex=False,
        supports_fused_on=("cpu",),
    )


def all_options(optimizers: Any, info: Any, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, Any]]:
    """Each input with every form of the step: one after the other, foreach, and fused where a compiled kernel takes the options."""
    for each in optimizers._get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, info):
        is_plain = set(each.kwargs) <= {"lr", "betas", "weight_decay", "maximize", "foreach", "fused"}
        if not each.kwargs["fused"] or (is_plain and dtype != torch.float64):
            yield each.kwargs


class Problem:
    """The sum of squares of weight @ x + bias, as PyTorch's optimizer tests minimize it; `strided` parameters have gaps in memory."""

    def __init__(self, options: dict[str, Any], dtype: torch.dtype = torch.float32, strided: bool = False, named: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(5, generator=generator).to(dtype)
        weight = torch.randn(10, 5, 2, generator=generator).to(dtype)[..., 0]
        bias = torch.randn(10, 2, generator=generator).to(dtype)[..., 0]
        self.params = [nn.Parameter(p if strided else p.contiguous()) for p in (weight, bias)]
        given: list[Any] = list(zip(("weight", "bias"), self.params)) if named else self.params
        self.optimizer = Lion(given, **copy.deepcopy(options))

    def loss(self) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = (self.params[0].mv(self.x) + self.params[1]).square().sum()
        loss.backward()
        return loss

    def take_steps(self, n: int) -> list[Tensor]:
        for _ in range(n):
            self.optimizer.step(self.loss)
        return [p.detach().clone() for p in self.params]


def assert_same(a: Any, b: Any) -> None:
    """Equality in type, keys and every bit."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            assert_same(one, other)
    else:
        assert a == b


def test_errors_are_of_pytorchs_types(info):
    for each in info.optim_error_inputs_func("cpu", torch.float32):
        given, kwargs = each.optimizer_error_input.params, each.optimizer_error_input.kwargs
        params = [nn.Parameter(torch.ones(1, 1))] if given is None else given
        if each.error_type is UserWarning:
            with pytest.warns(UserWarning, match=each.error_regex):
                Lion(params, **kwargs)
        else:
            with pytest.raises(each.error_type, match=None if "lr" in kwargs else each.error_regex):
                Lion(params, **kwargs)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_falls_or_rises_with_maximize(optimizers, info, dtype, strided):
    for options in all_options(optimizers, info, dtype):
        problem = Problem({**options, "lr": 0.01}, dtype, strided)
        first = problem.loss().item()
        problem.take_steps(100)
        assert (problem.loss().item() > first) == options.get("maximize", False), options


def test_the_loss_falls_under_every_scheduler(info):
    for constructors in info.scheduler_inputs:
        problem = Problem({"lr": 0.01})
        schedulers = [constructor(problem.optimizer) for constructor in constructors]
        first = problem.loss().item()
        for _ in range(200):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # PyTorch's tests schedule before the step, too
                for scheduler in schedulers:
                    scheduler.step(*([problem.loss().item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
            problem.take_steps(1)
        assert problem.loss().item() < first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foreach_and_fused_match_the_loop(info, dtype):
    for each in info.optim_inputs_func():
        forms = [{"foreach": False, "fused": False}, {"foreach": True}, {}]
        loop, *others = ([*(problem := Problem({**each.kwargs, **form}, dtype)).take_steps(7), problem.optimizer] for form in forms)
        for other in others:
            assert_same(other[:2], loop[:2])
            assert_same(other[2].state_dict()["state"], loop[2].state_dict()["state"])


@pytest.mark.parametrize("is_filed", [False, True], ids=["copied", "saved, weights_only"])
def test_a_loaded_state_dict_is_the_same_and_continues_with_the_same_bits(optimizers, info, is_filed):
    for options in all_options(optimizers, info):
        problem, twin = Problem(options), Problem(options)
        problem.take_steps(20)
        saved = problem.optimizer.state_dict()
        if is_filed:
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        else:
            loaded = copy.deepcopy(saved)
        before = copy.deepcopy(loaded)
        for ours, theirs in zip(twin.params, problem.params):
            ours.data.copy_(theirs.data)
        twin.optimizer.load_state_dict(loaded)
        assert_same(loaded, before)
        assert_same(twin.optimizer.state_dict(), problem.optimizer.state_dict())
        assert_same(twin.take_steps(20), problem.take_steps(20))
        assert_same(twin.optimizer.state_dict(), problem.optimizer.state_dict())
        twin.optimizer.param_groups.extend(twin.optimizer.param_groups)
        assert_same(twin.optimizer.state_dict()["param_groups"][-1], problem.optimizer.state_dict()["param_groups"][-1])


def test_older_state_dicts_and_counts_that_are_no_tensors_load(info):
    for each in info.optim_inputs_func():
        problem = Problem(each.kwargs)
        problem.take_steps(2)
        saved = problem.optimizer.state_dict()
        for group in saved["param_groups"]:
            for flag in info.not_og_supported_flags:
                del group[flag]
        for state in saved["state"].values():
            state.update({key: value.item() for key, value in state.items() if key == "step"})
        problem.optimizer.load_state_dict(saved)
        problem.take_steps(2)


@pytest.mark.parametrize("is_named", [False, True], ids=["to names", "from names"])
def test_named_and_nameless_state_dicts_load_into_each_other(info, is_named):
    for each in info.optim_inputs_func():
        problem, twin = Problem(each.kwargs, named=is_named), Problem(each.kwargs, named=not is_named)
        problem.take_steps(2)
        twin.optimizer.load_state_dict(problem.optimizer.state_dict())
        assert_same(twin.optimizer.state_dict()["state"], problem.optimizer.state_dict()["state"])
        assert twin.optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_a_step_without_gradients_or_with_zeros_changes_nothing(optimizers, info):
    for options in all_options(optimizers, info):
        problem = Problem({**options, "weight_decay": 0.0})
        before = copy.deepcopy(problem.params)
        problem.optimizer.step()
        assert not problem.optimizer.state
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        problem.optimizer.step()
        assert_same(problem.params, before)


def test_groups_keep_their_own_rate_and_decay(optimizers, info):
    for options in all_options(optimizers, info):
        weight, bias = (nn.Parameter(torch.ones(3)) for _ in range(2))
        groups: list[dict[str, Any]] = [{"params": [weight]}, {"params": [bias], "lr": 0.25, "weight_decay": 0.0}]
        optimizer = Lion(groups, **{**options, "lr": 0.5, "weight_decay": 0.5})
        weight.grad, bias.grad = torch.zeros(3), torch.full((3,), -1.0 if options.get("maximize") else 1.0)
        optimizer.step()
        decay = 0.5 if options.get("decoupled_weight_decay") else 0.25
        assert_same([weight.data, bias.data], [torch.full((3,), 1 - decay), torch.full((3,), 0.75)])


@pytest.mark.parametrize("shape", [(), (1,)], ids=["no dimension", "one dimension"])
def test_a_rate_in_a_tensor_takes_the_steps_of_a_number(optimizers, info, shape):
    for options in all_options(optimizers, info):
        rates = [0.01, torch.full(shape, 0.01, dtype=torch.float64)]
        number, tensor = (Problem({**options, "lr": lr}).take_steps(10) for lr in rates)
        assert_same(tensor, number)


def test_copies_have_every_public_attribute_and_print(info):
    for each in info.optim_inputs_func():
        optimizer = Problem(each.kwargs).optimizer
        assert {k for k in vars(copy.deepcopy(optimizer)) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
        assert repr(optimizer).startswith("Lion (")


def test_hooks_run_around_steps_and_state_dicts_in_order():
    problem, calls = Problem({"lr": 0.01}), []
    optimizer = problem.optimizer
    optimizer.register_step_pre_hook(lambda *_: calls.append("before step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    problem.take_steps(1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [f"{when} {what}" for what in ("step", "saving", "loading") for when in ("before", "after")]


def test_timm_makes_and_reloads_it_from_its_registry():
    factory = pytest.importorskip("timm.optim._optim_factory", reason="registers Lion in timm")
    factory.default_registry.register(factory.OptimInfo(name="kdfast_lion", opt_class=Lion, has_betas=True, has_eps=False))
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    make = {"opt": "kdfast_lion", "lr": 0.01, "weight_decay": 0.1}
    optimizer = factory.create_optimizer_v2(model, **make)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]  # no decay of biases and norms
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    twin = factory.create_optimizer_v2(model, **make)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(twin.state_dict(), optimizer.state_dict())
