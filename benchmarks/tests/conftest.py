"""Options of `pytest benchmarks`, its cases, and what its JSON says of the machine."""

from typing import Any

import pytest
import torch

from kdfast.benchmarks import operators


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick, --long and --dtype."""
    group = parser.getgroup("kdfast")
    group.addoption("--quick", action="store_const", dest="tier", const="quick", default="usual", help="few and small cases")
    group.addoption("--long", action="store_const", dest="tier", const="long", help="the large cases too")
    group.addoption("--dtype", choices=["float32", "bfloat16"], default="float32", help="of floating inputs")


def pytest_configure(config: pytest.Config) -> None:
    """Compiling and 20 rounds of a slow peer may take longer than a test."""
    config.addinivalue_line("markers", "timeout: pytest-timeout's, where it is installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a case, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    option = metafunc.config.getoption
    metafunc.parametrize("case", operators.cases(device, getattr(torch, option("dtype")), tier=option("tier")), ids=str)


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """What every result of kdfast says, in place of the plugin's, which names the host."""
    return operators.facts()
