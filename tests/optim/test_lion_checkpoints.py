"""Lion's groups and state after round trips, in torch.distributed.checkpoint, and states that are another optimizer's or formula's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from kdfast.optim import Lion

OTHERS = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "params": [0]}


def make(cls=Lion, steps=1, **options):
    """A network of one weight [2, 3], and its optimizer after some steps on a gradient of ones."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = cls(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    return model, optimizer


def reload(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


@pytest.mark.parametrize(
    "travel",
    [
        pytest.param(reload, id="load_state_dict"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
    ],
)
def test_groups_and_state_are_the_same_after_a_round_trip(travel):
    _, optimizer = make(momentum_dtype=torch.float32, weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    after = travel(optimizer)
    assert after.state_dict()["param_groups"] == before["param_groups"]
    assert str(after.state_dict()["state"]) == str(before["state"])
    after.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert after.param_groups[1].keys() == after.param_groups[0].keys()


def test_state_of_no_parameter_is_kept():
    _, optimizer = make()
    optimizer.state["epoch"] = 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["epoch"] == 3


@pytest.mark.parametrize("steps", [0, 1], ids=["new", "stepped"])
@pytest.mark.parametrize("name", [name for name in OTHERS if hasattr(torch.optim, name)])
def test_states_of_other_optimizers_are_refused(name, steps):
    options = {"momentum": 0.9} if name == "SGD" else {}
    _, other = make(getattr(torch.optim, name), steps, **options)
    _, optimizer = make()
    with pytest.raises(ValueError, match="the state must be a Lion's, got another optimizer's"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        pytest.param({"corrected_weight_decay": True}, {}, "another formula", id="timm, corrected"),
        pytest.param({"fixed_decay": True, "weight_decouple": True}, {}, "fixed_decay=True is of another formula", id="fixed decay"),
        pytest.param({"weight_decouple": False}, {}, "weight_decouple=False is of another formula", id="coupled decay"),
        pytest.param({"weight_decouple": True, "cautious": True}, {}, "another cautious formula", id="pytorch_optimizer, cautious"),
        pytest.param({"cautious_factor": 0.5, "cautious_wd": False}, {}, "another cautious formula", id="cautious factor"),
        pytest.param({"cautious_factor": 0.0, "cautious_wd": True}, {}, "cautious_wd=True is of another formula", id="cautious decay"),
        pytest.param({"eps": 0.0, "alpha": 0.0}, {"state1": torch.ones(2, 3)}, "another optimizer's", id="bitsandbytes"),
        pytest.param({}, {"exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}, "got exp_avg_sq of parameter 0", id="Lamb"),
    ],
)
def test_other_formulas_are_refused(options, state, message):
    _, optimizer = make()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({"state": {0: state} if state else {}, "param_groups": [{**GROUP, **options}]})


@pytest.mark.parametrize(("factor", "cautious"), [(0.0, True), (1.0, False)])
def test_the_cautious_lion_of_lion_pytorch_is_taken_over(factor, cautious):
    _, optimizer = make()
    optimizer.load_state_dict({"state": {}, "param_groups": [{**GROUP, "cautious_factor": factor, "cautious_wd": False}]})
    assert optimizer.param_groups[0]["cautious"] is cautious


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="plain"),
        pytest.param({"full_state_dict": True}, id="full"),
        pytest.param({"cpu_offload": True}, id="offload"),
        pytest.param({"flatten_optimizer_state_dict": True}, id="flattened"),
    ],
)
def test_distributed_checkpoints_hold_and_load_it_twice(how):
    options = StateDictOptions(**how)
    model, optimizer = make(momentum_dtype=torch.float32)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    for _ in range(2):
        model, loaded = make(steps=0, momentum_dtype=torch.float32)
        set_optimizer_state_dict(model, loaded, copy.deepcopy(saved), options=options)
        set_optimizer_state_dict(model, loaded, copy.deepcopy(saved), options=options)
        assert torch.equal(loaded.state[model.weight]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    ("momentum_dtype", "expected"), [pytest.param(None, 0.8047, id="bfloat16"), pytest.param(torch.float32, 0.9820, id="float32")]
)
def test_a_bfloat16_momentum_stops_within_20_percent_of_a_constant_gradient(momentum_dtype, expected):
    """The docstring of Lion recommends float32 momenta for this reason; 400 steps, beta2 0.99, gradient 1."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Lion([weight], lr=1e-6, momentum_dtype=momentum_dtype)
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.state[weight]["exp_avg"].item() == pytest.approx(expected, abs=1e-4)
