import os
from collections.abc import Iterator

# Nothing may be fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import pytest
import torch

from fp8_compile.passes import spec

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
