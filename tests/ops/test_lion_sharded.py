"""Lion on sharded parameters is Lion on whole ones: FSDP2 on two real processes, against one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast.optim import Lion
from tests.numeric import DEVICE, error
from tests.processes import in_processes

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"),
    pytest.mark.skipif(DEVICE != "cpu", reason="the processes talk through gloo, on the CPU"),
]

WORLD, STEPS = 2, 4
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.9), "weight_decay": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.1},
    "cautious": {"cautious": True},
    "one by one": {"foreach": False, "cautious": True},
    "kahan": {"rounding": "kahan", "dtype": torch.bfloat16, "max_grad_norm": 0.1},
    "stochastic": {"rounding": "stochastic", "dtype": torch.bfloat16},
}


def network(dtype: torch.dtype) -> nn.Sequential:
    """Shards that are uneven, and one that is empty: the last bias has one element."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 21), nn.ReLU(), nn.Linear(21, 5), nn.ReLU(), nn.Linear(5, 1)).to(dtype)


def loss(net: nn.Module, step: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 9, generator=draw).to(dtype), torch.randn(16, 1, generator=draw).to(dtype)
    return (net(x) - y).square().mean()


def trained(net: nn.Module, options: dict[str, Any], steps: range = range(STEPS), loaded: dict[str, Any] | None = None) -> Lion:
    dtype = next(net.parameters()).dtype
    optimizer = Lion(net.parameters(), **{**SETTINGS, **{k: v for k, v in options.items() if k != "dtype"}})
    if loaded is not None:
        optimizer.load_state_dict(loaded)
    for step in steps:
        loss(net, step, dtype).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(rank: int, world: int) -> dict[str, Any]:
    """What the cases come to on sharded parameters, and the text of an error."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {}
    for name, options in CASES.items():
        dtype = options.get("dtype", torch.float32)
        net, again, once = (fully_shard(network(dtype), mesh=mesh) for _ in range(3))
        optimizer = trained(net, options)
        trained(again, options, range(2, STEPS), trained(again, options, range(2)).state_dict())
        trained(once, options, range(1))
        results[name] = {
            "parameters": [whole(p.detach()) for p in net.parameters()],
            "momenta": [whole(optimizer.state[p]["exp_avg"]) for p in net.parameters()],
            "resumed": [whole(p.detach()) for p in again.parameters()],
            "after one step": [whole(p.detach()) for p in once.parameters()],
            "kinds": sorted({type(t).__name__ for p in net.parameters() for k, t in optimizer.state[p].items() if k != "step"}),
        }
    net = fully_shard(network(torch.float32), mesh=mesh)
    loss(net, 0, torch.float32).backward()
    with pytest.raises(TypeError) as refused:
        Lion(net.parameters(), momentum_dtype=torch.int8).step()
    return results | {"int8": str(refused.value)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = in_processes(sharded, WORLD, tmp_path_factory.mktemp("ranks"))
    assert all(torch.equal(a, b) for name in CASES for a, b in zip(first[name]["parameters"], second[name]["parameters"]))
    return first


@pytest.mark.parametrize("name", [name for name in CASES if name != "stochastic"])
def test_shards_are_stepped_as_the_whole(name, results):
    options = CASES[name]
    dtype = options.get("dtype", torch.float32)
    net = network(dtype)
    optimizer = trained(net, options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for p, shards, momentum in zip(net.parameters(), results[name]["parameters"], results[name]["momenta"]):
        assert error(shards, p) <= tolerance
        assert error(momentum, optimizer.state[p]["exp_avg"]) <= tolerance


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_sharded_run_has_the_same_bits(name, results):
    assert all(torch.equal(a, b) for a, b in zip(results[name]["parameters"], results[name]["resumed"]))


def test_state_is_sharded_as_parameters_are(results):
    assert all(results[name]["kinds"] == ["DTensor"] for name in CASES)


def test_shards_are_rounded_up_or_down_each_with_noise_of_its_own(results):
    net = network(torch.bfloat16)
    trained(net, CASES["stochastic"], range(1))
    pairs = list(zip(net.parameters(), results["stochastic"]["after one step"]))
    assert all(error(shards, p) <= 2**-7 for p, shards in pairs)
    first = [(p[:11], shards[:11]) for p, shards in pairs[:1]]  # of rank 0, whose noise is the whole's
    assert all(torch.equal(a.detach(), b) for a, b in first)
    assert any(not torch.equal(p.detach(), shards) for p, shards in pairs)


def test_momenta_of_8_bits_are_refused_by_name(results):
    assert "momentum_dtype=torch.int8 needs unsharded" in results["int8"]
