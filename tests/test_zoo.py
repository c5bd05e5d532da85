"""Every transformer class of the installed diffusers, tiny: stock torch.compile against this backend.

A class is converted by compiling it and before, whole and block by block. With ``--zoo-table docs/zoo.md`` the run
writes the table of the documentation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import diffusers
import pytest

from tests.support.zoo_all import ZOO, classes, measure

pytestmark = pytest.mark.slow  # four compilations each of about 75 classes, twice

FLOOR = 20  # dB; a layer that reads the wrong weights or scales is far below


def test_every_class_is_covered(record_property: Callable[[str, Any], None]) -> None:
    missing = sorted(classes().keys() - ZOO.keys())
    record_property("zoo_missing", missing)
    assert not missing, "write a tiny config for each of these in tests/support/zoo_more.py"


@pytest.mark.parametrize("by_blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", ZOO)
def test_class(name: str, by_blocks: bool, record_property: Callable[[str, Any], None]) -> None:
    if name not in classes():
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    found = measure(name, by_blocks)
    rows = found.report.layers
    record_property(
        "zoo",
        {
            "name": name,
            "by_blocks": by_blocks,
            "fullgraph": found.fullgraph,
            "stock_graphs": found.stock_graphs,
            "graphs": found.graphs,
            "linears": found.linears,
            "sqnr": found.sqnr,
            "quantized": found.report.totals["quantized"],
            "reasons": dict(Counter(row.reason for row in rows if row.decision == "unquantized")),
        },
    )
    assert found.graphs == found.stock_graphs
    assert found.same_bits
    assert found.sqnr > FLOOR
    assert found.report.totals["quantized"] > 0
