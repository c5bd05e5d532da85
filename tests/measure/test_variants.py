"""One pipeline, compiled in several ways that take turns."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import fp8_compile
from fp8_compile.measure.quality import generate
from fp8_compile.measure.variants import BF16, Variants
from fp8_compile.pipelines.denoisers import PipelineError
from tests.support.pipelines import OPTIONS, Block, Pipeline

pytestmark = pytest.mark.pipeline

PROMPTS = ("a red circle", "two blue squares")


def test_variants_take_turns_and_are_what_compiling_alone_gives() -> None:
    pipe = Pipeline()
    eager = generate(pipe, PROMPTS, [0])
    variants = Variants(pipe, OPTIONS)
    drawn = {}
    for patterns in (BF16, (), ("mlp",), BF16, ("mlp",), ()):
        variants.use_everywhere(patterns)
        again = variants.generate(PROMPTS, [0])
        before = drawn.setdefault(patterns, again)
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, before, strict=True))
    assert [len(variants.graphs(patterns)) for patterns in (BF16, (), ("mlp",))] == [0, 1, 1]  # one for all blocks
    variants.close()
    again = generate(pipe, PROMPTS, [0])
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, eager, strict=True))
    assert fp8_compile.report(pipe.transformer).graphs == (*variants.graphs(()), *variants.graphs(("mlp",)))
    assert [row.decision for row in variants.reports(("mlp",))["transformer"].layers].count("quantized") == 6

    alone = Pipeline()
    for block in alone.transformer.blocks:
        options = {**OPTIONS, "ignored_layers": ["mlp"]}
        block.compile(backend="fp8_diffusion", fullgraph=True, dynamic=False, options=options)
    expected = generate(alone, PROMPTS, [0])
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(expected, drawn["mlp",], strict=True))


def test_what_has_no_variants_is_refused() -> None:
    pipe = Pipeline()
    with pytest.raises(fp8_compile.OptionError, match="each variant has its own"):
        Variants(pipe, {**OPTIONS, "ignored_layers": ["mlp"]})
    fp8_compile.quantize_(pipe.transformer, OPTIONS)
    with pytest.raises(PipelineError, match="transformer has FP8 weights"):
        Variants(pipe, OPTIONS)
    pipe.transformer = torch.compile(Pipeline().transformer)
    with pytest.raises(PipelineError, match=r"transformer was made by torch\.compile\(module\)"):
        Variants(pipe, OPTIONS)
    with pytest.raises(PipelineError, match="Namespace has none of transformer, transformer_2, unet"):
        Variants(type("Namespace", (), {})(), OPTIONS)


class Other(Block):
    """Another kind of block, with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.extra(x)


def test_a_pattern_for_one_of_two_kinds_of_blocks_is_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    pipe = Pipeline(blocks=1)
    pipe.transformer.blocks.append(Other().bfloat16())
    pipe.transformer._repeated_blocks = ("Block", "Other")  # type: ignore[assignment]
    variants = Variants(pipe, OPTIONS)
    variants.use_everywhere(("extra",))
    variants.generate(PROMPTS, [0])
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]
    assert variants.reports(("extra",))["transformer"].unmatched_patterns == ()


def test_the_twin_has_the_mode_and_the_settings() -> None:
    variants = Variants(Pipeline(), {"mode": "reduce-overhead", "epilogue_fusion": False})
    expected = {"triton.cudagraphs": True, "epilogue_fusion": False}
    assert variants._arguments(BF16) == {"backend": "inductor", "options": expected}
    assert Variants(Pipeline(), {})._arguments(BF16) == {"backend": "inductor"}


def test_cuda_graphs_are_told_of_every_call_of_a_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    marks_made: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks_made.append(None))
    pipe, x = Pipeline(), torch.zeros(1, 16, 64, dtype=torch.bfloat16)
    for options, whole, marks in (
        ({"mode": "reduce-overhead"}, False, 1), ({}, False, 0), ({"mode": "reduce-overhead"}, True, 0)
    ):  # fmt: skip
        marks_made.clear()
        variants = Variants(pipe, options, whole)
        pipe.transformer(x)
        assert len(marks_made) == marks
        variants.close()
        pipe.transformer(x)
        assert len(marks_made) == marks


def test_what_was_compiled_is_let_go() -> None:
    variants = Variants(Pipeline(), OPTIONS)
    variants.use_everywhere(())
    call = weakref.ref(variants.regions[0].module._compiled_call_impl)  # type: ignore[arg-type]
    variants.close()
    gc.collect()
    assert call() is None


def test_a_pipeline_that_cannot_be_measured_is_refused() -> None:
    class Video(Pipeline):
        def __call__(self, prompt: str, num_frames: int, callback_on_step_end: Any) -> None: ...  # type: ignore[override]

    class Silent(Pipeline):
        def __call__(self, prompt: str) -> None: ...  # type: ignore[override]

    with pytest.raises(PipelineError, match="Video takes num_frames, so it makes videos"):
        Variants(Video(), OPTIONS)
    with pytest.raises(PipelineError, match="Silent takes no callback_on_step_end"):
        Variants(Silent(), OPTIONS)
    with pytest.raises(fp8_compile.OptionError, match="strict=True"):
        Variants(Pipeline(), {**OPTIONS, "strict": True})
