"""LaunchPlan, which repeats the launches of the step before: used where nothing but values changed, and right where anything did."""

import copy
import random
import weakref
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast.ops import backend
from kdfast.ops.lion import plan as plan_module
from kdfast.ops.lion.op import lion_step
from kdfast.optim import Lion
from kdfast.optim import lion as optim
from tests.lion import SETTINGS, bits_equal, by_kernel, form, give_gradients, momenta, parameters, run_steps, state_tensors, twins
from tests.numeric import INTERPRETED

pytestmark = pytest.mark.kernels
__all__ = ["form"]  # a fixture

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- changes after which a step equals one without a plan ------------------------------------------------------------


def permute(x: Tensor) -> Tensor:
    """The same memory, its elements in the order of channels_last."""
    return x.as_strided(x.shape, torch.empty_like(x, memory_format=torch.channels_last).stride())


def shift(x: Tensor) -> Tensor:
    """Elsewhere, at no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def read_as_float16(x: Tensor) -> Tensor:
    return x.view(FP16) if x.dtype == BF16 else x


TENSOR_CHANGES = [torch.clone, torch._neg_view, permute, shift, read_as_float16]
OPTIONS = [
    {"lr": 0.02}, {"lr": torch.tensor(0.02)}, {"betas": (0.5, 0.6), "weight_decay": 0.3}, {"rounding": "kahan"}, {"cautious": True},
    {"maximize": True}, {"max_grad_norm": 0.5}, {"foreach": False}, {"foreach": True},
]  # fmt: skip


def change(kind: str, draw: random.Random, optimizer: Lion, params: list[nn.Parameter]) -> None:
    """Changes something that users and libraries change between two steps; the last parameter is in no group at first."""
    p, groups = draw.choice(params), optimizer.param_groups
    state = optimizer.state.get(p, {})
    if kind == "tensor":
        tensor = draw.choice([p, p.grad, state.get("exp_avg")])
        if tensor is not None:
            tensor.data = draw.choice(TENSOR_CHANGES)(tensor.data)
    elif kind == "shared memory":
        p.data = draw.choice(params).data
    elif kind == "gradient":
        zeros, one_number, wrapped = torch._efficientzerotensor(p.shape), torch.randn(1).expand(p.shape), TwoTensor(p.detach(), p.detach())
        p.grad = draw.choice([None, zeros.to(p.dtype), one_number.to(p.dtype), wrapped])
    elif kind == "momentum":
        state.update(draw.choice([{}, {"exp_avg": torch.randn_like(p)}]))
        draw.choice([state.clear, optimizer.state.clear, dict])()
    elif kind == "owner of a state":
        optimizer.state[params[-1]] = draw.choice([optimizer.state.pop(p, {}), {}])
    elif kind == "state reloaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif kind == "members of groups":
        members, cut = draw.choice([params, draw.sample([*params, params[0]], 4)]), draw.randint(1, 4)
        groups[0]["params"][:], groups[1]["params"][:] = members[:cut], members[cut:4]
    elif kind == "number of groups":
        if len(groups) == 3 or draw.random() < 0.5:
            groups.pop()
        else:
            optimizer.add_param_group({"params": [params[-1]], "lr": 0.1})
    elif kind == "options":
        draw.choice(groups).update(draw.choice(OPTIONS))
    elif kind == "loss scale":
        setattr(optimizer, *draw.choice([("grad_scale", torch.tensor(4.0)), ("found_inf", torch.ones(1))]))


@by_kernel
@pytest.mark.parametrize(
    "kind",
    [
        "tensor", "shared memory", "gradient", "momentum", "owner of a state", "state reloaded", "members of groups", "number of groups",
        "options", "loss scale", "backend",
    ],
)  # fmt: skip
def test_a_step_after_a_change_equals_one_without_a_plan(kind):
    for seed in range(10 if INTERPRETED else 40):
        torch.manual_seed(seed)
        params = parameters([(4, 3, 5, 5)] * 5, random.Random(seed).choice([FP32, BF16]))
        theirs = twins(params)
        a = Lion([{"params": params[:2]}, {"params": params[2:4], "lr": 0.01}], **SETTINGS)
        b = Lion([{"params": theirs[:2]}, {"params": theirs[2:4], "lr": 0.01}], foreach=False, **SETTINGS)
        for step in range(7):
            give_gradients(params[step % 3 == 0 :], theirs[step % 3 == 0 :])
            for optimizer, own in ((a, params), (b, theirs)):
                torch.manual_seed(seed)
                if step in (3, 5):
                    change(kind, random.Random(f"{seed} {step}"), optimizer, own)
                is_plain = optimizer is b or (kind == "backend" and step in (3, 5))
                with kdfast.backend("torch" if is_plain else backend.current()):
                    optimizer.step()
            assert bits_equal(params, theirs), (seed, step)
            assert bits_equal(state_tensors(a), state_tensors(b)), (seed, step)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("which", ["the gradient", "exp_avg"])
def test_shapes_that_no_longer_fit_are_refused_and_nothing_changes(which, steps):
    params, optimizer = run_steps(steps, [(9,), (90_000,)])
    tensor = params[1].grad if which == "the gradient" else optimizer.state[params[1]]["exp_avg"]
    tensor.data = tensor.data[:1]  # at the same address
    before = [x.detach().clone() for x in (*params, *momenta(optimizer, params))]
    with pytest.raises(RuntimeError, match=rf"{which} of parameter 1 must have the parameter's shape \(90000,\), got \(1,\)"):
        optimizer.step()
    assert bits_equal(before, [*params, *momenta(optimizer, params)])


# ---- when the plan is used -------------------------------------------------------------------------------------------


@by_kernel
def test_only_a_first_step_and_one_with_other_gradients_sort_tensors(monkeypatch):
    calls, counts = [], []
    monkeypatch.setattr(optim, "lion_step", lambda *a, **k: calls.append(a) or lion_step(*a, **k))
    params = [*parameters([(50,), (3000,), (9,)]), *parameters([(20,)], BF16)]
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    for step in range(6):
        give_gradients(params if step < 3 else params[1:])
        optimizer.param_groups[1]["lr"] *= 0.5
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(calls))
    assert counts == [2, 2, 2, 4, 4, 4]  # one for each group
    params[1].grad = torch.randn(3000).to_sparse()
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step()


def test_a_plan_keeps_no_tensor_that_its_owner_drops():
    params, optimizer = run_steps(2, [(50,), (300,)])
    state = optimizer.state[params[0]]
    gone = [weakref.ref(x) for x in (params[1], state["exp_avg"], optimizer.state[params[1]]["exp_avg"], *(p.grad for p in params))]
    optimizer.zero_grad()
    state["exp_avg"] = state["exp_avg"].clone()
    del optimizer.state[params[1]]
    del optimizer.param_groups[0]["params"][1]
    del params[1]
    assert [ref() for ref in gone] == [None] * 5


@pytest.mark.parametrize("steps", [1, 4], ids=["a new plan", "a plan in use"])
def test_what_a_step_writes_stays_where_it_is_and_is_marked_as_written(steps):
    """Whoever holds a momentum sees the next steps; a backward pass through old values fails, instead of using new ones."""
    params, optimizer = run_steps(1, foreach=False)
    optimizer.param_groups[0]["foreach"] = None
    held, views = momenta(optimizer, params), [m.detach() for m in momenta(optimizer, params)]
    for _ in range(steps):
        products = [torch.ones((), requires_grad=True) * t for t in (held[0], params[0].detach())]
        give_gradients(params)
        optimizer.step()
    assert all(m is old for m, old in zip(momenta(optimizer, params), held))
    assert bits_equal(views, momenta(*reversed(run_steps(1 + steps, foreach=False))))
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize(("devices", "looks"), [(["cpu"], 1), (["cpu", "meta"], 4)], ids=["all on the CPU", "one elsewhere"])
def test_a_captured_graph_is_looked_for_unless_all_parameters_are_on_the_cpu(devices, looks, monkeypatch):
    """PyTorch's own look, for which a captured step without capturable=True is an error; the meta device stands for a GPU."""
    seen = []
    monkeypatch.setattr(Lion, "_accelerator_graph_capture_health_check", lambda optimizer: seen.append(optimizer))
    params = [nn.Parameter(torch.zeros(5, device=device)) for device in devices]
    params[0].grad = torch.ones(5, device="cpu")
    optimizer = Lion(params)
    for _ in range(4):
        optimizer.step()
    assert len(seen) == looks


@by_kernel
@pytest.mark.parametrize(("capturing", "stream", "fits"), [(False, 3, True), (True, 3, False), (False, 7, False)])
def test_a_plan_fits_neither_a_captured_graph_nor_another_stream(capturing, stream, fits, monkeypatch):
    _, optimizer = run_steps(2)
    plan = optimizer._plan
    plan._gpus, plan._streams = {torch.device("cuda", 0)}, [3]  # as on a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(plan_module, "current_streams", lambda gpus: [stream])
    assert (plan.find(plan._key, optimizer.param_groups, optimizer.state) is not None) == fits


# ---- modes of PyTorch ------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **kwargs or {})


def in_fake_mode(step):
    with FakeTensorMode(allow_non_fake_inputs=True):
        step()


def in_dispatch_mode(step):
    with Watch() as watch:
        step()
    assert any("sign" in name for name in watch.seen)


def in_functionalize(step):
    torch.func.functionalize(lambda x: (step(), x)[1])(torch.ones(1))


def in_inference_mode(step):
    torch.inference_mode()(step)()


def in_vmap(step):
    torch.vmap(lambda x: (step(), x.sum())[1])(torch.ones(3))


@pytest.mark.parametrize("mode", [in_fake_mode, in_dispatch_mode, in_functionalize, in_inference_mode, in_vmap])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_mode_of_pytorch_leaves_nothing_behind(mode, steps):
    """Neither in the process, after a first step in it, nor in the optimizer, after a later one."""
    params, optimizer = run_steps(steps, [(50,), (7,)])
    give_gradients(params)
    with suppress(*[Exception] * (mode is not in_dispatch_mode)):  # whether a step can be taken there or not
        mode(optimizer.step)
    if steps:
        theirs = twins(params)
        other = Lion(theirs, foreach=False)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_gradients(params, theirs)
        optimizer.step()
        other.step()
        assert bits_equal(params, theirs)
    assert bits_equal(run_steps(1)[0], run_steps(1, foreach=False)[0])


def gradient_and_value(f):
    return lambda x: torch.func.grad(lambda y: (y.sum(), f(y)), has_aux=True)(x)[1]


@pytest.mark.parametrize("transform", [torch.func.functionalize, gradient_and_value])
def test_parameters_within_a_transform_are_stepped(transform):
    """Tensors there have no memory of their own."""

    def step_within(x):
        p = x.detach().clone()
        optimizer = Lion([p], lr=0.125)
        for _ in range(4):
            p.grad = torch.ones(5, 7)
            optimizer.step()
        return p

    assert torch.equal(transform(step_within)(torch.ones(5, 7)), torch.full((5, 7), 0.5))
