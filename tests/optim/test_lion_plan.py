"""LaunchPlan, which repeats the launches of the step before: used where nothing but values changed, and right where anything did."""

import copy
import types
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import reference
from kdfast.ops import backend
from kdfast.ops.lion import plan as plan_module
from kdfast.ops.lion.op import lion_step
from kdfast.optim import Lion
from kdfast.optim import lion as optim
from tests.lion import SETTINGS, SHAPES, bits_equal, by_kernel, form, give_gradients, momenta, parameters, run_steps, state_tensors, twins
from tests.numeric import error

pytestmark = pytest.mark.kernels
__all__ = ["form"]  # a fixture

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# ---- changes after which a step equals one without a plan ------------------------------------------------------------

GROUP_CHANGES = {  # options that groups get
    "lr": ({"lr": 0.02}, {}),
    "tensor lr": ({"lr": torch.tensor(0.02)}, {"lr": torch.tensor(0.02)}),
    "betas and decay": ({}, {"betas": (0.5, 0.6), "weight_decay": 0.3}),
    "cautious": ({"cautious": True}, {"cautious": True}),
    "maximize": ({"maximize": True}, {}),
    "clipping": ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
    "clipping of one group": ({}, {"max_grad_norm": 0.1}),
    "foreach=False": ({"foreach": False}, {"foreach": False}),
    "foreach=True": ({"foreach": True}, {"foreach": True}),
}


def permute(x: Tensor) -> Tensor:
    """The same memory, its elements in the order of channels_last."""
    return x.as_strided(x.shape, torch.empty_like(x, memory_format=torch.channels_last).stride())


def move_param(a, params):
    params[0].data = params[0].data.clone()


def reorder_param(a, params):
    params[2].data = params[2].data.contiguous(memory_format=torch.channels_last)


def reorder_param_in_place(a, params):
    params[2].data = permute(params[2].data)


def reorder_momentum_in_place(a, params):
    a.state[params[2]]["exp_avg"].data = permute(a.state[params[2]]["exp_avg"].data)


def reorder_both_in_place(a, params):
    reorder_param_in_place(a, params)
    reorder_momentum_in_place(a, params)


def negate_param(a, params):
    params[1].data = torch._neg_view(params[1].data)


def share_memory(a, params):
    params[0].data = params[1].data[:50]


def reorder_grad(a, params):
    params[2].grad = params[2].grad.contiguous(memory_format=torch.channels_last)


def shift_grad(a, params):
    params[1].grad = torch.cat([torch.zeros(1), params[1].grad])[1:]


def negate_grad(a, params):
    params[1].grad = torch._neg_view(params[1].grad)


def drop_grad(a, params):
    params[0].grad = None


def add_grad(a, params):
    params[3].grad = torch.randn(7)


def wrap_grad(a, params):
    params[0].grad = TwoTensor(params[0].grad, params[0].grad.clone())


def replace_momentum(a, params):
    a.state[params[0]]["exp_avg"] = torch.randn(50)


def move_momentum(a, params):
    a.state[params[0]]["exp_avg"].data = torch.randn(50)


def change_momentum_values(a, params):
    a.state[params[0]]["exp_avg"].mul_(-1)


def clear_one_state(a, params):
    a.state[params[0]].clear()


def delete_momentum(a, params):
    del a.state[params[0]]["exp_avg"]


def replace_one_state(a, params):
    a.state[params[0]] = {}


def move_state_to_another_param(a, params):
    a.state[params[4]] = a.state.pop(params[0])


def move_last_state_to_another_param(a, params):
    a.state[params[4]] = a.state.pop(params[2])


def clear_all_state(a, params):
    a.state.clear()


def reload_state(a, params):
    a.load_state_dict(copy.deepcopy(a.state_dict()))


def replace_param(a, params):
    a.param_groups[0]["params"][0] = params[4]


def remove_param(a, params):
    del a.param_groups[0]["params"][1]


def append_param(a, params):
    a.param_groups[0]["params"].append(params[4])


def move_param_to_another_group(a, params):
    a.param_groups[0]["params"].append(a.param_groups[1]["params"].pop(0))


def repeat_param_in_another_group(a, params):
    a.param_groups[1]["params"].append(params[0])


def add_group(a, params):
    a.add_param_group({"params": [params[4]], "lr": 0.1})


def remove_group(a, params):
    del a.param_groups[1]


def scale_loss(a, params):
    a.grad_scale = torch.full((), 4.0)


def overflow(a, params):
    a.found_inf = torch.ones(())


def change_nothing(a, params):
    """Also where the backend changes, for one step."""


TENSOR_CHANGES = [
    move_param, reorder_param, reorder_param_in_place, reorder_momentum_in_place, reorder_both_in_place, negate_param, share_memory,
    reorder_grad, shift_grad, negate_grad, drop_grad, add_grad, wrap_grad,
    replace_momentum, move_momentum, change_momentum_values, clear_one_state, delete_momentum, replace_one_state,
    move_state_to_another_param, move_last_state_to_another_param, clear_all_state, reload_state,
    replace_param, remove_param, append_param, move_param_to_another_group, repeat_param_in_another_group, add_group, remove_group,
    scale_loss, overflow, change_nothing,
]  # fmt: skip


def compare_with_plain_loop(change, other_backend=None):
    """Six steps with a plan and without; before the fourth, something changes."""
    params = parameters([(50,), (3000,), (4, 3, 2, 2), (7,), (11,)])  # the fourth has no gradient at first, the fifth is in no group
    theirs = twins(params)
    a, b = (
        Lion([{"params": [ps[0], ps[1]]}, {"params": [ps[2], ps[3]]}], **SETTINGS, **extra)
        for ps, extra in ((params, {}), (theirs, {"foreach": False}))
    )
    for step in range(6):
        for optimizer, own in ((a, params), (b, theirs)):
            torch.manual_seed(step)
            for i in (0, 1, 2, 4):
                if own[i].grad is not None or step == 0:
                    own[i].grad = torch.randn_like(own[i])
            if step == 3:
                change(optimizer, own)
            name = other_backend if step == 3 and optimizer is a and other_backend else backend.current()
            with kdfast.backend("torch" if optimizer is b else name):
                optimizer.step()
    assert bits_equal(params, theirs)
    assert bits_equal(state_tensors(a), state_tensors(b))


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_a_step_after_a_change_equals_one_without_a_plan(change):
    compare_with_plain_loop(change)


@pytest.mark.parametrize("name", GROUP_CHANGES)
def test_a_step_with_other_options_equals_one_without_a_plan(name):
    def change(optimizer, params):
        for group, options in zip(optimizer.param_groups, GROUP_CHANGES[name]):
            group.update(options)

    compare_with_plain_loop(change)


def test_a_step_of_another_backend_equals_one_without_a_plan():
    compare_with_plain_loop(change_nothing, other_backend="torch")


@pytest.mark.parametrize("which", ["param", "momentum"])
def test_a_dtype_that_changes_in_place_is_seen(which):
    """16 bits are read as their new dtype, though another parameter of the same launch keeps the old one."""
    results = []
    for name in ("auto", "torch"):
        torch.manual_seed(0)
        params = parameters([(9,), (50,)], BF16)
        optimizer = Lion(params, lr=0.5, momentum_dtype=FP32 if which == "param" else BF16)
        with kdfast.backend(name):
            for step in range(3):
                give_gradients(params)
                if step == 2 and which == "param":
                    params[1].grad = None
                    params[1].data = params[1].data.view(FP16)
                    params[1].grad = torch.ones_like(params[1])
                elif step == 2:
                    optimizer.state[params[1]]["exp_avg"].data = optimizer.state[params[1]]["exp_avg"].data.view(FP16)
                optimizer.step()
        results.append([*params, *state_tensors(optimizer)])
    assert bits_equal(*results)


def shrink_grad(p, m):
    p.grad.data = p.grad.data[:1]


def resize_grad(p, m):
    p.grad.resize_(1)


def shrink_momentum(p, m):
    m.data = m.data[:1]  # at the same address


def shrink_param(p, m):
    p.data = p.data[:1]


@pytest.mark.parametrize("change", [shrink_grad, resize_grad, shrink_momentum, shrink_param])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("shapes", [[(50,)], [(9,), (90_000,)]], ids=str)
def test_shapes_that_no_longer_fit_are_refused_and_nothing_changes(change, steps, shapes):
    params, optimizer = run_steps(steps, shapes)
    p, m = params[-1], optimizer.state[params[-1]]["exp_avg"]
    change(p, m)
    before = [x.detach().clone() for x in (*params, *momenta(optimizer, params))]
    expected, found = ("1", p.grad.numel()) if change is shrink_param else (p.numel(), 1)
    name = "exp_avg" if change is shrink_momentum else "the gradient"
    message = rf"{name} of parameter {len(shapes) - 1} must have the parameter's shape \({expected},\), got \({found},\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert bits_equal(before, [*params, *momenta(optimizer, params)])


# ---- when the plan is used -------------------------------------------------------------------------------------------


@pytest.fixture
def sorted_steps(monkeypatch):
    """The calls that sort tensors into launches, as a list."""
    calls = []
    monkeypatch.setattr(optim, "lion_step", lambda *a, **k: calls.append(a) or lion_step(*a, **k))
    return calls


@by_kernel
@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0]], ids=["many", "one"])
def test_only_the_first_step_sorts_tensors(places, sorted_steps):
    params = [[*parameters([(50,), (3000,), (9,)]), *parameters([(20,)], BF16)][i] for i in places]
    optimizer = Lion([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    for _ in range(4):
        give_gradients(params)
        optimizer.param_groups[1]["lr"] *= 0.5
        optimizer.step()
        optimizer.zero_grad()
    assert len(sorted_steps) == 2  # one for each group
    params[0].grad = torch.randn(50).to_sparse()
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step()


@by_kernel
def test_parameters_without_gradient_leave_the_plan_in_use(sorted_steps):
    params = parameters([(50,), (3000,), (9,)])
    optimizer = Lion(params)
    give_gradients(params)
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    sorted_steps.clear()
    for _ in range(3):
        give_gradients([params[0], params[2]])
        optimizer.step()
    assert not sorted_steps


def test_a_plan_keeps_no_tensor_that_its_owner_drops():
    params = parameters([(50,), (300,)])
    optimizer = Lion(params)
    for _ in range(2):
        give_gradients(params)
        optimizer.step()
    state = optimizer.state[params[0]]
    gone = [weakref.ref(x) for x in (params[1], state["exp_avg"], optimizer.state[params[1]]["exp_avg"], *(p.grad for p in params))]
    optimizer.zero_grad()
    state["exp_avg"] = state["exp_avg"].clone()
    del optimizer.state[params[1]]
    del optimizer.param_groups[0]["params"][1]
    del params[1]
    assert [ref() for ref in gone] == [None] * 5


def test_a_kernel_takes_the_step_where_the_backend_offers_one(monkeypatch):
    calls = []

    class Kernel:
        @staticmethod
        def make_table(rows, before, *, capturable):
            return types.SimpleNamespace(rows=rows, captured=False)

        @staticmethod
        def step(like, table, written, *, lr, grad_factor, found_inf, **options):
            assert like is table.rows[0]
            assert len(written) == 2 * len(table.rows)
            calls.append((len(table.rows), lr, grad_factor, found_inf))

    Kernel.__name__ = "kernel"
    monkeypatch.setattr(backend, "kernel", lambda name, *tensors: Kernel if name == "lion" else None)
    run_steps(1)
    run_steps(1, fused=True)
    assert calls == [(len(SHAPES), SETTINGS["lr"], None, None)] * 2
    run_steps(1, fused=False)
    run_steps(1, foreach=True)
    assert len(calls) == 2


def test_every_kernel_keeps_a_table_of_its_own():
    """With Triton's interpreter foreach=True is another kernel's step."""
    (params, optimizer), (theirs, other) = run_steps(1), run_steps(1)
    for foreach in (None, True, None, True):
        optimizer.param_groups[0]["foreach"] = foreach
        optimizer.step()
        other.step()
    assert all(error(p.detach(), q.detach()) <= 1e-6 for p, q in zip(params, theirs) if p.numel())


def test_momenta_stay_where_they_are():
    """Whoever has a momentum, a view of it, or its memory, sees the next steps."""
    params, optimizer = run_steps(1)
    held = momenta(optimizer, params)
    views = [m.detach() for m in held]
    arrays = [np.from_dlpack(m.view(-1)) for m in held if m.numel() and m.is_cpu]
    weight = torch.ones((), requires_grad=True)
    product = weight * held[0]
    for _ in range(4):
        give_gradients(params)
        optimizer.step()
    now = momenta(optimizer, params)
    assert all(m is other for m, other in zip(held, now))
    assert bits_equal(views, now)
    assert all((array == m.view(-1).numpy()).all() for array, m in zip(arrays, [m for m in now if m.numel()]))
    assert bits_equal(now, momenta(*reversed(run_steps(5, foreach=False))))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    ("devices", "steps", "expected"), [(["cpu"], 4, 0), (["cpu", "meta"], 1, 1)], ids=["all on the CPU", "one elsewhere"]
)
def test_a_captured_graph_is_looked_for_unless_all_parameters_are_on_the_cpu(devices, steps, expected, monkeypatch):
    """PyTorch's own look, for which a captured step without capturable=True is an error; the meta device stands for a GPU."""
    looks = []
    monkeypatch.setattr(Lion, "_accelerator_graph_capture_health_check", lambda optimizer: looks.append(optimizer))
    params = [nn.Parameter(torch.zeros(5, device=device)) for device in devices]
    params[0].grad = torch.ones(5, device="cpu")
    optimizer = Lion(params)
    for _ in range(steps):
        optimizer.step()
    assert len(looks) == expected


@by_kernel
@pytest.mark.parametrize(
    ("capturing", "stream", "moved", "fits"),
    [
        pytest.param(True, None, False, True, id="captured"),
        pytest.param(True, None, True, False, id="captured with moved gradients"),
        pytest.param(False, None, True, True, id="moved gradients"),
        pytest.param(False, 7, False, False, id="another stream"),
    ],
)
def test_a_plan_does_not_fit_moved_gradients_in_a_graph_and_other_streams(capturing, stream, moved, fits, monkeypatch):
    params, optimizer = run_steps(2)
    plan = optimizer._plan
    plan.is_on_cpu = False  # as on a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(plan_module, "current_stream", lambda device: stream)
    if moved:
        kept = [p.grad for p in params]
        give_gradients(params)
        assert kept[0].data_ptr() != params[0].grad.data_ptr()
    assert (plan.find(plan._key, optimizer.param_groups, optimizer.state) is not None) == fits


# ---- modes of PyTorch ------------------------------------------------------------------------------------------------


def in_fake_mode(step):
    with FakeTensorMode(allow_non_fake_inputs=True):
        step()


def in_functionalize(step):
    torch.func.functionalize(lambda x: (step(), x)[1])(torch.ones(1))


def in_inference_mode(step):
    torch.inference_mode()(step)()


def in_grad(step):
    torch.func.grad(lambda x: (step(), x.sum())[1])(torch.ones(3))


def in_vmap(step):
    torch.vmap(lambda x: (step(), x.sum())[1])(torch.ones(3))


@pytest.mark.parametrize("mode", [in_fake_mode, in_functionalize, in_inference_mode, in_grad, in_vmap])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_mode_of_pytorch_leaves_nothing_behind(mode, steps):
    """Neither in the process, after a first step in it, nor in the optimizer, after a later one."""

    def make():
        params = [nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(7))]
        optimizer = Lion(params, lr=0.125, betas=(0.5, 0.75), weight_decay=0.25)
        for p in params:
            p.grad, optimizer.state[p]["exp_avg"] = torch.ones_like(p), torch.zeros_like(p)
        return params, optimizer

    params, optimizer = make()
    for _ in range(steps):
        optimizer.step()
    with suppress(Exception):  # whether a step can be taken there or not
        mode(optimizer.step)
    if steps:
        before = [(p.detach().clone(), m.clone()) for p, m in zip(params, momenta(optimizer, params))]
        optimizer.step()
        for p, m, (old_p, old_m) in zip(params, momenta(optimizer, params), before):
            ones = torch.ones_like(old_p)
            want_p, want_m = reference.lion_step(old_p, ones, old_m, lr=0.125, betas=(0.5, 0.75), weight_decay=0.25)
            assert torch.allclose(p, want_p)
            assert torch.allclose(m, want_m)
    params, optimizer = make()
    optimizer.step()
    assert torch.allclose(params[0].detach(), torch.full((50,), 1 - 0.25 * 0.125 - 0.125))


def gradient_and_value(f):
    return lambda x: torch.func.grad(lambda y: (y.sum(), f(y)), has_aux=True)(x)[1]


@pytest.mark.parametrize("transform", [torch.func.functionalize, gradient_and_value])
def test_parameters_within_a_transform_are_stepped(transform):
    """Tensors there have no memory of their own."""

    def step_within(x):
        params = [x.detach().clone() for _ in range(2)]
        optimizer = Lion(params, lr=0.125)
        for _ in range(4):
            for p in params:
                p.grad = torch.ones(5, 7)
            optimizer.step()
        return tuple(params)

    for p in transform(step_within)(torch.ones(5, 7)):
        assert torch.equal(p, torch.full((5, 7), 0.5))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_dispatch_mode_sees_operations(steps):
    """In the step after the mode has ended, the kernel is used again."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **kwargs or {})

    params, optimizer = run_steps(steps)
    theirs, other = run_steps(steps)
    give_gradients(params, theirs)
    with Watch():
        optimizer.step()
    other.step()
    assert any("sign" in name for name in seen)
    give_gradients(params, theirs)
    optimizer.step()
    other.step()
    assert bits_equal(params, theirs)
    assert bits_equal(momenta(optimizer, params), momenta(other, theirs))
