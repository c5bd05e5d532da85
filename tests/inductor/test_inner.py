"""What is set in Inductor for our graphs, and for no others."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V
from torch.fx import Graph, GraphModule

import fp8_compile
from fp8_compile.checks import parse_options
from fp8_compile.inductor.inner import PostGradPasses, _functions
from fp8_compile.inductor.source_hash import source_hash
from fp8_compile.inductor.whole_rows import whole_rows
from fp8_compile.passes.context import Context
from tests.support.blocks import OPTIONS, model, tokens

pytestmark = pytest.mark.inductor

CPU = torch.device("cpu")


def test_caches_tell_passes_and_heuristics_apart() -> None:
    class Mine(InductorChoices):
        pass

    def uuid(**options: Any) -> Any:
        opts = parse_options(options)
        return PostGradPasses(None, Context(GraphModule(nn.Module(), Graph()), opts)).uuid()

    uuids = [uuid(), uuid(disabled_passes=["one_fp8_copy"])]
    with whole_rows():
        uuids.append(uuid())
        assert uuid() == uuids[-1]
    with V.set_choices_handler(Mine()):
        uuids.append(uuid())
    assert len(set(uuids)) == len(uuids)
    assert {uuid[0] for uuid in uuids} == {source_hash()}


def test_a_change_in_any_room_makes_other_cache_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room that the hash misses would let compiled code of an older version be found."""
    package = Path(fp8_compile.__file__).parent
    copied = tmp_path / "fp8_compile"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    module = sys.modules[source_hash.__module__]
    monkeypatch.setattr(module, "__file__", str(copied / "inductor" / "source_hash.py"))
    hashes = {source_hash.__wrapped__()}
    rooms = {path.parent for path in copied.rglob("*.py")}
    assert len(rooms) > 8
    for room in rooms:
        next(room.glob("*.py")).open("a").write("\n")
        hashes.add(source_hash.__wrapped__())
    assert len(hashes) == len(rooms) + 1


def test_every_function_that_a_graph_may_call_is_known_to_the_cache() -> None:
    """AOTAutograd caches a graph only if it knows each function in it."""
    with torch.no_grad():
        captured: list[Any] = []
        options = {**OPTIONS, "inner_backend": lambda gm, inputs: captured.append(gm) or gm.forward}
        torch.compile(model(1), backend="fp8_diffusion", options=options)(tokens())
    ours = {node.target for node in captured[0].graph.nodes if node.op == "call_function"}
    ours = {f for f in ours if f.__module__.startswith("fp8_compile")}
    assert len(ours) == 2
    assert {f"{f.__module__}.{f.__name__}" for f in _functions(captured[0])} == {
        f"{f.__module__}.{f.__name__}" for f in ours
    }


def during_a_compilation(**options: Any) -> list[Any]:
    """Inductor's heuristics and thresholds while it compiles one of our graphs."""
    seen: list[Any] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.extend([V.choices, config.realize_reads_threshold, config.realize_opcount_threshold])

    settings = {**OPTIONS, "inner_backend": "inductor", "post_grad_custom_post_pass": look, **options}
    with torch.no_grad():
        torch.compile(model(1), backend="fp8_diffusion", options=settings)(tokens())
    return seen


def test_heuristics_and_thresholds_hold_for_our_graphs_alone() -> None:
    outside = V.choices, config.realize_reads_threshold, config.realize_opcount_threshold
    choices, reads, operators = during_a_compilation()
    assert type(choices) is not InductorChoices
    assert isinstance(choices, InductorChoices)
    assert (reads, operators) == (outside[1], 200)  # computing again what many read is not cheap
    assert (V.choices, config.realize_reads_threshold, config.realize_opcount_threshold) == outside


def test_a_threshold_in_the_options_stands_and_a_higher_one_elsewhere_too() -> None:
    with config.patch(realize_opcount_threshold=300):
        choices, reads, operators = during_a_compilation(
            realize_reads_threshold=2, disabled_passes=["whole_rows"], epilogue_fusion=False
        )
    assert type(choices) is InductorChoices
    assert (reads, operators) == (2, 300)


def test_heuristics_of_the_users_stay_in_force() -> None:
    class Mine(InductorChoices):
        pass

    with V.set_choices_handler(Mine()):
        choices, *_ = during_a_compilation()
    assert type(choices) is Mine


@pytest.mark.parametrize("rows", [1, 63, 64, 4096])
@pytest.mark.parametrize("width", [3072, 15360, 65536, 1 << 20])
def test_rows_of_usual_length_are_not_split(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row, and a very long one, are still spread over the device."""
    stock = lambda *given: -1 if given[-4:] == (CPU, width, rows, True) else None  # noqa: E731
    static = isinstance(vars(InductorChoices)["reduction_split_factor"], staticmethod)  # until torch 2.13
    monkeypatch.setattr(InductorChoices, "reduction_split_factor", staticmethod(stock) if static else stock)
    with whole_rows():
        choice = V.choices.reduction_split_factor(CPU, width, rows, True)
    assert choice == (1 if rows >= 64 and width <= 65536 else -1)
