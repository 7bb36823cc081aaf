"""The torchvision loader alone: worker processes change nothing, and their deaths and signals are handled."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from kdfast.data import DataError, training_transform
from kdfast.data.augment import Step
from tests.data.samples import HALF, join_index, make_loader, make_split, same, write_pngs

AUGMENT = training_transform("cifar", 8, *HALF)


def loader_of(split, transform=AUGMENT, batch_size=4, **options):
    return make_loader("torchvision", split, transform, batch_size, **options)


def test_workers_change_nothing(tmp_path):
    on_disk, _ = write_pngs(tmp_path, 18)
    transform = training_transform("conkd-student", 8, *HALF)
    alone, helped = loader_of(on_disk, transform), loader_of(on_disk, transform, workers=2)
    for epoch in (0, 3):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        whole, state = list(alone), torch.get_rng_state()
        got = []
        for batch in helped:
            got.append(batch)
            assert helped.state_dict()["batch"] == len(got), "batches handed out, whatever was prefetched"
        assert same(got, whole)
        assert torch.equal(state, torch.get_rng_state())
    helped.load_state_dict({"epoch": 3, "batch": 2})
    assert same(list(helped), whole[2:])
    broken = tmp_path / "6.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert re.fullmatch(r".*6\.png: the image cannot be read: .*", catch_complaint(helped))


def catch_complaint(loader):
    """The sentence that iterating ends with. pytest.raises would hold the traceback, and so keep the workers alive."""
    try:
        list(loader)
    except DataError as error:
        return str(error)
    return pytest.fail("no DataError was raised")


class Dying(Step):
    """Dies as a process that takes too much memory does."""

    def change(self, images, draws):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_one_sentence():
    loader = loader_of(make_split(9), replace(AUGMENT, steps=(Dying(),)), workers=1)
    assert re.fullmatch(r"a process that reads images died.*fewer workers \(.*worker.*\)", catch_complaint(loader))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_within_another_is_right_or_an_error(workers):
    loader = loader_of(make_split(40), workers=workers)
    whole = list(loader)
    loader.set_epoch(0)
    outer = iter(loader)
    first = next(outer)
    assert join_index(loader.in_order()).tolist() == list(range(40))
    if workers:
        with pytest.raises(DataError, match="iterated again before an earlier iteration was over"):
            next(outer)
    else:
        assert same([first, *outer], whole)


SIGNALLED = """
    import signal, sys, time, torch
    torch.set_num_threads(1)
    from kdfast.data import LoaderOptions, Split, TorchvisionLoader, training_transform
    transform = training_transform("cifar", 8, (0.5,) * 3, (0.5,) * 3)
    split = Split(torch.zeros(4000, dtype=torch.int64), pixels=torch.zeros(4000, 3, 8, 8, dtype=torch.uint8))
    loader = TorchvisionLoader(split, transform, LoaderOptions(4, shuffle=True, workers=2))
    seen = set()
    for batch in loader:
        # the workers run already, so they have not inherited these
        signal.signal(signal.SIGINT, lambda *_: seen.add("SIGINT"))
        signal.signal(signal.SIGTERM, lambda *_: seen.add("SIGTERM"))
        signal.signal(signal.SIGHUP, lambda *_: seen.add("SIGHUP"))
        print("batch", flush=True)
        time.sleep(0.01)
        if len(seen) == 3 and loader.state_dict()["batch"] > 30:
            print(*sorted(seen), flush=True)
            break
"""


def test_signals_to_the_process_group_leave_the_workers_working():
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SIGNALLED)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},  # PyTorch warns of more workers than cores
    )
    assert process.stdout.readline() == "batch\n"  # of the first worker: the other may still be starting
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)  # workers end with the main process
    assert process.returncode == 0
    assert out.splitlines()[-1] == "SIGHUP SIGINT SIGTERM"
    assert err == ""
