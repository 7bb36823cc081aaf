"""The registry of operators, their timed cases, and what every report says of the machine."""

import importlib
from collections.abc import Collection
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kdfast import machine
from kdfast.benchmarks.harness import TIERS, Case


class Operator(NamedTuple):
    """An operator and the places of its parts.

    The benchmark module knows everything that is measured and checked: cases(device, dtype) for `kdfast bench kernels`, calls(device,
    dtype) in every regime of the kernel, launches(target) with every launch plan for `kdfast bench codegen`, and, where bad labels or
    indices could be read out of bounds, hostile_calls(device) for sanitizers.
    """

    name: str  # in kdfast.functional or kdfast.optim
    benchmark: str  # file in benchmarks/
    kernel: str  # file in kernels/
    op: str  # module or package of kdfast.ops
    reference: str  # function of kdfast.reference
    tests: str  # file in tests/ops/ with the marker "kernels"

    @property
    def module(self) -> ModuleType:
        """The module kdfast.benchmarks.<benchmark>."""
        return importlib.import_module(f"kdfast.benchmarks.{self.benchmark}")


OPERATORS = {  # in the order of tables
    operator.name: operator
    for operator in (
        Operator("kd_loss", "distill_kl", "distill_kl", "distill_kl", "kd_loss", "test_distill_kl_kernel"),
        Operator("linear_kd_loss", "linear_kd", "distill_kl", "distill_kl.linear", "linear_kd_loss", "test_linear_kd"),
        Operator("supcon_loss", "supcon", "supcon", "supcon", "supcon_loss", "test_supcon_kernel"),
        Operator("Lion", "lion", "lion", "lion", "lion_step", "test_lion_kernel"),
        Operator(
            "attention_transfer_loss", "attention_map", "attention_map", "attention_map", "attention_transfer_loss", "test_attention_map"
        ),
        Operator("crd_loss", "nce", "nce", "nce", "crd_loss", "test_nce_kernel"),
    )
}
PACKAGES = ("triton", "liger-kernel", "lion-pytorch", "torch-optimi", "timm", "bitsandbytes", "pytorch-metric-learning")


def cases(device: torch.device, dtype: torch.dtype, *, operators: Collection[str] = (), tier: str = "usual") -> list[Case]:
    """The cases of a tier and of those before it, the quickest first.

    Args:
        device: where they compute.
        dtype: of floating inputs.
        operators: names; none: all.
        tier: "quick", "usual" or "long".

    Raises:
        ValueError: an unknown operator.
    """
    for name in operators:
        if name not in OPERATORS:
            raise ValueError(f"operators must be of {', '.join(OPERATORS)}, got {name!r}")
    found = [case for name in operators or OPERATORS for case in OPERATORS[name].module.cases(device, dtype)]
    wanted = TIERS[: TIERS.index(tier) + 1]
    return sorted((case for case in found if case.tier in wanted), key=lambda case: TIERS.index(case.tier))


def describe_peers() -> dict[str, Any]:
    """GPUs' drivers and clocks, and the versions of Triton and of the peers that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"gpus": machine.gpus(), "packages": versions}
