"""What is set in Inductor for our graphs, and for no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import OPTIONS, model, tokens
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

from fp8_compile.inductor import inner
from fp8_compile.inductor.inner import PostGradPasses, source_hash

CPU = torch.device("cpu")


def test_caches_tell_passes_and_heuristics_apart() -> None:
    class Mine(InductorChoices):
        pass

    uuids = [PostGradPasses(None).uuid(), PostGradPasses(None, ("one_fp8_copy",)).uuid()]
    with inner._whole_rows():
        uuids.append(PostGradPasses(None).uuid())
        assert PostGradPasses(None).uuid() == uuids[-1]
    with V.set_choices_handler(Mine()):
        uuids.append(PostGradPasses(None).uuid())
    assert len(set(uuids)) == len(uuids)
    assert {uuid[0] for uuid in uuids} == {source_hash()}


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
    assert (reads, operators) == (16, 200)
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
    with inner._whole_rows():
        choice = V.choices.reduction_split_factor(CPU, width, rows, True)
    assert choice == (1 if rows >= 64 and width <= 65536 else -1)
