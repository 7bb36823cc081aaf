"""Every operator against its peers: pytest benchmarks [-k kd_loss] [--quick | --long] [--dtype bfloat16] [--benchmark-json FILE]

The variants of a case run in turn (harness.py); what they took is in `extra_info`. The plugin's own table is of ours alone, for
--benchmark-compare.
"""

from typing import Any

import pytest
import torch

from kdfast.benchmarks.harness import OURS, Case, measure


@pytest.mark.timeout(3600)
def test_operator(case: Case, benchmark: Any) -> None:
    """Fails where ours is wrong; who is faster is for the report to say."""
    try:
        benchmark.extra_info.update(measure(case))
    except torch.OutOfMemoryError:
        pytest.skip("the case does not fit on this GPU")
    step = case.step(OURS)

    def call() -> None:
        step.run()
        if case.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=20, warmup_rounds=1)
