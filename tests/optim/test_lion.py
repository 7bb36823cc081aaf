"""Lion keeps torch.optim's contracts: state, groups, schedulers, closures, loss scaling, clipping, compilation, errors."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kdfast.ops.lion import int8
from kdfast.optim import Lion
from tests.lion import (
    SETTINGS,
    bits_equal,
    by_kernel,
    decide_on_device,
    form,  # noqa: F401
    give_gradients,
    momenta,
    parameters,
    peers,
    run_steps,
    state_tensors,
    twins,
)
from tests.numeric import KERNELS, error

pytestmark = pytest.mark.kernels

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INT8 = {"momentum_dtype": torch.int8}
STOCHASTIC = {"dtype": BF16, "rounding": "stochastic"}
KAHAN = {"dtype": BF16, "rounding": "kahan"}


def assert_continue_alike(a, b, steps=2):
    """Both optimizers have one group; given the same gradients they make the same bits."""
    params, theirs = (optimizer.param_groups[0]["params"] for optimizer in (a, b))
    for _ in range(steps):
        give_gradients(params, theirs)
        a.step()
        b.step()
    assert bits_equal(params, theirs)
    assert bits_equal(momenta(a, params), momenta(b, theirs))


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": FP32, "dtype": BF16}, KAHAN, {**STOCHASTIC, "momentum_dtype": FP32}, INT8, {**INT8, "dtype": BF16}],
    ids=str,
)
def test_files_copies_and_pickles_continue_with_the_same_bits(options):
    params, optimizer = run_steps(3, [(64, 64), (10,), (), (0, 3)], decoupled_weight_decay=True, **options)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = Lion(twins(params), lr=1.0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.param_groups[0]["lr"] == SETTINGS["lr"]
    clones = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)
    assert_continue_alike(optimizer, loaded)
    for clone in clones[:2]:
        assert_continue_alike(clone, copy.deepcopy(clones[2]))


COMMON = {"lr": 2e-3, "weight_decay": 0.2, "params": [0, 1]}
OPTIMI = {**COMMON, "beta1": 0.8, "beta2": 0.9, "decouple_lr": False, "max_lr": None, "kahan_sum": None, "foreach": True, "setup": True}


@pytest.mark.parametrize(
    ("group", "state", "options"),
    [
        pytest.param({**COMMON, "betas": (0.8, 0.9), "caution": True, "foreach": None}, {}, {"cautious": True}, id="timm"),
        pytest.param(OPTIMI, {"kahan_comp": None}, {}, id="optimi"),
        pytest.param({**OPTIMI, "kahan_sum": True}, {}, {"rounding": "kahan"}, id="optimi, kahan"),
        pytest.param(
            {**OPTIMI, "decouple_lr": True, "max_lr": 1e-3}, {}, {"decoupled_weight_decay": True, "init_lr": 1e-3}, id="optimi, decoupled"
        ),
    ],
)
def test_checkpoints_of_other_lions_load(group, state, options):
    params, optimizer = run_steps(2, [(5, 5), (3,)])
    saved = {i: {"exp_avg": m.clone(), **state} for i, m in enumerate(momenta(optimizer, params))}
    loaded, want = Lion(twins(params)), Lion(params)
    loaded.load_state_dict({"state": saved, "param_groups": [group]})
    want.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": want.state_dict()["param_groups"]})
    want.param_groups[0].update({"lr": 2e-3, "weight_decay": 0.2, "betas": (0.8, 0.9), **options})
    assert {key: loaded.param_groups[0][key] for key in options} == options
    assert loaded.param_groups[0]["foreach"] is None
    assert_continue_alike(loaded, want)


def test_a_state_dict_of_lion_pytorch_continues_with_its_bits():
    theirs = parameters()
    original = peers().Lion(theirs, **SETTINGS)
    give_gradients(theirs)
    original.step()
    ours = Lion(twins(theirs))
    ours.load_state_dict(copy.deepcopy(original.state_dict()))
    assert_continue_alike(original, ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"state": {0: {"exp_avg": torch.ones(5)}}}, r"exp_avg must have its parameter's shape \(5, 5\), got \(5,\)", id="shape"
        ),
        pytest.param({"state": {0: {"exp_avg": torch.ones(5).char()}}}, "exp_avg of parameter 0 is torch.int8.*exp_avg_scale", id="scale"),
    ],
)
def test_states_that_mean_something_else_are_refused(change, message):
    _, optimizer = run_steps(1, [(5, 5)])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**optimizer.state_dict(), **change})


def test_hooks_around_loading_see_and_change_the_state():
    params, optimizer = run_steps(2, [(5, 5), (5, 5)])
    loaded = Lion(twins(params))
    loaded.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {0: s["state"][1], 1: s["state"][0]}})  # swaps the two
    loaded.register_load_state_dict_post_hook(lambda o: o.state[o.param_groups[0]["params"][0]]["exp_avg"].zero_())
    loaded.load_state_dict(optimizer.state_dict())
    first, second = momenta(loaded, loaded.param_groups[0]["params"])
    assert not first.any()
    assert torch.equal(second, optimizer.state[params[0]]["exp_avg"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("saved_as", [torch.int8, None], ids=str)
@pytest.mark.parametrize("loaded_as", [torch.int8, None], ids=str)
def test_momenta_load_from_any_dtype_and_layout_into_any_other(saved_as, loaded_as, layout):
    params, optimizer = run_steps(3, [(40, 30, 2, 2)], momentum_dtype=saved_as)
    loaded = Lion([nn.Parameter(params[0].detach().clone(memory_format=layout))])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["momentum_dtype"] = loaded_as
    loaded.load_state_dict(saved)
    values = []
    for each, dtype in ((loaded, loaded_as), (optimizer, saved_as)):
        (state,) = each.state.values()
        assert state["exp_avg"].dtype == (dtype or FP32)
        values.append(int8.decode(state["exp_avg"], state["exp_avg_scale"]) if dtype else state["exp_avg"])
    assert error(*values) < (0.02 if loaded_as else 1e-6)
    give_gradients(loaded.param_groups[0]["params"])
    loaded.step()


@pytest.mark.parametrize("options", [{}, KAHAN, {**STOCHASTIC, **INT8}], ids=str)
def test_state_follows_a_parameter_to_another_device_and_dtype(options):
    """As after model.to(device): the meta device stands for a GPU."""
    (p,), optimizer = run_steps(1, [(5000,)], **options)
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros(5000, dtype=FP16, device="meta")))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {t.device.type for t in optimizer.state[p].values()} == {"meta"}
    assert optimizer.state[p].get("kahan_comp", p).dtype == FP16


@contextmanager
def other_defaults():
    torch.set_default_dtype(FP64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(FP32)


@pytest.mark.parametrize("options", [{}, INT8, STOCHASTIC], ids=str)
def test_default_dtype_and_device_change_nothing(options):
    want, _ = run_steps(2, [(90, 90), (3,)], **options)
    assert bits_equal(run_steps(2, [(90, 90), (3,)], within=other_defaults, **options)[0], want)


# ---- groups, rates, closures -----------------------------------------------------------------------------------------


def test_an_added_group_takes_its_own_options_and_the_optimizers_others():
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = Lion(params[:1], **SETTINGS)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5, "weight_decay": 0.0})
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(params[1], torch.full((4,), -0.5))
    assert optimizer.param_groups[1]["betas"] == SETTINGS["betas"]


def test_the_positions_and_defaults_are_lion_pytorchs():
    group = Lion(parameters(), 1e-3, (0.8, 0.9), 0.1, True, True).param_groups[0]  # use_triton is ignored
    assert (group["lr"], group["betas"], group["weight_decay"], group["decoupled_weight_decay"]) == (1e-3, (0.8, 0.9), 0.1, True)
    default = Lion(parameters()).param_groups[0]
    assert (default["lr"], default["betas"], default["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)
    assert run_steps(1)[1].state_dict()["state"][0].keys() == {"exp_avg"}


def test_numbers_of_other_types_are_accepted():
    np = pytest.importorskip("numpy")
    plain, _ = run_steps(2, lr=0.5, betas=(0.9, 0.99))
    numpy, _ = run_steps(2, lr=np.float32(0.5), betas=(torch.tensor(0.9, dtype=FP64), 0.99), weight_decay=np.float64(0.1))
    tensor, _ = run_steps(2, lr=torch.tensor([0.5]), betas=[0.9, 0.99])
    assert bits_equal(plain, numpy)
    assert bits_equal(plain, tensor)


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("LambdaLR", {"lr_lambda": lambda step: 1 / (step + 1)}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 2}),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 8}),
        ("ReduceLROnPlateau", {"patience": 0}),
    ],
)
def test_schedulers_of_torch_drive_it(scheduler, options, lr):
    """They change a tensor in place."""
    p = nn.Parameter(torch.zeros(1))
    optimizer = Lion([p], lr=copy.deepcopy(lr))
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    rates = []
    for _ in range(6):
        before, p.grad = p.item(), torch.ones(1)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        assert before - p.item() == pytest.approx(rates[-1], rel=1e-3, abs=1e-6)
        schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
    assert len({round(rate, 9) for rate in rates}) > 1


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([p], lr=0.5)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == 1.5
    assert optimizer.step() is None


# ---- loss scaling and clipping ---------------------------------------------------------------------------------------


def scaled_step(optimizer, scale=2.0**10):
    """A step on gradients that are multiplied by a loss scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(scale)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_scaled_and_clipped_gradients_have_the_bits_of_plain_ones(max_norm, is_scaled):
    inside = parameters()
    before = twins(inside)
    a, b = (
        Lion([{"params": ps[:2]}, {"params": ps[2:], "lr": 1e-2}], **SETTINGS, max_grad_norm=norm)
        for ps, norm in ((inside, max_norm), (before, None))
    )
    for _ in range(3):
        give_gradients(inside, before)
        if is_scaled:
            scaled_step(a)
        else:
            a.step()
            assert bits_equal([p.grad for p in before], [p.grad for p in inside])  # gradients are not written
        if max_norm:
            nn.utils.clip_grad_norm_(before, max_norm)
        b.step()
    assert bits_equal(inside, before)
    assert bits_equal(momenta(a, inside), momenta(b, before))


@pytest.mark.parametrize("on_device", [False, True], ids=["read on the host", "decided on the device"])
@pytest.mark.parametrize("options", [{}, KAHAN, STOCHASTIC, INT8], ids=str)
def test_a_skipped_step_changes_no_byte(on_device, options, monkeypatch):
    if on_device:
        decide_on_device(monkeypatch)
    params, optimizer = run_steps(2, **options)
    with torch.no_grad():
        params[0].view(-1)[:2] = torch.tensor([0.0, -0.0])  # a select keeps the sign of zero, a step of 0 does not
    before = [t.detach().clone() for t in (*params, *state_tensors(optimizer))]
    give_gradients(params)
    params[0].grad[0, 0, 0, 0], params[1].grad[0, 0] = float("inf"), float("nan")
    scaled_step(optimizer)
    assert bits_equal(before, [*params, *state_tensors(optimizer)])
    optimizer.found_inf = torch.tensor([2.0])  # GradScaler adds up what devices found
    optimizer.step()
    assert bits_equal(before, [*params, *state_tensors(optimizer)])
    del optimizer.found_inf
    give_gradients(params)
    scaled_step(optimizer)
    assert not bits_equal(before[:1], params[:1])


def test_clipping_leaves_groups_without_it_alone():
    clipped, free = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = Lion([{"params": [clipped]}, {"params": [free], "max_grad_norm": None}], max_grad_norm=1.0, betas=(0.9, 0.0))
    clipped.grad, free.grad = torch.full((4,), 2.0), torch.full((4,), 2.0)
    scaled_step(optimizer, 8.0)
    assert torch.allclose(optimizer.state[clipped]["exp_avg"], torch.full((4,), 0.5))  # from norm 4 down to 1
    assert torch.equal(optimizer.state[free]["exp_avg"], torch.full((4,), 2.0))


def test_gradients_that_require_grad_make_no_graph():
    """As gradients of create_graph=True do."""
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.125, max_grad_norm=1.0)
    for _ in range(5):
        p.grad = torch.ones(4, requires_grad=True) * 2
        optimizer.step()
    assert not optimizer.state[p]["exp_avg"].requires_grad
    assert p.tolist() == [0.375] * 4


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grad", "kind"), [(torch.eye(3).to_sparse(), "a sparse"), (torch.eye(3).to(torch.complex64), "a complex")], ids=["sparse", "complex"]
)
def test_sparse_and_complex_gradients_are_refused(grad, kind):
    p = nn.Parameter(torch.ones(3, 3, dtype=grad.dtype))
    p.grad = grad
    with pytest.raises(RuntimeError, match=f"must be dense and real, got {kind}"):
        Lion([p], max_grad_norm=1.0).step()


@pytest.mark.parametrize("options", [{"dtype": FP64}, KAHAN, {"dtype": FP16}, {"cautious": True}], ids=str)
def test_fused_without_a_kernel_is_refused(options, form):  # noqa: F811
    dtype = options.get("dtype", FP32)
    if KERNELS and dtype != FP64:
        pytest.skip("Triton's kernel takes these")
    expected = rf"fused=True needs the Triton kernel.*{dtype} parameters on \w+ \(backend '{form}'\); leave fused=None"
    with pytest.raises(RuntimeError, match=expected):
        run_steps(1, fused=True, **options)


@by_kernel
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0"),
        ({"lr": "a"}, TypeError, "lr must be a number, got 'a'"),
        ({"lr": float("nan")}, ValueError, "lr must be positive, got nan"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element"),
        ({"lr": float("inf")}, ValueError, "lr must be finite and not negative, got inf"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got None"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and not negative, got -1.0"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite and not negative, got nan"),
        ({"betas": 0.9}, ValueError, r"betas must be two numbers in \[0, 1\], got 0.9"),
        ({"betas": (0.9, 1.1)}, ValueError, r"betas must be two numbers in \[0, 1\]"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic, kahan, got 'up'"),
        ({"momentum_dtype": torch.int32}, TypeError, "momentum_dtype must be a floating torch.dtype, torch.int8 or None"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"fused": True, "foreach": True}, ValueError, "cannot both be True"),
        ({"capturable": True}, RuntimeError, "capturable=True needs parameters on cuda"),
        ({**INT8, "dtype": FP64}, TypeError, "torch.int8 needs unsharded.*got float64"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, kind, message):
    with torch.device("cpu"), pytest.raises(kind, match=message):
        run_steps(1, **options)
    if options.get("lr") is None and kind is ValueError:
        with pytest.raises(kind, match=message):
            Lion([{"params": parameters(), **options}])
