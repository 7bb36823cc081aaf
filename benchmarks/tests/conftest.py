"""The options of `pytest benchmarks`, its cases, and the machine in its JSON."""

from typing import Any

import pytest
import torch

from kdfast import machine
from kdfast.benchmarks import operators


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --long and --dtype."""
    group = parser.getgroup("kdfast")
    group.addoption("--quick", action="store_const", dest="tier", const="quick", default="usual", help="few and small cases")
    group.addoption("--long", action="store_const", dest="tier", const="long", help="the large cases too")
    group.addoption("--dtype", choices=["float32", "bfloat16"], default="float32", help="of floating inputs")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of pytest-timeout, since a slow peer may take longer than a test."""
    config.addinivalue_line("markers", "timeout: pytest-timeout's, where it is installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test per case, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    option = metafunc.config.getoption
    metafunc.parametrize("case", operators.cases(device, getattr(torch, option("dtype")), tier=option("tier")), ids=str)


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The machine as every result of kdfast describes it; the plugin would name the host."""
    return machine.facts() | operators.describe_peers()
