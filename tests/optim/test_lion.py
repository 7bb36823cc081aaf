"""Lion keeps torch.optim's contracts: state, groups, schedulers, closures, loss scaling, clipping, compilation, errors."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kdfast.ops.lion import eager, int8
from kdfast.optim import Lion
from kdfast.optim import lion as optim
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


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": FP32, "dtype": BF16}, KAHAN, {**STOCHASTIC, "momentum_dtype": FP32}, INT8, {**INT8, "dtype": BF16}],
    ids=str,
)
def test_a_state_dict_that_went_through_a_file_continues_with_the_same_bits(options):
    params, optimizer = run_steps(3, [(64, 64), (10,), (), (0, 3)], **options)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copies = twins(params)
    loaded = Lion(copies, lr=1.0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.param_groups[0]["lr"] == SETTINGS["lr"]
    assert bits_equal(momenta(optimizer, params), momenta(loaded, copies))
    for _ in range(2):
        give_gradients(params, copies)
        optimizer.step()
        loaded.step()
    assert bits_equal(params, copies)


def test_copies_and_pickles_continue_with_the_same_bits():
    options = {"decoupled_weight_decay": True, "max_grad_norm": 1.0}
    params, optimizer = run_steps(2, [(5, 5)], **options)
    for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        original = twins(params)
        other = Lion(original, **SETTINGS, **options)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give_gradients(clone.param_groups[0]["params"], original)
        clone.step()
        other.step()
        assert bits_equal(clone.param_groups[0]["params"], original)
        assert clone._step_supports_amp_scaling


def test_the_pickle_of_an_older_version_gets_the_later_options():
    _, optimizer = run_steps(1, [(3,)])
    state = copy.deepcopy(optimizer.__getstate__())
    for options in (state["defaults"], *state["param_groups"]):
        del options["cautious"], options["rounding"], options["max_grad_norm"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["cautious"] is False
    assert optimizer.param_groups[0]["rounding"] == "nearest"


COMMON = {"lr": 2e-3, "weight_decay": 0.2, "params": [0, 1]}
OPTIMI = {"beta1": 0.8, "beta2": 0.9, "decouple_lr": False, "max_lr": None, "kahan_sum": False, "foreach": True}


@pytest.mark.parametrize(
    ("group", "state", "options"),
    [
        pytest.param({"betas": (0.8, 0.9)}, {}, {}, id="lion_pytorch and google"),
        pytest.param({"betas": (0.8, 0.9), "caution": True, "foreach": None}, {}, {"cautious": True}, id="timm"),
        pytest.param({**OPTIMI, "gradient_release": False, "setup": True}, {"kahan_comp": None}, {}, id="optimi"),
    ],
)
def test_checkpoints_of_other_lions_load(group, state, options):
    params, optimizer = run_steps(2, [(5, 5), (3,)])
    saved = {i: {"exp_avg": m.clone(), **state} for i, m in enumerate(momenta(optimizer, params))}
    copies = twins(params)
    loaded, want = Lion(copies), Lion(params, lr=2e-3, weight_decay=0.2, betas=(0.8, 0.9), **options)
    loaded.load_state_dict({"state": saved, "param_groups": [{**COMMON, **group}]})
    want.load_state_dict({"state": optimizer.state_dict()["state"], "param_groups": want.state_dict()["param_groups"]})
    give_gradients(params, copies)
    loaded.step()
    want.step()
    assert bits_equal(params, copies)


def test_options_of_foreign_checkpoints_keep_their_meaning():
    params, optimizer = run_steps(1, [(5, 5)])
    saved = {0: {"exp_avg": optimizer.state[params[0]]["exp_avg"]}}
    loaded = Lion(twins(params), rounding="stochastic")
    optimi = {**COMMON, **OPTIMI, "decouple_lr": True, "max_lr": 1e-3, "kahan_sum": None, "params": [0]}
    loaded.load_state_dict({"state": saved, "param_groups": [optimi]})
    got = loaded.param_groups[0]
    assert (got["decoupled_weight_decay"], got["init_lr"]) == (True, 1e-3)  # decays by weight_decay lr / max_lr
    assert (got["foreach"], got["rounding"]) == (None, "stochastic")
    loaded.load_state_dict({"state": saved, "param_groups": [{**optimi, "kahan_sum": True}]})
    assert loaded.param_groups[0]["rounding"] == "kahan"


def test_a_state_dict_of_lion_pytorch_continues_with_its_bits():
    theirs = parameters()
    ours = twins(theirs)
    a, b = peers().Lion(theirs, **SETTINGS), Lion(ours)
    give_gradients(theirs, ours)
    a.step()
    with torch.no_grad():
        for p, q in zip(theirs, ours):
            q.copy_(p)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    give_gradients(theirs, ours)
    a.step()
    b.step()
    assert bits_equal(theirs, ours)


def state_of(optimizer, **options):
    return optimizer([nn.Parameter(torch.ones(5, 5))], lr=0.1, **options).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(state_of(torch.optim.AdamW), "the state must be a Lion's, got Adam's or AdamW's", id="AdamW"),
        pytest.param(state_of(torch.optim.SGD), "the state must be a Lion's, got SGD's", id="SGD"),
        pytest.param(
            {"state": {0: {"exp_avg": torch.ones(5)}}}, r"exp_avg must have its parameter's shape \(5, 5\), got \(5,\)", id="shape"
        ),
        pytest.param(
            {"state": {0: {"exp_avg": torch.ones(5, 5, dtype=torch.int8)}}},
            "exp_avg of parameter 0 is torch.int8.*exp_avg_scale is needed",
            id="no scale",
        ),
        pytest.param(
            {"param_groups": [{**COMMON, "betas": (0.9, 0.99), "corrected_weight_decay": True, "params": [0]}]},
            "corrected_weight_decay",
            id="timm's other formula",
        ),
    ],
)
def test_states_that_mean_something_else_are_refused(change, message):
    params, optimizer = run_steps(1, [(5, 5)])
    before = optimizer.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**optimizer.state_dict(), **change})
    if "shape" not in message:
        assert torch.equal(optimizer.state[params[0]]["exp_avg"], before)


def test_hooks_around_loading_see_and_change_the_state():
    params, optimizer = run_steps(2, [(5, 5), (5, 5)])
    loaded = Lion(twins(params))
    loaded.register_load_state_dict_pre_hook(lambda _, s: {**s, "state": {0: s["state"][1], 1: s["state"][0]}})  # swaps the two
    loaded.register_load_state_dict_post_hook(lambda o: o.state[o.param_groups[0]["params"][0]]["exp_avg"].zero_())
    loaded.load_state_dict(optimizer.state_dict())
    first, second = momenta(loaded, loaded.param_groups[0]["params"])
    assert not first.any()
    assert torch.equal(second, optimizer.state[params[0]]["exp_avg"])


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor([3.0], dtype=FP64)], ids=str)
def test_a_loaded_step_of_any_kind_counts_on(step):
    params, optimizer = run_steps(3, [(70, 70)], **STOCHASTIC)
    copies = twins(params)
    loaded = Lion(copies)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    loaded.load_state_dict(saved)
    give_gradients(params, copies)
    optimizer.step()
    loaded.step()
    assert bits_equal(params, copies)
    assert loaded.state[copies[0]]["step"] == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("saved_as", [torch.int8, None], ids=str)
@pytest.mark.parametrize("loaded_as", [torch.int8, None], ids=str)
def test_momenta_load_from_any_dtype_and_layout_into_any_other(saved_as, loaded_as, layout):
    params, optimizer = run_steps(3, [(40, 30, 2, 2), (7,)], momentum_dtype=saved_as)
    copies = [nn.Parameter(p.detach().clone(memory_format=layout if p.dim() == 4 else torch.preserve_format)) for p in params]
    loaded = Lion(copies)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["momentum_dtype"] = loaded_as
    loaded.load_state_dict(saved)

    def values(optimizer, p):
        state = optimizer.state[p]
        return int8.decode(state["exp_avg"], state["exp_avg_scale"]) if "exp_avg_scale" in state else state["exp_avg"]

    assert loaded.state[copies[0]]["exp_avg"].dtype == (loaded_as or FP32)
    assert ("exp_avg_scale" in loaded.state[copies[0]]) == (loaded_as is not None)
    assert error(values(loaded, copies[0]), values(optimizer, params[0])) < (0.02 if loaded_as else 1e-6)
    assert torch.equal(values(loaded, copies[1]), values(optimizer, params[1]))
    give_gradients(params, copies)
    optimizer.step()
    loaded.step()
    if saved_as is loaded_as is None:
        assert all(map(torch.equal, params, copies))


def test_a_compensation_follows_its_parameters_dtype():
    p = nn.Parameter(torch.ones(5, dtype=BF16))
    optimizer = Lion([p], rounding="kahan", momentum_dtype=FP32)
    for dtype in (BF16, FP16):
        p.grad = None
        p.data = p.data.to(dtype)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["kahan_comp"].dtype == FP16
    assert (p - 1).abs().max() < 1e-2


@pytest.mark.parametrize("options", [{}, KAHAN, {**STOCHASTIC, **INT8}], ids=str)
def test_state_follows_a_parameter_to_another_device(options):
    """As after model.to(device): the meta device stands for a GPU."""
    (p,), optimizer = run_steps(1, [(5000,)], **options)
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(torch.zeros(5000, dtype=p.dtype, device="meta")))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {t.device.type for t in optimizer.state[p].values()} == {"meta"}


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(FP32)


@pytest.mark.parametrize(
    ("set_default", "value"),
    [(default_dtype, BF16), (default_dtype, FP64), (torch.device, "meta")],
    ids=["bfloat16", "float64", "meta device"],
)
@pytest.mark.parametrize("options", [{}, INT8, STOCHASTIC], ids=str)
def test_default_dtype_and_device_change_nothing(set_default, value, options):
    want, _ = run_steps(2, [(90, 90), (3,)], **options)
    params, _ = run_steps(2, [(90, 90), (3,)], within=lambda: set_default(value), **options)
    assert bits_equal(params, want)


# ---- groups, rates, closures -----------------------------------------------------------------------------------------


def test_an_added_group_takes_its_own_options_and_the_optimizers_others():
    params = parameters([(4,), (4,)])
    optimizer = Lion(params[:1], **SETTINGS)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5, "weight_decay": 0.0})
    before = params[1].detach().clone()
    params[1].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(params[1], before - 0.5)
    assert optimizer.param_groups[1]["betas"] == SETTINGS["betas"]


def test_named_parameters_and_generators_are_accepted():
    net = nn.Linear(3, 2)
    assert Lion(net.named_parameters()).param_groups[0]["param_names"] == ["weight", "bias"]
    assert len(Lion(p for p in net.parameters()).param_groups[0]["params"]) == 2


def test_the_positions_and_defaults_are_lion_pytorchs():
    group = Lion(parameters(), 1e-3, (0.8, 0.9), 0.1, True, True).param_groups[0]  # use_triton is ignored
    assert (group["lr"], group["betas"], group["weight_decay"], group["decoupled_weight_decay"]) == (1e-3, (0.8, 0.9), 0.1, True)
    default = Lion(parameters()).param_groups[0]
    assert (default["lr"], default["betas"], default["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)
    assert run_steps(1)[1].state_dict()["state"][0].keys() == {"exp_avg"}


def test_numbers_of_other_types_are_accepted():
    np = pytest.importorskip("numpy")
    results = []
    for lr, betas in (
        (0.5, (0.9, 0.99)),
        (np.float32(0.5), (torch.tensor(0.9, dtype=FP64), 0.99)),
        (torch.tensor([0.5]), [0.9, 0.99]),
    ):
        p = nn.Parameter(torch.ones(5))
        p.grad = torch.arange(5.0)
        optimizer = Lion([p], lr=lr, betas=betas, weight_decay=np.float64(0.1))
        optimizer.step()
        results.append([p, *state_tensors(optimizer)])
    assert bits_equal(results[0], results[1])
    assert bits_equal(results[0], results[2])


@pytest.mark.parametrize("foreach", [None, False])
def test_a_tensor_lr_may_change_in_place(foreach):
    lr = torch.tensor(0.5)
    p = nn.Parameter(torch.zeros(3))
    optimizer = Lion([p], lr=lr, foreach=foreach)
    p.grad = torch.ones(3)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert p.tolist() == [-0.75] * 3


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda t: 1 / (t + 1)},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-3, "max_lr": 1e-2, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1e-2, "total_steps": 8},
    "ReduceLROnPlateau": {"patience": 0},
}


@by_kernel
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_drives_it(name, tensor_lr):
    p = nn.Parameter(torch.zeros(1))
    optimizer = Lion([p], lr=torch.tensor(1e-2) if tensor_lr else 1e-2)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
    rates = []
    for _ in range(6):
        before = p.item()
        p.grad = torch.ones(1)
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        assert before - p.item() == pytest.approx(lr, rel=1e-3, abs=1e-8)
        rates.append(lr)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len({round(r, 9) for r in rates}) > 1


def test_a_sequence_of_schedulers_drives_it():
    optimizer = Lion([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler
    sequence = schedule.SequentialLR(
        optimizer, [schedule.ConstantLR(optimizer, 0.1), schedule.ExponentialLR(optimizer, 0.5)], milestones=[2]
    )
    for _ in range(3):
        optimizer.step()
        sequence.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert p.item() == 1.5
    assert optimizer.step() is None


def test_hooks_run_before_and_after_a_step():
    _, optimizer = run_steps(0)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_maximize_has_the_bits_of_negated_gradients():
    up = parameters()
    down = twins(up)
    a, b = Lion(up, maximize=True, **SETTINGS), Lion(down, **SETTINGS)
    for _ in range(3):
        give_gradients(up, down)
        for p in down:
            p.grad.neg_()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(up, down))


# ---- loss scaling and clipping ---------------------------------------------------------------------------------------


def test_grad_scaler_unscales_within_the_step():
    plain = parameters()
    scaled = twins(plain)
    a, b = Lion(plain, **SETTINGS), Lion(scaled, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        give_gradients(plain, scaled)
        for p in scaled:
            p.grad.mul_(2.0**10)
        scaler.scale(torch.ones(()))
        a.step()
        scaler.step(b)
        scaler.update()
    assert bits_equal(plain, scaled)
    assert not hasattr(b, "found_inf")


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
    params[0].grad[0, 0, 0, 0] = float("inf")
    params[1].grad[0, 0] = float("nan")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert bits_equal(before, [*params, *state_tensors(optimizer)])
    scaler.update()
    give_gradients(params)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert not bits_equal(before[:1], params[:1])


def test_infinities_found_on_several_devices_skip_one_step():
    """GradScaler adds up what devices found."""
    params, optimizer = run_steps(1, [(70, 70)], **STOCHASTIC)
    optimizer.found_inf = torch.tensor([2.0])
    give_gradients(params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_within_the_step_equals_clip_grad_norm(max_norm):
    inside = parameters()
    before = twins(inside)
    a, b = (
        Lion([{"params": ps[:2]}, {"params": ps[2:], "lr": 1e-2}], **SETTINGS, max_grad_norm=norm)
        for ps, norm in ((inside, max_norm), (before, None))
    )
    for _ in range(3):
        give_gradients(inside, before)
        original = [p.grad.clone() for p in inside]
        a.step()
        assert bits_equal(original, [p.grad for p in inside])  # gradients are not written
        nn.utils.clip_grad_norm_(before, max_norm)
        b.step()
    assert bits_equal(inside, before)
    assert bits_equal(momenta(a, inside), momenta(b, before))


def test_clipping_sees_unscaled_gradients_and_leaves_groups_without_it_alone():
    clipped, free = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    optimizer = Lion([{"params": [clipped]}, {"params": [free], "max_grad_norm": None}], max_grad_norm=1.0, betas=(0.9, 0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    clipped.grad, free.grad = torch.full((4,), 16.0), torch.full((4,), 16.0)
    scaler.step(optimizer)
    assert torch.allclose(optimizer.state[clipped]["exp_avg"], torch.full((4,), 0.5))  # norm 4 after unscaling, down to 1
    assert torch.equal(optimizer.state[free]["exp_avg"], torch.full((4,), 2.0))


def test_gradients_that_require_grad_make_no_graph(monkeypatch):
    """As gradients of create_graph=True do."""
    recorded = []
    monkeypatch.setattr(optim, "grad_norm", lambda grads: recorded.append(torch.is_grad_enabled()) or eager.grad_norm(grads))
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.125, max_grad_norm=1.0)
    for _ in range(5):
        p.grad = torch.ones(4, requires_grad=True) * 2
        optimizer.step()
    assert recorded == [False] * 5
    assert not optimizer.state[p]["exp_avg"].requires_grad
    assert p.tolist() == [0.375] * 4


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_sparse_gradients_are_refused(max_grad_norm):
    p = nn.Parameter(torch.eye(3).bfloat16())
    p.grad = torch.eye(3).bfloat16().to_sparse()
    with pytest.raises(RuntimeError, match="must be dense and real, got a sparse"):
        Lion([p], max_grad_norm=max_grad_norm).step()


def test_complex_gradients_are_refused():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="must be dense and real, got a complex"):
        Lion([p]).step()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(FP64, {}), (BF16, {"rounding": "kahan"}), (FP16, {}), (FP32, {"cautious": True})],
    ids=str,
)
def test_fused_without_a_kernel_is_refused(dtype, options, form):  # noqa: F811
    if KERNELS and dtype != FP64:
        pytest.skip("Triton's kernel takes these")
    expected = rf"fused=True needs the Triton kernel.*{dtype} parameters on \w+ \(backend '{form}'\); leave fused=None"
    with pytest.raises(RuntimeError, match=expected):
        run_steps(1, dtype=dtype, fused=True, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        pytest.param({"capturable": True}, RuntimeError, "capturable=True needs parameters on cuda", id="capturable on a CPU"),
        pytest.param({**INT8, "dtype": FP64}, TypeError, r"torch.int8 needs unsharded.*got float64", id="int8 and float64"),
    ],
)
def test_options_that_do_not_fit_the_parameters_are_refused(options, kind, message):
    with torch.device("cpu"), pytest.raises(kind, match=message):
        run_steps(1, **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0"),
        ({"lr": "a"}, TypeError, "lr must be a number, got 'a'"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a number, got None"),
        ({"betas": 0.9}, ValueError, r"betas must be two numbers in \[0, 1\], got 0.9"),
        ({"lr": -1.0}, ValueError, "lr must be positive, got -1"),
        ({"lr": float("nan")}, ValueError, "lr must be positive, got nan"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element"),
        ({"betas": (0.9, 1.1)}, ValueError, r"betas must be two numbers in \[0, 1\]"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"rounding": "up"}, ValueError, "rounding must be one of nearest, stochastic, kahan, got 'up'"),
        ({"momentum_dtype": torch.int32}, TypeError, "momentum_dtype must be a floating torch.dtype, torch.int8 or None"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"fused": True, "foreach": True}, ValueError, "cannot both be True"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        Lion(parameters(), **options)
    if options.get("lr") is None:
        with pytest.raises(kind, match=message):
            Lion([{"params": parameters(), **options}])
