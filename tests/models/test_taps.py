"""Feature taps: the right tensor under the right name, in all the ways a model is run; never a wrong one silently."""

import copy

import pytest
import torch
from torch import nn

from kdfast.models import Taps, create, tap_shapes


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 2))


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def check_taps(taps, net, x):
    """The taps 2, 0 and 3:input against the layers called one by one."""
    first = net[0](x)
    second = net[2](net[1](first))
    output, features = taps(x)
    for ours, exact in zip((output, *features), (net[3](second), second, first, second), strict=True):
        torch.testing.assert_close(ours, exact)


PATHS = ("2", "0", "3:input")


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_outputs_and_inputs_in_the_order_of_the_paths(net, mode):
    others, x = Taps(net, ("0",)), torch.randn(3, 4)
    with mode():
        check_taps(Taps(net, PATHS), net, x)
        assert torch.equal(others(x)[1][0], net[0](x)), "of the same model"


@pytest.mark.parametrize("outside", [True, False], ids=["Taps compiled", "model compiled"])
def test_taps_compile_to_one_graph(net, outside):
    torch._dynamo.reset()
    if outside:
        taps = torch.compile(Taps(net, PATHS), fullgraph=True, backend="aot_eager")
    else:
        taps = Taps(torch.compile(net, fullgraph=True, backend="aot_eager"), PATHS)
    for _ in range(2):
        check_taps(taps, net, torch.randn(3, 4))
    taps(torch.randn(3, 4))[1][0].sum().backward()
    assert net[0].weight.grad.any()


def test_a_model_that_was_compiled_and_run_before_is_an_error(net):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(3, 4)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"'2' did not run .*compiled before it was tapped"):
        Taps(compiled, PATHS)(x)


def test_a_deep_copy_taps_its_own_model(net):
    taps = Taps(net, PATHS)
    twin = copy.deepcopy(taps)
    with torch.no_grad():
        twin.model[0].weight.zero_()
    check_taps(twin, twin.model, torch.randn(3, 4))
    check_taps(taps, net, torch.randn(3, 4))
    del taps
    check_taps(twin, twin.model, torch.randn(3, 4))
    assert count_hooks(net) == 0


def test_taps_share_the_models_parameters_and_leave_no_trace(net):
    keys = list(net.state_dict())
    taps = Taps(net, PATHS)
    assert list(taps.parameters()) == list(net.parameters())
    assert list(taps.state_dict()) == [f"model.{key}" for key in keys]
    assert list(net.state_dict()) == keys
    with pytest.raises(RuntimeError):
        taps(torch.randn(3, 7))
    check_taps(taps, net, torch.randn(3, 4))
    assert not taps._calls, "features must not outlive the call"
    del taps
    assert count_hooks(net) == 0


def test_an_unknown_path_names_the_nearest():
    model = create("resnet8", 10)
    with pytest.raises(ValueError, match=r"ResNet has no module 'layr2'; the nearest names are .*'layer2'"):
        Taps(model, ["layer1", "layr2"])
    assert count_hooks(model) == 0


class Awkward(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.unused, self.kind = nn.Linear(4, 4), nn.Linear(4, 4), kind
        self.pair = nn.Identity()

    def forward(self, x):
        y = self.layer(input=x)
        if self.kind == "twice":
            y = self.layer(y)
        if self.kind == "in place":
            y.relu_()
        if self.kind == "pair":
            self.pair((y, y))
        return y


@pytest.mark.parametrize(
    ("kind", "path", "error", "message"),
    [
        pytest.param("twice", "layer", RuntimeError, "'layer' runs more than once", id="twice"),
        pytest.param("in place", "layer", RuntimeError, "changes the tensor of 'layer' in place", id="in place"),
        pytest.param("", "unused", RuntimeError, "'unused' did not run", id="unused"),
        pytest.param("pair", "pair", TypeError, "'pair' must be a tensor, got tuple", id="tuple"),
        pytest.param("pair", "pair:input", TypeError, "'pair:input' must be a tensor, got tuple", id="input tuple"),
    ],
)
def test_an_ambiguous_tensor_is_an_error(kind, path, error, message):
    with pytest.raises(error, match=message):
        Taps(Awkward(kind), [path])(torch.randn(3, 4))
    x = torch.randn(3, 4)
    assert Taps(Awkward(""), ["layer:input"])(x=x)[1][0] is x, "a keyword argument is an input"


def test_tap_shapes_changes_nothing():
    model = create("resnet8", 10)
    model.layer2.eval()
    training = [m.training for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert tap_shapes(model, ["layer2", "linear:input"], (3, 32, 32)) == ((32, 16, 16), (64,))
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert count_hooks(model) == 0
