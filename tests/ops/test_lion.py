"""Values of the Lion step: lion-pytorch's bits in float32, the reference in float64, every dtype, layout and rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdfast import reference
from kdfast.ops.lion import eager, int8
from kdfast.ops.lion.rows import Row, share_memory
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
    twins,
    use_large_blocks,
)
from tests.numeric import INTERPRETED, error

pytestmark = pytest.mark.kernels

INT8 = {"momentum_dtype": torch.int8}
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDINGS = ("nearest", "stochastic", "kahan")


# ---- lion-pytorch's bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("foreach", "memory_format"),
    [(None, torch.contiguous_format), (None, torch.channels_last), (False, torch.channels_last)],
    ids=["contiguous", "channels_last", "one by one"],
)
def test_steps_on_resnet18_have_the_bits_of_lion_pytorch(foreach, memory_format, monkeypatch):
    if INTERPRETED:
        use_large_blocks(monkeypatch)
    torchvision = pytest.importorskip("torchvision", reason="steps its ResNet-18")
    theirs = list(torchvision.models.resnet18().to(memory_format=memory_format).parameters())
    ours = twins(theirs)
    a, b = peers().Lion(theirs, **SETTINGS), Lion(ours, foreach=foreach, **SETTINGS)
    for _ in range(2):
        give_gradients(theirs[4:], ours[4:])  # the first are never used
        a.step()
        b.step()
    assert bits_equal(theirs, ours)
    assert bits_equal(momenta(a, theirs[4:]), momenta(b, ours[4:]))
    assert len(b.state) == len(ours) - 4


@pytest.mark.parametrize(
    "options",
    [{}, {"decoupled_weight_decay": True}, {"betas": (0.0, 1.0)}, {"betas": (1.0, 0.0)}, {"weight_decay": 0.0}, {"cautious": True}],
    ids=str,
)
def test_options_of_lion_pytorch_give_its_bits(options):
    peers()
    from lion_pytorch.cautious_lion import Lion as CautiousLion

    theirs = parameters([(64, 3, 7, 7), (10, 512), (10,), (1,), (129, 257)])
    ours = twins(theirs)
    original = CautiousLion if "cautious" in options else peers().Lion
    a, b = (
        make([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2, "weight_decay": 0.3}], **{**SETTINGS, **chosen})
        for make, params, chosen in ((original, theirs, {k: v for k, v in options.items() if k != "cautious"}), (Lion, ours, options))
    )
    for _ in range(4):
        give_gradients(theirs, ours)
        a.step()
        b.step()
    assert bits_equal(theirs, ours)
    assert bits_equal(momenta(a, theirs), momenta(b, ours))


def test_recorded_values_of_the_original_are_met(oracles):
    params = [nn.Parameter(torch.tensor(oracles[f"lion/init{i}"])) for i in range(5)]
    betas = (float(oracles["lion/beta1"]), float(oracles["lion/beta2"]))
    optimizer = Lion(params, lr=float(oracles["lion/lr"]), betas=betas, weight_decay=float(oracles["lion/weight_decay"]))
    for step in range(int(oracles["lion/steps"])):
        for i, p in enumerate(params):
            p.grad = torch.tensor(oracles[f"lion/step{step}/grad{i}"])
        optimizer.step()
    assert bits_equal(params, [torch.tensor(oracles[f"lion/final{i}"]) for i in range(5)])
    assert bits_equal(momenta(optimizer, params), [torch.tensor(oracles[f"lion/exp_avg{i}"]) for i in range(5)])


# ---- the reference ---------------------------------------------------------------------------------------------------


def check_against_reference(data: st.DataObject) -> None:
    """Steps any sizes, strides, dtypes and options, and compares with the reference in float64."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([FP32, FP64, BF16, FP16]))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=5))
    options = {
        "lr": data.draw(st.sampled_from([1e-4, 3e-2])),
        "betas": data.draw(st.sampled_from([(0.9, 0.99), (0.0, 0.5), (1.0, 1.0)])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.1])),
        "cautious": data.draw(st.booleans()),
        "maximize": data.draw(st.booleans()),
    }
    decoupled = data.draw(st.booleans())
    momentum_dtype = data.draw(st.sampled_from([None, FP32, BF16]))

    def any_strides(x: Tensor) -> Tensor:
        order = data.draw(st.permutations(range(x.ndim)))
        x = x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
        return torch.stack([x, x], dim=-1)[..., 0] if data.draw(st.booleans()) else x  # also with gaps

    params = [nn.Parameter(any_strides(torch.randn(shape).to(dtype))) for shape in shapes]
    foreach = data.draw(st.sampled_from([None, True, False]))
    optimizer = Lion(params, foreach=foreach, momentum_dtype=momentum_dtype, decoupled_weight_decay=decoupled, **options)
    for _ in range(data.draw(st.sampled_from([2, 4]))):
        for p in params:
            p.grad = any_strides(torch.randn(p.shape).to(dtype))
        before = [(p.detach().clone(), optimizer.state[p].get("exp_avg", torch.zeros_like(p)).clone()) for p in params]
        optimizer.step()
        for p, (old, m) in zip(params, before):
            check_step(p, old.double(), m.double(), optimizer, options, options["lr"] if decoupled else None)
            assert optimizer.state[p]["exp_avg"].dtype == (momentum_dtype or dtype)


def check_step(p: Tensor, old: Tensor, m: Tensor, optimizer: Lion, options: dict, init_lr: float | None) -> None:
    grad, beta1 = p.grad.double(), options["betas"][0]
    want_p, want_m = reference.lion_step(old, grad, m, **options, init_lr=init_lr)
    terms = beta1 * m, (beta1 - 1 if options["maximize"] else 1 - beta1) * grad
    undecided = (sum(terms).abs() <= 1e-6 * sum(t.abs() for t in terms)) & (terms[1] != 0)  # rounding decides the sign
    if options["cautious"] and undecided.any():
        return
    tolerance = {FP64: 1e-12, FP32: 1e-6, BF16: 2**-8, FP16: 2**-10}
    assert_near(p, torch.where(undecided, p.detach().double(), want_p), tolerance[p.dtype], old)
    got_m = optimizer.state[p]["exp_avg"]
    assert_near(got_m, want_m, max(tolerance[got_m.dtype], 1e-6 if p.dtype != FP64 else 0), grad, m)


def assert_near(ours: Tensor, exact: Tensor, tolerance: float, *terms: Tensor) -> None:
    """Within tolerance of the largest term that it was summed from: terms may cancel."""
    assert ours.shape == exact.shape
    if ours.numel():
        scale = max(t.abs().max() for t in (exact, *terms))
        assert (ours.detach().double() - exact).abs().max() <= tolerance * scale


@settings(max_examples=30 if INTERPRETED else 60)
@given(data=st.data())
def test_random_steps_follow_the_reference(data):
    check_against_reference(data)


@pytest.mark.slow
@settings(max_examples=300 if INTERPRETED else 1700)
@given(data=st.data())
def test_many_random_steps_follow_the_reference(data):
    check_against_reference(data)


@pytest.mark.parametrize("shapes", [[(4, 5)], [(300, 300)], [(4, 5), (3,), (2, 6), (), (0,), (7,)]], ids=str)
def test_a_nan_gradient_makes_its_parameter_nan_and_no_other(shapes):
    """The one deliberate deviation: torch.sign(NaN) is 0, so the original leaves such a parameter as it is."""
    params, optimizer = run_steps(2, shapes, weight_decay=0.0)
    before = params[0].detach().clone()
    give_gradients(params)
    params[0].grad[1, 2], params[0].grad[0, 1], params[0].grad[0, 2] = float("nan"), float("inf"), -float("inf")
    optimizer.step()
    assert params[0].isnan().nonzero().tolist() == [[1, 2]]
    assert params[0][0, 1] == before[0, 1] - SETTINGS["lr"]  # infinite gradients have a sign
    assert params[0][0, 2] == before[0, 2] + SETTINGS["lr"]
    assert not any(p.isnan().any() for p in params[1:])


def test_the_sign_of_zero_is_zero_and_subnormal_updates_count():
    p = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, -0.0, 0.0]))
    p.grad = torch.tensor([0.0, -0.0, 1e-40, -1e-40, -0.0, -0.0])
    Lion([p], lr=0.25).step()
    assert str(p.tolist()) == "[1.0, 1.0, 0.75, 1.25, -0.0, 0.0]"


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([(0, 40_000), (0, 40_000)], id="the same"),
        pytest.param([(0, 30_000), (20_000, 40_000)], id="overlapping"),
        pytest.param([(0, 40_000), (10_000, 20_000), (30_000, 40_000)], id="parts of one"),
    ],
)
@pytest.mark.parametrize("what", ["parameters", "momenta"])
def test_tensors_that_share_memory_are_stepped_one_after_the_other(spans, what):
    """As weights tied by their .data are: each has its own gradient and momentum."""
    ends = []
    for make in (Lion, peers().Lion):
        torch.manual_seed(0)
        memory = torch.linspace(-1, 1, 40_000)
        shared = [memory[start:end] for start, end in spans]
        params = [nn.Parameter(x if what == "parameters" else x.clone()) for x in (*shared, torch.ones(5))]
        optimizer = make(params, lr=0.1, weight_decay=0.5)
        for p, x in zip(params, shared):
            optimizer.state[p]["exp_avg"] = x if what == "momenta" else torch.zeros_like(p)
        for _ in range(4):
            give_gradients(params)
            optimizer.step()
        ends.append([memory, *params])
        rows = [Row(p, p, optimizer.state[p]["exp_avg"]) for p in params]
        assert share_memory(rows)  # with one thread a kernel may have the same bits by chance
        assert not share_memory(rows[1:2] + rows[-1:])
    assert bits_equal(*ends)


# ---- low precision ---------------------------------------------------------------------------------------------------


def test_bfloat16_decays_with_kahan_and_stochastic_rounding_only():
    """1 - lr wd = 1 - 1e-4 rounds to 1 in bfloat16, and p (1 - 1e-4) rounds back to p."""
    finals = {}
    for rounding in ROUNDINGS:
        p = nn.Parameter(torch.full((2_000 if INTERPRETED else 20_000,), 1.0, dtype=BF16))
        optimizer = Lion([p], lr=1e-3, weight_decay=0.1, rounding=rounding)
        p.grad = torch.zeros_like(p)
        for _ in range(100):
            optimizer.step()
        finals[rounding] = p.detach().float().mean().item()
    exact = (1 - 1e-4) ** 100
    assert finals["nearest"] == 1.0
    assert finals["kahan"] == pytest.approx(exact, abs=2**-9)
    assert finals["stochastic"] == pytest.approx(exact, abs=6e-4 if INTERPRETED else 2e-4)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_kahan_follows_float32(dtype):
    exact = nn.Parameter(torch.randn(20_000).to(dtype).float())
    kahan, nearest = (nn.Parameter(exact.detach().to(dtype)) for _ in range(2))
    options = {"lr": 1e-4, "weight_decay": 0.1, "momentum_dtype": FP32}
    optimizers = [Lion([exact], **options), Lion([kahan], rounding="kahan", **options), Lion([nearest], **options)]
    for _ in range(30):
        exact.grad = torch.randn(20_000).to(dtype).float()
        kahan.grad = nearest.grad = exact.grad.to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    joined = kahan.detach().float() + optimizers[1].state[kahan]["kahan_comp"].float()
    assert error(joined, exact.detach()) < 2e-5 * (8 if dtype == BF16 else 1)
    assert error(joined, exact.detach()) < error(nearest, exact.detach()) / 4


@by_kernel
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_stochastic_rounding_is_unbiased_and_takes_the_two_neighbours(dtype):
    def round_at(x: Tensor, step: int) -> Tensor:
        return eager.round_stochastically(x, dtype, eager.make_noise(Row(x, x, x, step=torch.tensor(float(step)))))

    for value in (1.0009765, -3.14159, 1e-3, 3.0e-6, 2.0e-7, 0.0, 1.0, 65000.0):
        x = torch.full((16,), value)
        rounded = torch.stack([round_at(x, step) for step in range(0, 4000, 8)]).float()
        choices = rounded.unique()
        assert len(choices) <= 2
        assert choices.min() <= x[0] <= choices.max()
        gap = (choices.max() - choices.min()).item()
        assert abs(rounded.double().mean().item() - x[0].item()) <= 4 * gap * (0.25 / rounded.numel()) ** 0.5
    special = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert str(round_at(special, 1).tolist()) == "[nan, inf, -inf]"


def test_stochastic_rounding_depends_on_neither_the_generator_nor_the_form():
    """Replicas of a data-parallel run have different generators and must stay equal."""
    options = {"shapes": [(300, 100), (5,), (3, 1)], "dtype": BF16, "rounding": "stochastic"}
    one, _ = run_steps(3, **options)
    assert bits_equal(one, run_steps(3, **options, foreach=False)[0])
    assert bits_equal(one, run_steps(3, **options, within=torch.random.fork_rng)[0])
    assert not bits_equal(one, run_steps(3, **{**options, "rounding": "nearest"})[0])


# ---- momenta of 8 bits -----------------------------------------------------------------------------------------------


def decode_momentum(optimizer: Lion, param: Tensor) -> Tensor:
    state = optimizer.state[param]
    return int8.decode(state["exp_avg"], state["exp_avg_scale"]) if "exp_avg_scale" in state else state["exp_avg"]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_large_tensors_take_8_bits_and_small_ones_keep_float32(dtype):
    params, optimizer = run_steps(1, [(64, 64), (64, 63), (5,)], dtype, **INT8)
    assert [m.dtype for m in momenta(optimizer, params)] == [torch.int8, FP32, FP32]
    assert optimizer.state[params[0]].keys() == {"exp_avg", "exp_avg_scale", "step"}
    assert optimizer.state[params[0]]["exp_avg_scale"].shape == (16,)


@by_kernel
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("is_random", [False, True])
def test_a_code_is_decoded_to_within_its_step_and_in_the_mean_to_its_value(n, is_random):
    """A level k is sqrt(|m| / scale) 127: neighbours are (2 k + 1) scale / 127^2 apart."""
    m = torch.randn(n) * torch.randn(n).exp()
    noises = [torch.randint(-(2**31), 2**31, (n,)).int() if is_random else None for _ in range(300)]
    codes, scales = zip(*(int8.encode(m, noise) for noise in noises))
    assert codes[0].dtype == torch.int8
    assert scales[0].shape == (int8.count_scales(n),)
    scale = scales[0].repeat_interleave(256)[:n]
    step = (2 * (m.abs() / scale).sqrt() * 127 + 1) * scale / 127**2
    differences = torch.stack([int8.decode(*pair) - m for pair in zip(codes, scales)]).double()
    assert (differences.abs() <= step * (1.0001 if is_random else 0.5001)).all()
    if is_random:
        assert (differences.mean(0).abs() <= 5 * step / 2 / 300**0.5).all()


@by_kernel
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e38])
def test_groups_of_zeros_tiny_and_huge_momenta_stay_finite(value):
    decoded = int8.decode(*int8.encode(torch.full((300,), value), torch.zeros(300, dtype=torch.int32)))
    assert torch.allclose(decoded, torch.full((300,), value if value != 1e-38 else 0.0), rtol=1e-5)


def test_a_decaying_momentum_of_8_bits_does_not_stand_still():
    """To multiply by beta2 changes m by a hundredth, less than half a step of the code: rounding to the nearest would keep it for ever."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = Lion([p], betas=(0.9, 0.99), **INT8)
    p.grad = torch.rand(4096) + 0.5
    optimizer.step()
    start = decode_momentum(optimizer, p)
    p.grad = torch.zeros(4096)
    for _ in range(50):
        optimizer.step()
    assert decode_momentum(optimizer, p).mean() == pytest.approx(start.mean().item() * 0.99**50, rel=0.02)


def test_steps_with_8_bits_follow_float32():
    params = parameters([(100, 100)])
    exact = twins(params)
    a, b = Lion(params, lr=1e-3, **INT8), Lion(exact, lr=1e-3)
    for _ in range(20):
        give_gradients(params, exact)
        a.step()
        b.step()
    assert error(decode_momentum(a, params[0]), b.state[exact[0]]["exp_avg"]) < 0.05
    assert (params[0] - exact[0]).abs().mean() < 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_its_256_parameters_and_nowhere_else(bad):
    p = nn.Parameter(torch.zeros(8192))
    optimizer = Lion([p], **INT8)
    for value in (bad, 0.0):
        p.grad = torch.randn(8192)
        p.grad[300] += value
        optimizer.step()
    assert p.isnan().nonzero().view(-1).tolist() == list(range(256, 512))


# ---- the device decides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_step_decided_on_the_device_has_the_bits_of_the_host(tensor_lr, monkeypatch):
    lr = torch.tensor(2.0**-12) if tensor_lr else 2.0**-12
    host, _ = run_steps(3, lr=lr, cautious=True, max_grad_norm=1.0)
    decide_on_device(monkeypatch)
    device, _ = run_steps(3, lr=lr, cautious=True, max_grad_norm=1.0)
    assert bits_equal(host, device)
