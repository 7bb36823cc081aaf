"""The cases of all operators, and what is common to a report of them."""

import time
from collections.abc import Collection
from importlib import metadata
from typing import Any

import torch

from kdfast import machine
from kdfast.benchmarks import attention_map, distill_kl, lion, nce, supcon
from kdfast.benchmarks.harness import TIERS, Case

OPERATORS = {
    "kd_loss": distill_kl.cases,
    "supcon_loss": supcon.cases,
    "Lion": lion.cases,
    "attention_transfer_loss": attention_map.cases,
    "crd_loss": nce.cases,
}
ELSEWHERE = {"linear_kd_loss": "python -m kdfast.benchmarks.linear_kd"}  # has a command of its own
PACKAGES = ("triton", "liger-kernel", "lion-pytorch", "torch-optimi", "timm", "bitsandbytes", "pytorch-metric-learning")


def cases(device: torch.device, dtype: torch.dtype, *, operators: Collection[str] = (), tier: str = "usual") -> list[Case]:
    """The cases of a tier and those before it, the quickest first.

    Args:
        device: where they compute.
        dtype: of floating inputs.
        operators: names; none: all.
        tier: "quick", "usual" or "long".

    Raises:
        ValueError: an operator that there is not.
    """
    for name in operators:
        if name in ELSEWHERE:
            raise ValueError(f"operators: {name} is measured by {ELSEWHERE[name]}")
        if name not in OPERATORS:
            raise ValueError(f"operators must be of {', '.join(OPERATORS)}, got {name!r}")
    made = [case for name in operators or OPERATORS for case in OPERATORS[name](device, dtype)]
    wanted = TIERS[: TIERS.index(tier) + 1]
    return sorted((case for case in made if case.tier in wanted), key=lambda case: TIERS.index(case.tier))


def facts() -> dict[str, Any]:
    """kdfast.machine's, with GPUs' drivers and clocks, and the versions of Triton and of the peers that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**machine.facts(), "gpus": machine.gpus(), "packages": versions}


def document(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written as JSON: machine, date, and the results of harness.measure."""
    return {"machine": facts(), "date": time.strftime("%Y-%m-%d"), "cases": results}
