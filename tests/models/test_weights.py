"""Weights on disk: every way a file can be wrong, strict loading, writing that survives failure, others' weights."""

import argparse
import collections
import contextlib
import datetime
import decimal
import enum
import errno
import functools
import gzip
import io
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
import textwrap
import time
import types
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.data import NORMALIZATIONS, LoaderOptions, ResidentLoader, evaluation_transform, load
from kdfast.models import ModelSpec, build, create, load_weights, read_weights, recognize, save_weights
from tests.data.samples import Payload


class Kind(enum.Enum):
    ONE = 1


class Hyperparameters(dict):
    """A dictionary of a class of its own, as training frameworks have them."""


@dataclass
class Options:
    lr: float = 0.1


def pack(archive, mode):
    """An archive of one empty file, or of none."""
    file = io.BytesIO()
    with archive(mode=mode, **{"file" if archive is zipfile.ZipFile else "fileobj": file}) as opened:
        if archive is tarfile.open:
            opened.addfile(tarfile.TarInfo("w.txt"))
    return file.getvalue()


def save_numpy(values):
    file = io.BytesIO()
    np.savez(file, **values) if isinstance(values, dict) else np.save(file, values)
    return file.getvalue()


def save_script():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; its files are still around
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


@pytest.fixture
def model():
    return create("resnet8", 10)


def have_equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def randomize(model):
    """Changes every entry of the model's state, BatchNorm's counters and statistics included."""
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 7)
    return model


class TestReading:
    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    @pytest.mark.parametrize("nesting", [None, "state_dict", "model", "model_state_dict", "net"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
    def test_finds_the_state_dict_under_usual_names(self, tmp_path, nesting, prefix, legacy):
        state = {f"{prefix}{name}": tensor for name, tensor in nn.Linear(3, 2).state_dict().items()}
        content = state if nesting is None else {"epoch": 3, nesting: state, "optimizer": {"lr": 0.1}}
        torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        read, metadata = read_weights(tmp_path / "w.pt")
        assert list(read) == ["weight", "bias"]
        assert torch.equal(read["weight"], state[f"{prefix}weight"])
        assert metadata == ({} if nesting is None else {"epoch": "3"})

    def test_removes_one_prefix_where_all_names_have_it(self, tmp_path):
        torch.save({"module.module.a": torch.ones(1)}, tmp_path / "twice.pt")
        assert list(read_weights(tmp_path / "twice.pt")[0]) == ["module.a"]
        torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "some.pt")
        assert list(read_weights(tmp_path / "some.pt")[0]) == ["module.a", "b"]

    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    @pytest.mark.parametrize(
        "beside",
        [
            pytest.param(np.float64(71.5), id="NumPy number"),
            pytest.param(np.random.RandomState(0).get_state(), id="NumPy array"),
            pytest.param([np.str_("a"), np.array(["a"]), np.array([None, {}]), np.zeros(0)], id="NumPy objects"),
            pytest.param([np.random.default_rng(0), np.random.RandomState(0)], id="NumPy generators"),
            pytest.param(random.Random(0).getstate(), id="Python's random state"),
            pytest.param([Path("a/b"), PureWindowsPath("a")], id="paths"),
            pytest.param(argparse.Namespace(lr=0.1, out=Path("a")), id="argparse"),
            pytest.param(types.SimpleNamespace(lr=0.1), id="SimpleNamespace"),
            pytest.param(collections.OrderedDict(lr=0.1), id="OrderedDict"),
            pytest.param(collections.defaultdict(list, a=[1]), id="defaultdict"),
            pytest.param(collections.deque([1], 3), id="deque"),
            pytest.param([datetime.datetime.now(datetime.UTC), datetime.timedelta(1), datetime.date(2020, 1, 1)], id="datetime"),
            pytest.param([range(3), slice(3), frozenset({1}), {2}, 1j, b"b", 2**70, decimal.Decimal(1)], id="builtins"),
            pytest.param(functools.partial(torch.optim.SGD, lr=0.1), id="partial"),
            pytest.param([Hyperparameters(lr=0.1), Options()], id="classes of the script"),
            pytest.param(torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.ones(1)], lr=0.1)), id="scheduler"),
            pytest.param(nn.Sequential(nn.Linear(2, 2), nn.GELU()), id="module"),
        ],
    )
    def test_takes_what_training_scripts_put_beside_the_weights(self, tmp_path, beside, legacy):
        content = {"best_acc": np.float32(71.5), "beside": beside, "state_dict": {"w": torch.ones(1)}, "again": beside}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        if legacy and isinstance(beside, nn.Module):  # the old format keeps a module's source beside it
            with pytest.raises(ValueError, match="holds a whole network in PyTorch's old format"):
                read_weights(tmp_path / "w.pth")
            return
        read, metadata = read_weights(tmp_path / "w.pth")
        assert read == {"w": torch.ones(1)}
        assert metadata["best_acc"] == "71.5"

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            pytest.param({"state_dict_ema": {"module.w": torch.ones(1)}, "epoch": 1}, ["w"], id="only a moving average"),
            pytest.param({"w": torch.ones(1), "epoch": 1}, ["w"], id="numbers among the tensors"),
            pytest.param({"model": {"w": np.float32([[1, 2]])}}, ["w"], id="NumPy arrays as weights"),
            pytest.param({"model": nn.Sequential(nn.BatchNorm2d(2), nn.Linear(2, 2))}, None, id="whole network in a dictionary"),
            pytest.param(nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2, bias=False))), None, id="whole network"),
            pytest.param(nn.DataParallel(nn.Conv2d(2, 2, 1)), ["weight", "bias"], id="DataParallel"),
        ],
    )
    def test_finds_weights(self, tmp_path, content, names):
        torch.save(content, tmp_path / "w.pth")
        network = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), nn.Module) else content
        assert list(read_weights(tmp_path / "w.pth")[0]) == (list(network.state_dict()) if names is None else names)

    def test_prefers_plain_weights_to_their_average_and_says_so(self, tmp_path):
        torch.save({"model_ema": {"w": torch.ones(1)}, "model": {"w": torch.zeros(1)}}, tmp_path / "w.pth")
        with pytest.warns(UserWarning, match="weights under model and under model_ema: model is read"):
            assert read_weights(tmp_path / "w.pth")[0] == {"w": torch.zeros(1)}

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_other_pickle_protocols_are_named(self, tmp_path):
        torch.save({"w": torch.ones(1)}, tmp_path / "w.pth", pickle_protocol=4)
        with pytest.raises(ValueError, match=r"not a weights file that can be read without running code \(Unsupported operand 149\)"):
            read_weights(tmp_path / "w.pth")

    def test_parts_of_distributed_weights_are_named(self, tmp_path):
        script = f"""
            import torch, torch.distributed as dist
            from torch.distributed.tensor import distribute_tensor, init_device_mesh
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            torch.save({{"w": distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))}}, {str(tmp_path / "w.pth")!r})
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
        with pytest.raises(ValueError, match="holds one process's part of distributed weights"):
            read_weights(tmp_path / "w.pth")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(b"cposixpath\njoin\nX\x01\x00\x00\x00a\x85R.", "asks to run posixpath.join", id="a call"),
            pytest.param(b"cnumpy\ndtype\n)\x81X\x01\x00\x00\x00a\x85b.", "not a weights file", id="a stand-in's state"),
            pytest.param(b"".join(b"cm%d\nK\n" % i for i in range(300)) + b".", "can be read without running code", id="many classes"),
            pytest.param(b"]" * 9999 + b"a" * 9998 + b".", "has no state dict", id="nested deeply"),
        ],
    )
    def test_made_up_pickles_are_one_sentence_at_once(self, tmp_path, content, message):
        torch.save({"w": torch.ones(1)}, tmp_path / "good.pth")
        with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "w.pth", "w") as bad:
            for name in good.namelist():
                bad.writestr(name, b"\x80\x02" + content if name.endswith("data.pkl") else good.read(name))
        start = time.monotonic()
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / "w.pth")
        assert time.monotonic() - start < 20

    def test_a_file_that_holds_itself_is_one_sentence(self, tmp_path):
        content: dict = {}
        content["model"] = content
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"w.pth is truncated or not a weights file"):
            read_weights(tmp_path / "w.pth")

    @pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
    def test_never_runs_code(self, tmp_path, legacy):
        payload, path = Payload(tmp_path / "touched"), tmp_path / "w.pth"
        torch.save({"state_dict": {"w": torch.ones(1)}, "x": payload}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"w.pth asks to run \w*io.open while it is read"):
            read_weights(path)
        path.write_bytes(pickle.dumps(payload, protocol=2))
        with pytest.raises(ValueError, match=r"w.pth"):
            read_weights(path)
        assert not payload.path.exists()
        pickle.loads(pickle.dumps(payload)).close()
        assert payload.path.exists(), "the payload would have shown"

    @pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
    def test_refuses_a_truncated_file_and_another(self, tmp_path, kind):
        path, state = tmp_path / f"w.{kind}", {"w": torch.randn(100, 100)}
        save_weights(state, path) if kind == "safetensors" else torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
        content = path.read_bytes()
        truncated = [content[: int(keep * len(content))] for keep in (0, 0.001, 0.3, 0.999)]
        for wrong in (*truncated[1:], bytes(1000), b"hello " * 50):
            path.write_bytes(wrong)
            with pytest.raises(ValueError, match=r"w\.\w+ is truncated or not a"):
                read_weights(path)

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            pytest.param(b"", "empty", id="empty"),
            pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer", id="LFS"),
            pytest.param(b"\n<!DOCTYPE html><html>404</html>", "an HTML or XML page", id="HTML"),
            pytest.param(b'{"weight_map": {}}', r"text \(JSON\)", id="JSON"),
            pytest.param(gzip.compress(b"w" * 100), "a gzip archive", id="gzip"),
            pytest.param(pack(tarfile.open, "w:"), "a tar archive", id="tar"),
            pytest.param(pack(tarfile.open, "w:gz"), "a gzip archive", id="tar.gz"),
            pytest.param(pack(zipfile.ZipFile, "w"), "a zip archive of nothing", id="zip"),
            pytest.param(save_numpy({"w": np.ones(2)}), "a zip archive of w.npy", id="npz"),
            pytest.param(save_numpy(np.ones(2)), "a NumPy array", id="npy"),
            pytest.param(save_script(), "a TorchScript program", id="TorchScript"),
        ],
    )
    @pytest.mark.parametrize("ending", ["pth", "safetensors"])
    def test_names_a_file_that_holds_something_else(self, tmp_path, content, name, ending):
        path = tmp_path / f"w.{ending}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"w\.{ending} is {name}.*, not a weights file"):
            read_weights(path)

    def test_goes_by_content_and_not_by_ending(self, tmp_path):
        save_weights({"w": torch.ones(1)}, tmp_path / "w.bin")
        assert read_weights(tmp_path / "w.bin")[0] == {"w": torch.ones(1)}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param([1, 2], "it holds list", id="list"),
            pytest.param({"optimizer": {}, "epoch": 1}, "it holds the entries optimizer, epoch", id="entries"),
            pytest.param({}, "no state dict", id="nothing"),
            pytest.param({"student": {"w": torch.ones(1)}}, "it holds the entries student", id="unknown entry"),
            pytest.param(Kind.ONE, r"asks to run tests.models.test_weights.Kind", id="enumeration"),
        ],
    )
    def test_names_the_content_of_a_file_without_state_dict(self, tmp_path, content, message):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / "w.pt")
        with pytest.raises(FileNotFoundError, match="no file"):
            read_weights(tmp_path / "other.pt")


class TestLoading:
    def test_lists_missing_unexpected_and_misshapen_and_writes_nothing(self, model):
        state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
        del state["conv1.weight"], state["layer1.0.bn1.bias"]
        state["extra"] = torch.ones(1)
        state["linear.weight"] = torch.ones(100, 64)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError) as caught:
            load_weights(model, state)
        assert str(caught.value) == (
            "load_weights: the state dict does not fit ResNet: 2 missing: conv1.weight, layer1.0.bn1.bias; 1 unexpected: extra; "
            "1 wrong shape: linear.weight [100, 64] instead of [10, 64]"
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_shortens_long_lists(self, model):
        with pytest.raises(ValueError, match=r"47 missing: (\S+, ){10}and 37 more; 1 unexpected: a"):
            load_weights(model, {"a": torch.ones(1)})

    def test_accepts_prefixes_on_either_side(self, model):
        source = randomize(create("resnet8", 10))
        load_weights(model, {f"module.{name}": tensor for name, tensor in source.state_dict().items()})
        assert have_equal_state(model, source)
        load_weights(model.half(), source.state_dict())
        assert model.conv1.weight.dtype == torch.float16
        wrapped = nn.Sequential()
        wrapped.add_module("module", create("resnet8", 10))
        load_weights(wrapped, source.state_dict())
        assert have_equal_state(wrapped.module, source)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda name: f"model.{name}", id="model."),
            pytest.param(lambda name: f"net._orig_mod.{name}", id="net._orig_mod."),
            pytest.param(lambda name: f"module.student.{name}", id="module.student."),
            pytest.param(lambda name: name.replace("layer1.", "layer1._orig_mod."), id="a compiled part"),
            pytest.param(lambda name: f"_fsdp_wrapped_module.{name}".replace("0.", "0._fsdp_wrapped_module.", 1), id="FSDP"),
        ],
    )
    def test_finds_the_network_under_a_prefix(self, model, change):
        source = randomize(create("resnet8", 10))
        state = {change(name): tensor.half() for name, tensor in source.state_dict().items()}
        load_weights(model, state)
        assert torch.equal(model.conv1.weight, source.conv1.weight.half().float())
        assert recognize(state, "resnet8")[0] == ModelSpec("resnet8", 10)

    @pytest.mark.parametrize(
        ("beside", "match"),
        [
            pytest.param({"criterion.weight": torch.ones(3)}, "left out beside the network: criterion.weight", id="criterion"),
            pytest.param({"0.mean": torch.ones(3)}, "1 tensors left out beside the network: 0.mean", id="normalization"),
            pytest.param({"n_averaged": torch.tensor(3)}, None, id="AveragedModel"),
        ],
    )
    def test_names_tensors_left_out_beside_the_network(self, model, beside, match):
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        with pytest.warns(UserWarning, match=match) if match else warnings.catch_warnings(action="error"):
            load_weights(create("resnet8", 10), state | beside)

    def test_takes_the_part_whose_shapes_fit_and_refuses_two(self):
        student, teacher = randomize(create("wrn_16_2", 10)), create("wrn_40_2", 10)
        parts = {"student": student, "teacher": teacher}
        state = {f"{part}.{name}": tensor for part, network in parts.items() for name, tensor in network.state_dict().items()}
        loaded = create("wrn_16_2", 10)
        with pytest.warns(UserWarning, match=r"tensors left out beside the network: teacher\."):
            load_weights(loaded, state)
        assert have_equal_state(loaded, student)
        state = {f"{part}.{name}": tensor for part in ("a", "b") for name, tensor in student.state_dict().items()}
        with pytest.raises(ValueError, match=r"holds this network under each of a\., b\.: save the one that is meant"):
            load_weights(loaded, state)

    def test_refuses_quantized_numbers(self, model):
        state = {name: tensor.to(torch.int8) if name == "linear.weight" else tensor for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"does not fit ResNet: 1 quantized: linear.weight torch.int8"):
            load_weights(model, state)

    @pytest.mark.parametrize(
        ("name", "ours", "theirs"),
        [
            pytest.param("densenet121", r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", id="densenet"),
            pytest.param("vit_b_32", r"mlp\.0\.", "mlp.linear_1.", id="vit", marks=pytest.mark.slow),
            pytest.param("mnasnet0_5", "", "", id="mnasnet, which asks for its version"),
        ],
    )
    def test_knows_torchvisions_old_names(self, tmp_path, name, ours, theirs):
        source = create(name, 10)
        torch.save({re.sub(ours, theirs, key): tensor for key, tensor in source.state_dict().items()}, tmp_path / "w.pth")
        model = create(name, 10)
        load_weights(model, tmp_path / "w.pth")
        assert have_equal_state(model, source)
        assert recognize(read_weights(tmp_path / "w.pth")[0], name)[0] == ModelSpec(name, 10)

    def test_accepts_old_files_without_batch_counters(self, model):
        source = randomize(create("resnet8", 10)).state_dict()
        load_weights(randomize(model), {name: tensor for name, tensor in source.items() if "num_batches" not in name})
        assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items() if "num_batches" not in name)
        assert model.bn1.num_batches_tracked == 0

    def test_knows_repdistillers_names(self, model):
        source = randomize(create("resnet8", 10))
        theirs = {
            name.replace("shortcut.", "downsample.").replace("linear.", "fc."): tensor for name, tensor in source.state_dict().items()
        }
        assert "fc.weight" in theirs
        load_weights(model, theirs)
        assert have_equal_state(model, source)
        assert recognize(theirs, "resnet8") == (ModelSpec("resnet8", 10), None)


class TestSaving:
    def test_round_trip_with_metadata(self, tmp_path, model):
        randomize(model).to(memory_format=torch.channels_last)
        save_weights(model, tmp_path / "w.safetensors", {"note": "ü"})
        other = create("resnet8", 10)
        assert load_weights(other, tmp_path / "w.safetensors") == {"note": "ü"}
        assert have_equal_state(model, other)
        save_weights({"module.w": torch.ones(1)}, tmp_path / "w.safetensors")
        assert list(read_weights(tmp_path / "w.safetensors")[0]) == ["w"], "the name that the wrapped model has"

    def test_writes_shared_tensors_and_views(self, tmp_path):
        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
        save_weights(tied, tmp_path / "w.safetensors")
        state, _ = read_weights(tmp_path / "w.safetensors")
        assert torch.equal(state["0.weight"], state["1.weight"])
        load_weights(tied, tmp_path / "w.safetensors")
        assert tied[1].weight is tied[0].weight
        base = torch.arange(10.0)
        save_weights({"a": base[2:4], "b": base[3:9], "c": base.reshape(2, 5).t()}, tmp_path / "v.safetensors")
        state, _ = read_weights(tmp_path / "v.safetensors")
        assert [t.tolist() for t in (state["a"], state["b"])] == [[2.0, 3.0], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]
        assert torch.equal(state["c"], base.reshape(2, 5).t())

    def test_the_same_weights_are_the_same_bytes(self, tmp_path):
        facts = {name: name.upper() for name in "abcdefgh"}
        for k in range(4):
            save_weights({"w": torch.ones(3), "é": torch.zeros(1)}, tmp_path / f"{k}.safetensors", facts)
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
        assert read_weights(tmp_path / "0.safetensors")[1] == facts

    def test_any_flipped_bit_is_found(self, tmp_path):
        path, state = tmp_path / "w.safetensors", {"w": torch.ones(5), "b": torch.zeros(2)}
        save_weights(state, path, {"a": "1", "b": "é"})
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 3):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                found = read_weights(path)[0]  # a checksum under another name is not looked at, and all else is whole
                assert found.keys() == state.keys()
                assert all(torch.equal(found[name], state[name]) for name in state)

    @pytest.mark.parametrize(("place", "step"), [(Path, "open"), (os, "fsync"), (os, "replace")], ids=["write", "fsync", "replace"])
    def test_a_failing_write_leaves_the_old_file(self, tmp_path, monkeypatch, place, step):
        path = tmp_path / "w.safetensors"
        save_weights({"w": torch.ones(1)}, path)

        def full(*_, **__):
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(place, step, full)
        with pytest.raises(OSError, match="no space left"):
            save_weights({"w": torch.zeros(1)}, path)
        monkeypatch.undo()
        assert read_weights(path)[0]["w"].item() == 1
        assert list(tmp_path.iterdir()) == [path], "no temporary file stays"


class TestRecognizing:
    @pytest.mark.parametrize(
        ("spec", "normalization"),
        [
            (ModelSpec("resnet20", 100), None),
            (ModelSpec("resnet20", 10, options={"shortcut": "A"}), "imagenet"),
            (ModelSpec("vgg11_cifar", 200), None),
            (ModelSpec("wrn_16_2", 10), None),
            (ModelSpec("resnet18", 10), None),
            (ModelSpec("resnet18", 1000), "imagenet"),
        ],
        ids=str,
    )
    def test_recognizes_what_was_built(self, spec, normalization):
        random = torch.get_rng_state()
        with torch.device("meta"):
            state = build(spec).state_dict()
        assert recognize(state, spec.name) == (spec, normalization)
        assert torch.equal(torch.get_rng_state(), random)

    def test_names_a_missing_classifier(self, model):
        state = {name: tensor for name, tensor in model.state_dict().items() if "linear" not in name}
        with pytest.raises(ValueError, match="its classifier at 'linear', and the weights have none there"):
            recognize(state, "resnet8")


def count_correct(real_data, file, name, images):
    """The number of the first `images` test images of CIFAR-10 that the weights classify right."""
    path = os.path.join(os.environ.get("KDFAST_WEIGHTS", real_data / "weights"), file)
    if not os.path.isfile(path):
        pytest.skip(f"no weights: {path} is not a file; set KDFAST_WEIGHTS")
    spec, normalization = recognize(read_weights(path)[0], name)
    assert (spec.options, spec.num_classes, normalization) == ({"shortcut": "A"}, 10, "imagenet")
    model = build(spec).eval()
    load_weights(model, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the training batches may be missing
        data = load("cifar10", data_dir=real_data, download=False)
    transform = evaluation_transform("none", 32, *NORMALIZATIONS["imagenet"])
    loader = ResidentLoader(data.test.subset(torch.arange(images)), transform, LoaderOptions(200))
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).sum().item() for x, y, _ in loader)


EDGE = 2  # images on the edge between two classes: rounding differs between machines


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "name", "images", "right"),
    [
        pytest.param("resnet20-12fca82f.th", "resnet20", 2_000, 1833, id="part of the test set"),
        pytest.param("resnet20-12fca82f.th", "resnet20", 10_000, 9173, id="resnet20", marks=pytest.mark.slow),
        pytest.param("resnet56-4bfd9763.th", "resnet56", 10_000, 9339, id="resnet56", marks=pytest.mark.slow),
    ],
)
def test_published_weights_give_their_accuracy(real_data, file, name, images, right):
    assert abs(count_correct(real_data, file, name, images) - right) <= EDGE
