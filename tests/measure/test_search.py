"""The search for layers to keep: the algorithm on made-up losses, then on pipelines."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fp8_compile
from fp8_compile.cli.main import app
from fp8_compile.measure import search_page
from fp8_compile.measure.quality import Sample, generate
from fp8_compile.measure.results import to_jsonable
from fp8_compile.measure.search import Bound, Search, SearchError, smallest
from fp8_compile.measure.search_page import how_to_use, paste
from fp8_compile.measure.search_pictures import SearchPictures
from fp8_compile.measure.variants import Variants
from tests.support.pages import Page
from tests.support.pipelines import OPTIONS, Pipeline, qwen_image_with_outliers, with_outlier

pytestmark = pytest.mark.pipeline


def counted(loss: Callable[[frozenset[str]], float]) -> tuple[Callable[[frozenset[str]], float], list[frozenset[str]]]:
    """``loss``, each set measured once, and the sets that were."""
    known: dict[frozenset[str], float] = {}

    def measure(kept: frozenset[str]) -> float:
        if kept not in known:
            known[kept] = loss(kept)
        return known[kept]

    return measure, known  # type: ignore[return-value]


def in_quadrature(errors: dict[str, float]) -> Callable[[frozenset[str]], float]:
    return lambda kept: math.sqrt(sum(e * e for unit, e in errors.items() if unit not in kept))


def test_the_two_that_hurt_are_found_among_sixty_in_few_measurements() -> None:
    errors = {str(i): 0.01 for i in range(60)} | {"17": 1.0, "42": 0.3}
    loss, measured = counted(in_quadrature(errors))
    assert smallest(list(errors), loss, limit=0.2) == {"17", "42"}
    assert len(measured) <= 2 + 60 + math.ceil(math.log2(60)) + 2


def test_nothing_is_kept_where_nothing_needs_to_be() -> None:
    loss, measured = counted(in_quadrature({"a": 0.1, "b": 0.1}))
    assert smallest(["a", "b"], loss, limit=0.2) == frozenset()
    assert len(measured) == 1


def test_a_bound_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(SearchError, match="even with everything kept"):
        smallest(["a"], lambda kept: 1.0 - 0.1 * len(kept), limit=0.5)


def test_what_does_not_add_up_is_still_met_and_no_member_can_be_left_out() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        units = list("abcdef")
        table = {frozenset(c): rng.random() for n in range(7) for c in itertools.combinations(units, n)}
        table[frozenset(units)] = 0.0
        kept = smallest(units, table.__getitem__, limit=0.2)
        assert table[kept] <= 0.2
        assert all(table[kept - {unit}] > 0.2 for unit in kept)


def test_a_smaller_set_than_the_first_that_is_enough_is_found() -> None:
    # Alone, b hurts most; with a kept it does not matter.
    losses = {"": 1.0, "a": 0.1, "b": 0.9, "c": 1.0, "ab": 0.0, "ac": 0.4, "bc": 0.6, "abc": 0.0}
    assert smallest(["a", "b", "c"], lambda kept: losses["".join(sorted(kept))], limit=0.2) == {"a"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lpsnr", 1.0), "metric='lpsnr' is not valid; valid: psnr, ssim, relative_l2, cosine"),
        (("psnr", 30.0, "median"), "statistic='median' is not valid; valid: worst, mean"),
        (("ssim", 1.5), r"bound for ssim: expected a number above 0 and at most 1, got 1\.5"),
        (("relative_l2", 0.0), r"relative_l2: expected a number above 0, got 0\.0"),
        (("psnr", math.nan), "psnr: .*, got nan"),
        (("psnr", math.inf), "psnr: .*, got inf"),
        (("psnr", "30"), "bound for psnr: expected a number, got '30'"),
    ],
)
def test_a_bound_that_no_metric_has_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Bound(*arguments)


def test_a_bound_knows_which_way_is_better() -> None:
    quality = {"mean": {"psnr": None, "relative_l2": 0.1}, "worst": {"psnr": 31.0, "relative_l2": 0.3}}
    psnr, l2 = Bound("psnr", 30), Bound("relative_l2", 0.2, "mean")
    assert (psnr.of(quality), psnr.loss(31.0) < psnr.loss(30.0)) == (31.0, True)
    assert Bound("psnr", 30, "mean").of(quality) == math.inf
    assert (l2.of(quality), l2.loss(0.1) < l2.loss(0.2)) == (0.1, True)
    broken = json.loads(json.dumps({"worst": {"psnr": to_jsonable(math.nan), "relative_l2": to_jsonable(math.nan)}}))
    assert Bound("psnr", 30).loss(Bound("psnr", 30).of(broken)) == math.inf
    assert Bound("relative_l2", 0.2).loss(Bound("relative_l2", 0.2).of(broken)) == math.inf
    assert str(psnr) == "psnr of the worst picture at least 30"
    assert str(l2) == "relative_l2 in the mean of all pictures at most 0.2"


def searched(pipe: Any, state: Path, bound: Bound, lines: list[str] | None = None, **options: Any) -> Search:
    variants = Variants(pipe, {**OPTIONS, "granularity": "tensor", **options})
    lines = [] if lines is None else lines
    return Search(variants, bound, ["a", "b"], [0], state, progress=lines.append)


def test_the_layer_with_outliers_is_found_in_its_block_and_the_list_means_it(tmp_path: Path) -> None:
    pipe = with_outlier(Pipeline(), block=1)
    search = searched(pipe, tmp_path / "s.json", Bound("relative_l2", 0.08))
    single = search.run("blocks-then-layers")
    # proj_out is outside the blocks, so it was never in FP8.
    assert single.patterns == {"transformer": ("blocks.1.to_q", "proj_out")}
    assert single.unmeasured == {"transformer": ("proj_out",)}
    assert "quantize_" in how_to_use(single)
    assert "'proj_out' were in BF16 in all measurements" in how_to_use(single)
    whole = search.run("blocks")
    assert whole.patterns == {"transformer": ("blocks.1", "proj_out")}
    layers = search.run("layers")
    assert layers.patterns == {"transformer": ("to_q",)}
    assert "block by block" in how_to_use(layers)
    assert "add 'proj_out'" in how_to_use(layers)

    # What the list does when it is used as the text says is what was measured.
    search.variants.close()
    convertible = {layer.full for layer in search.layers}
    assert {layer.full for layer in single.kept} == {"blocks.1.to_q"}
    printed: dict[str, Any] = {}
    exec(paste(single), printed)
    options = printed["options"]
    assert options == {**OPTIONS, "granularity": "tensor", "ignored_layers": ["blocks.1.to_q", "proj_out"]}
    compiled = with_outlier(Pipeline(), block=1)
    compiled.transformer.compile(backend="fp8_diffusion", fullgraph=True, options=options)
    generate(compiled, ["a"], [0])
    fp8_compile.quantize_(pipe.transformer, options)
    for model in (pipe.transformer, compiled.transformer):
        made = {layer.path for layer in fp8_compile.report(model).layers if layer.decision == "quantized"}
        assert made == convertible - {"blocks.1.to_q"}


def test_a_search_goes_on_where_it_stopped_and_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, lines = tmp_path / "folder" / "s.json", []
    pipe = with_outlier(Pipeline(), block=1)
    bound = Bound("relative_l2", 0.08)
    first = searched(pipe, state, bound)
    generate, calls = Variants.generate, []

    def interrupted(self: Variants, *args: Any, **call: Any) -> Any:
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, *args, **call)

    monkeypatch.setattr(Variants, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run("blocks")
    before = json.loads(state.read_text())["measurements"]
    assert len(before) >= 2
    second = searched(pipe, state, bound, lines)
    result = second.run("blocks")
    after = json.loads(state.read_text())["measurements"]
    assert after[: len(before)] == before
    assert len(after) == result.measurements == len(before) + sum(": met" in t or "not met" in t for t in lines)

    lines.clear()
    again = searched(pipe, state, Bound("psnr", 20.0, "mean"), lines).run(
        "blocks"
    )  # another bound, nothing to generate
    assert lines == []
    assert again.measurements == result.measurements


def test_a_state_of_other_settings_or_none_at_all_is_refused(tmp_path: Path) -> None:
    state, bound = tmp_path / "s.json", Bound("relative_l2", 10.0)
    searched(Pipeline(), state, bound).run("blocks")
    with pytest.raises(SearchError, match=r"other settings \(options: .*'tensor'.*, now .*'row'"):
        searched(Pipeline(), state, bound, granularity="row")
    with pytest.raises(SearchError, match=r"other settings \(weights: "):
        searched(with_outlier(Pipeline(), block=0), state, bound)
    good = json.loads(state.read_text())
    whole = good["measurements"][0]["quality"]
    without = {name: {m: v for m, v in of.items() if m != "ssim"} for name, of in whole.items() if name != "pictures"}
    damaged: list[dict[str, Any]] = [
        {"measurements": [measured]}
        for measured in (
            {},
            [],
            {"kept": ["blocks.9"], "quality": whole},
            {"kept": [], "quality": {}},
            {"kept": [], "quality": without},
            {"kept": [], "quality": {**whole, "worst": {**whole["worst"], "ssim": "good"}}},
        )
    ]
    blocks = good["layers"]["transformer"]
    for layers in (
        [],
        {"transformer": []},
        {"unet": blocks},
        {"transformer": {"blocks.9": []}},
        {"transformer": {**blocks, "blocks.1": [1]}},
    ):
        damaged.append({"layers": layers})
    for wrong in damaged:
        state.write_text(json.dumps({**good, **wrong}))
        with pytest.raises(SearchError, match=r"s\.json' is no state of a search: .*; remove it"):
            searched(Pipeline(), state, bound)
    for text in ("{", "[]", '{"settings": {}}'):
        state.write_text(text)
        with pytest.raises(SearchError, match="is no state of a search"):
            searched(Pipeline(), state, bound)


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    bound = Bound("relative_l2", 0.1)
    with pytest.raises(fp8_compile.NothingConvertedError, match="narrower than min_features 4096"):
        searched(Pipeline(), tmp_path / "a.json", bound, min_features=4096)
    with pytest.raises(SearchError, match="name their repeated blocks"):
        Search(Variants(Pipeline(), OPTIONS, whole=True), bound, ["a"], [0], tmp_path / "b.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match=r"s\.json' cannot be written: .*file' is a file, not a folder"):
        searched(Pipeline(), tmp_path / "file" / "s.json", bound)
    with pytest.raises(SearchError, match=r"cannot be written: .* is a folder"):
        searched(Pipeline(), tmp_path, bound)
    for prompts, seeds, message in (
        ([], [0], r"prompts: expected at least one, got \[\]"),
        (["a"], [], r"seeds: expected at least one, got \[\]"),
    ):
        with pytest.raises(SearchError, match=message):
            Search(Variants(Pipeline(), OPTIONS), bound, prompts, seeds, tmp_path / "d.json")
    with pytest.raises(SearchError, match="expected a list of prompts, got 'a cat'"):
        Search(Variants(Pipeline(), OPTIONS), bound, "a cat", [0], tmp_path / "d.json")
    with pytest.raises(SearchError, match="by='rows' is not valid; valid: layers, blocks, blocks-then-layers"):
        searched(Pipeline(), tmp_path / "c.json", bound).run("rows")


def test_the_page_shows_the_path_and_needs_nothing_else(tmp_path: Path) -> None:
    search = searched(with_outlier(Pipeline(), block=1), tmp_path / "s.json", Bound("relative_l2", 0.08))
    result = search.run("blocks")
    page = Page(search_page.html(search, result))
    assert len(page.loads) == 2 * (1 + 2 * result.measurements)  # pictures, and but for BF16 their heatmaps
    assert all(load.startswith("data:image/webp;base64,") for load in page.loads)
    assert page.tags.count("circle") == result.measurements
    assert len(page.links) == 2 * result.measurements  # of marks, and of rows
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(Page(search_page.html(search, result, pictures=1)).loads) == 1 + 2 * result.measurements
    with pytest.raises(SearchError, match="pictures: expected a number of at least 1, got 0"):
        search_page.html(search, result, pictures=0)
    assert paste(result) in page.texts
    assert "relative_l2 of the worst picture at most 0.08" in page.texts  # the line of the bound


def test_pictures_of_an_earlier_run_are_on_the_page_and_missing_ones_are_told(tmp_path: Path) -> None:
    bound = Bound("relative_l2", 0.08)
    first = searched(with_outlier(Pipeline(), block=1), tmp_path / "s.json", bound)
    made = search_page.html(first, first.run("blocks"))
    again = searched(with_outlier(Pipeline(), block=1), tmp_path / "s.json", bound)
    result = again.run("blocks")
    assert Page(search_page.html(again, result)).loads == Page(made).loads
    again.pictures.file(2, 0, "-heat").unlink()
    page = Page(search_page.html(again, result))
    assert f"1 of {result.measurements + 1} have no pictures in {tmp_path / 's-pictures'}" in " ".join(page.texts)
    assert "#pictures-2" not in page.links
    assert "#pictures-3" in page.links
    again.pictures.file(0, 0).unlink()
    page = Page(search_page.html(again, result))
    assert page.loads == page.links == []


def test_pictures_of_another_search_are_not_taken(tmp_path: Path) -> None:
    state, bound = tmp_path / "s.json", Bound("relative_l2", 10.0)
    searched(Pipeline(), state, bound)
    assert json.loads(state.read_text())["measurements"] == []  # the folder belongs to the search before it measures
    searched(Pipeline(), state, bound).run("blocks")
    state.unlink()
    with pytest.raises(SearchError, match=r"s-pictures' has pictures of a search whose state .*s\.json' is not there"):
        searched(Pipeline(), state, bound)


def test_large_pictures_are_kept_smaller(tmp_path: Path) -> None:
    pictures = SearchPictures(tmp_path / "s.json")
    samples = [Sample("a", 0, Image.new("RGB", (1024, 768), name), torch.zeros(1, 1)) for name in ("black", "white")]
    pictures.write(0, samples[:1])
    pictures.write(1, samples[1:], samples[:1])
    assert pictures.size() == 512
    with Image.open(pictures.file(1, 0, "-heat")) as heat:
        assert heat.size == (512, 384)


@pytest.mark.slow
def test_outliers_of_a_real_model_are_found_by_block_and_by_layer(tmp_path: Path) -> None:
    pipe = qwen_image_with_outliers(blocks=3, hard=1, factor=2.0**18)
    # "eager" compiles fastest, and rewrites and quantizes as the others do.
    variants = Variants(pipe, {"inner_backend": "eager", "granularity": "tensor"})
    call = {"height": 64, "width": 64, "num_inference_steps": 2}
    search = Search(variants, Bound("relative_l2", 0.06), ["a red circle"], [0], tmp_path / "s.json", **call)
    outside = ("time_text_embed", "txt_in", "norm_out")
    assert search.run("blocks").patterns == {"transformer": ("transformer_blocks.1", *outside)}
    found = [name for name in search.run("blocks-then-layers").patterns["transformer"] if name not in outside]
    # Those that `add_outliers` changes, by their input or by their rows; not the second linears of the MLPs.
    sensitive = re.compile(r"transformer_blocks\.1\.(attn\.(to|add)_.*|(img|txt)_mlp\.net\.0\.proj|(img|txt)_mod\.1)")
    assert found
    assert all(sensitive.fullmatch(path) for path in found)
    assert len(found) < 12  # of 14


SMALL = ["--steps", "2", "--seed", "0", "--prompt", "a large red circle on a white background"]
SMALL += ["--inner-backend", "eager"]


@pytest.mark.slow
def test_attention_is_one_more_thing_to_keep(tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image

    pipe: Any = build_qwen_image()
    pipe.set_progress_bar_config(disable=True)
    variants = Variants(pipe, {**OPTIONS, "attention": "fp8-emulated"})
    call = {"height": 64, "width": 64, "num_inference_steps": 2}
    search = Search(variants, Bound("psnr", 90.0), ["a"], [0], tmp_path / "s.json", **call)
    (blocks,) = {layer.block for layer in search.layers if layer.path == "attn.sdpa"} - {"transformer_blocks.1"}
    assert blocks == "transformer_blocks.0"
    assert search.run("layers").patterns["transformer"][-1] == "attn.sdpa"
    assert {layer.path for layer in search.layers} >= {"attn.sdpa", "attn.to_q"}
    # Keeping all but the attention and nothing but it are two choices, each the sum of what its names say.
    attention = frozenset(layer for layer in search.layers if layer.path == "attn.sdpa")
    linears = frozenset(search.layers) - attention
    losses = [search.measure(kept)["worst"]["relative_l2"] for kept in (attention, linears, frozenset(search.layers))]
    assert losses[0] > losses[1] > losses[2] == 0
    search.variants.close()


def test_the_command_searches_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["search", *SMALL, "--by", "blocks", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--max-loss", "1.5"])
    assert done.exit_code == 0, done.output
    assert "asked for: relative_l2 of the worst picture at most 1.5" in done.output
    assert "'ignored_layers': [" in done.output
    state = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [measured["kept"] for measured in state["measurements"]] == [[]]
    assert (tmp_path / "out" / "search.html").read_text().startswith("<!doctype html>")
    # A bound that FP8 cannot meet, by measuring on: everything is kept.
    done = CliRunner().invoke(app, [*arguments, "--metric", "psnr", "--min-quality", "150"])
    assert done.exit_code == 0, done.output
    blocks = list(state["layers"]["transformer"])
    assert f"'ignored_layers': {blocks!r}"[:-1] in done.output
    done = CliRunner().invoke(app, [*arguments, "--max-loss", "1.5", "--granularity", "tensor"])
    assert done.exit_code == 2
    assert "belongs to a search with other settings" in done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"search.json", "search-pictures", "search.html", "layers.json"}  # as they were

    def stopped(self: Search, by: str) -> None:
        raise SearchError("stopped")

    monkeypatch.setattr(Search, "run", stopped)
    done = CliRunner().invoke(app, [*arguments, "--max-loss", "0.1"])
    assert done.exit_code == 2, done.output
    # The results of the other bound would be taken for those of this one.
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"search.json", "search-pictures"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --max-loss (for relative_l2, lpips) or --min-quality (for psnr, ssim, cosine), one of the two"),
        (["--max-loss", "1", "--min-quality", "1"], "one of the two"),
        (["--max-loss", "30", "--metric", "psnr"], "psnr is greater for better pictures; use --min-quality"),
        (["--min-quality", "0.1"], "relative_l2 is less for better pictures; use --max-loss"),
        (["--max-loss", "0.1", "--metric", "mse"], "metric='mse' is not valid"),
        (["--max-loss", "0.1", "--by", "rows"], "--by 'rows' is not valid; valid: layers, blocks, blocks-then-layers"),
        (["--max-loss", "0.1", "--granularity", "column"], "granularity='column' is not valid"),
        (["--max-loss", "0.1", "--small-m", "drop"], "small_m='drop' is not valid"),
        (["--max-loss", "0.1", "--dtype", "float32"], "use one of those"),
        (["--max-loss", "0.1", "--output", __file__], "cannot be written: "),
    ],
)
def test_bad_input_ends_with_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["search", "--output", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


def test_equal_settings_with_tuples_and_functions_are_resumed(tmp_path: Path) -> None:
    state, bound = tmp_path / "s.json", Bound("relative_l2", 10.0)

    def resumed() -> Search:
        options = {**OPTIONS, "inner_backend": eager, "disabled_passes": ("real_rotary",)}
        return Search(Variants(Pipeline(), options), bound, ["a"], [0], state, num_inference_steps=2)

    measured = resumed().run("blocks").measurements
    assert resumed().run("blocks").measurements == measured
    assert to_jsonable({1: (math.nan, [math.inf]), "f": eager}) == {"1": ["NaN", [None]], "f": f"{__name__}.eager"}
    assert "0x" not in to_jsonable(object())


def eager(gm: Any, inputs: Any) -> Any:
    return gm.forward


def test_another_text_encoder_or_scheduler_is_another_search(tmp_path: Path) -> None:
    state, bound = tmp_path / "s.json", Bound("relative_l2", 10.0)

    def pipeline(bias: float, shift: float) -> Any:
        pipe: Any = Pipeline()
        encoder = torch.nn.Linear(256, 256).bfloat16()
        torch.nn.init.constant_(encoder.weight, 0.5)
        torch.nn.init.constant_(encoder.bias, bias)
        fp8_compile.quantize_(encoder)  # whose parameter is no plain tensor
        pipe.scheduler = SimpleNamespace(config={"shift": shift})
        pipe.components = {"transformer": pipe.transformer, "text_encoder": encoder, "tokenizer": None}
        return pipe

    searched(pipeline(0.0, 3.0), state, bound).run("blocks")
    searched(pipeline(0.0, 3.0), state, bound)
    with pytest.raises(SearchError, match=r"other settings \(weights: "):
        searched(pipeline(1.0, 3.0), state, bound)
    with pytest.raises(SearchError, match=r"other settings \(scheduler: "):
        searched(pipeline(0.0, 4.0), state, bound)


def test_a_page_without_a_finite_value_has_no_plot(tmp_path: Path) -> None:
    search = searched(Pipeline(), tmp_path / "s.json", Bound("psnr", 20.0))
    result = search.run("blocks")
    for quality in search.state.measurements.values():
        quality["worst"]["psnr"] = None
    page = Page(search_page.html(search, result))
    assert "svg" not in page.tags
    assert "nothing to plot" in " ".join(page.texts)
