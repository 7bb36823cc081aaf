"""The choice between kernels and PyTorch: set_backend, backend(), KDFAST_BACKEND."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import kdfast
from kdfast.ops import backend as chooser


def test_blocks_nest_and_restore_after_errors_too():
    assert chooser.current() == "auto"
    with kdfast.backend("torch"):
        with kdfast.backend("triton"):
            assert chooser.current() == "triton"
        with pytest.raises(KeyError), kdfast.backend("triton"):
            raise KeyError
        assert chooser.current() == "torch"
    assert chooser.current() == "auto"


def test_set_backend_is_for_the_process():
    try:
        kdfast.set_backend("torch")
        assert chooser.current() == "torch"
    finally:
        kdfast.set_backend("auto")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="set_backend: name must be one of auto, triton, torch, got 'cuda'"):
        kdfast.set_backend("cuda")
    with pytest.raises(ValueError, match="backend: name must be one of"), kdfast.backend("cuda"):
        pass


def test_the_environment_variable():
    code = "from kdfast.ops.backend import current; print(current())"

    def run(value):
        environment = os.environ | {"KDFAST_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("torch").stdout.strip() == "torch"
    assert "the environment variable KDFAST_BACKEND must be one of" in run("nonsense").stderr


@pytest.mark.parametrize(
    ("value", "interpreted"), [("1", True), ("true", True), ("on", True), ("yes", True), ("0", False), ("false", False)]
)
def test_triton_interpret_is_read_as_triton_reads_it(value, interpreted):
    pytest.importorskip("triton", reason="Triton is not installed")
    code = "from triton import knobs; from kdfast.ops.backend import INTERPRETED; print(INTERPRETED, knobs.runtime.interpret)"
    environment = os.environ | {"TRITON_INTERPRET": value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(interpreted)] * 2


def test_which_tensors_a_kernel_takes(monkeypatch):
    module = SimpleNamespace()
    monkeypatch.setattr(chooser, "_kernel_module", lambda operator: module)
    x, labels = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(chooser, "INTERPRETED", False)
    assert chooser.kernel("any", x) is None
    with pytest.raises(RuntimeError, match=r"any: the backend is 'triton'.*torch\.float32 on cpu"), kdfast.backend("triton"):
        chooser.kernel("any", x)
    monkeypatch.setattr(chooser, "INTERPRETED", True)
    assert chooser.kernel("any", x, labels) is module
    assert chooser.kernel("any", x.double(), labels) is None
    with kdfast.backend("torch"):
        assert chooser.kernel("any", x) is None
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="other: the backend is 'triton', but there is no Triton kernel"), kdfast.backend("triton"):
        chooser.kernel("other", x)
