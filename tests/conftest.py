import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Nothing may be fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of threads and processes that tests start

import pytest
import torch

from fp8_compile.passes import spec
from tests.support import zoo_table

torch.set_num_threads(1)  # two test processes run side by side
spec.enabled = True  # every graph of every test is checked between passes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-m fast``: what takes neither Inductor nor a pipeline."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("build", "inductor", "pipeline", "slow")):
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- the table of docs/zoo.md ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-table", type=Path, metavar="PAGE", help="where tests/test_zoo.py writes what it found")


class _ZooTable:
    """Gathers what the tests of the zoo recorded, in the process that reports them, and writes the page anew."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self._found: dict[tuple[str, bool], dict[str, Any] | None] = {}
        self._missing: list[str] | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, _, name = report.nodeid.partition("test_zoo.py::test_class[")
        if report.when != "call":
            return
        recorded: dict[str, Any] = dict(report.user_properties)
        if name:
            class_name, _, way = name.rstrip("]").partition("-")
            self._found[class_name, way == "blocks"] = recorded.get("zoo")
        self._missing = recorded.get("zoo_missing", self._missing)
        from tests.support.zoo_all import ZOO

        zoo_table.write(self._page, self._found, ZOO, self._missing)


def pytest_configure(config: pytest.Config) -> None:
    page = config.getoption("--zoo-table")
    if page is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_ZooTable(page))
