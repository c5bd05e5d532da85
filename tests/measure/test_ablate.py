"""Ablations: the choices, the measurements, and what is written."""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fp8_compile
from fp8_compile.cli.main import app
from fp8_compile.measure import ablation_page
from fp8_compile.measure.ablate import BASELINE, Ablation, AblationError, ablate
from fp8_compile.measure.quality import compare, generate
from fp8_compile.measure.variants import Variants
from tests.support.pages import Page
from tests.support.pipelines import OPTIONS, Pipeline

pytestmark = pytest.mark.pipeline

GROUPS = {"all FP8": (), "skip mlp": ("mlp",), "all kept": ("*",)}
PROMPTS = ("a <b>red</b> circle", "two blue squares")


def test_a_second_user_of_a_pipeline_sees_its_own_graphs() -> None:
    pipe = Pipeline()
    for _ in range(2):
        found = ablate(Variants(pipe, OPTIONS), {"all": ()}, PROMPTS, (0,), rounds=1)
        assert [row.fp8_layers for row in found.rows] == [0, 12]


def test_compiled_whole_a_block_is_named_by_its_index() -> None:
    variants = Variants(Pipeline(), OPTIONS, whole=True)
    found = ablate(variants, {"all": (), "first": ("blocks.0",)}, PROMPTS, (0,), rounds=1)
    assert [row.fp8_layers for row in found.rows] == [0, 13, 9]  # proj_out is in the graph too


def test_a_model_compiled_as_a_whole_is_put_aside() -> None:
    pipe = Pipeline()
    pipe.transformer.compile(backend="fp8_diffusion", options={**OPTIONS, "inner_backend": "eager"})
    generate(pipe, PROMPTS, [0])
    own = pipe.transformer._compiled_call_impl
    with contextlib.closing(Variants(pipe, fp8_compile.Fp8Options(**OPTIONS))) as variants:
        assert variants.options == OPTIONS
        found = ablate(variants, {"all": (), "no mlp": ("mlp",)}, PROMPTS, (0,), rounds=1)
    assert [row.fp8_layers for row in found.rows] == [0, 12, 6]
    assert pipe.transformer._compiled_call_impl is own


def test_times_and_memory_are_those_of_the_pipelines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: asked.append((name, device)) or 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    pipe = Pipeline()
    pipe.device = torch.device("cuda:1")
    ablate(Variants(pipe, OPTIONS), {"all": ()}, PROMPTS[:1], (0,), rounds=1)
    assert {name for name, _ in asked} == {
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"
    }  # fmt: skip
    assert {str(device) for _, device in asked} == {"cuda:1"}


@pytest.fixture(scope="module")
def found() -> Ablation:
    torch.compiler.reset()
    return ablate(Variants(Pipeline(), OPTIONS), GROUPS, PROMPTS, (0, 1), rounds=2, num_inference_steps=4)


def test_every_row_is_measured_against_compiled_bf16(found: Ablation) -> None:
    rows = {row.name: row for row in found.rows}
    assert list(rows) == [BASELINE, *GROUPS]
    assert rows[BASELINE].quality is None
    assert all(len(row.step_seconds) == 2 * 3 and min(row.step_seconds) > 0 for row in rows.values())
    assert found.speedup(rows[BASELINE]) == 1
    row = rows["all FP8"]
    medians = [statistics.median(r.step_seconds) for r in (rows[BASELINE], row)]
    assert found.speedup(row) == pytest.approx(medians[0] / medians[1])
    assert row.quality == compare(rows[BASELINE].samples, row.samples)
    assert len(row.samples) == 4
    assert row.quality is not None
    assert row.quality.worst["relative_l2"] > 0
    kept = rows["all kept"].quality
    assert kept is not None
    assert kept.worst["relative_l2"] == 0

    assert {name: row.fp8_layers for name, row in rows.items()} == {
        BASELINE: 0, "all FP8": 12, "skip mlp": 6, "all kept": 0
    }  # fmt: skip
    # Three blocks with 6 * 64 * 64 weights, and proj_out; an FP8 weight has a byte each, and a float32 scale per row.
    total = 2 * (3 * 6 + 1) * 64 * 64
    assert rows[BASELINE].weight_bytes == rows["all kept"].weight_bytes == total
    assert rows["all FP8"].weight_bytes == total - 3 * 6 * 64 * 64 + 4 * 3 * (64 + 64 + 128 + 64)
    assert rows["skip mlp"].weight_bytes == total - 3 * 2 * 64 * 64 + 4 * 3 * (64 + 64)


def test_json_and_markdown_tell_all_rows(found: Ablation) -> None:
    written = json.loads(found.json())
    assert [row["ignored_layers"] for row in written["rows"]] == [None, [], ["mlp"], ["*"]]
    assert written["rows"][3]["quality"]["worst"]["psnr"] is None  # equal pictures
    assert written["rows"][1]["quality"]["mean"]["psnr"] == found.rows[1].quality.mean["psnr"]  # type: ignore[union-attr]
    assert written["settings"]["call"] == {"num_inference_steps": 4}
    assert written["environment"]["device"] == "cpu"
    table = [line for line in ablation_page.markdown(found).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(GROUPS) + 1
    assert len({line.count("|") for line in table}) == 1
    assert "Measured on cpu" in ablation_page.markdown(found)
    assert "which say nothing of a GPU" in ablation_page.markdown(found)


def test_the_page_holds_everything_and_loads_nothing(found: Ablation) -> None:
    page = Page(ablation_page.html(found, pictures=3))
    assert len(page.loads) == 3 * (1 + 2 * len(GROUPS))  # pictures, and but for BF16 their heatmaps
    assert all(load.startswith("data:image/webp;base64,") for load in page.loads)
    assert len(page.links) == 4 + 2  # of rows, and of marks
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert PROMPTS[0] in page.texts  # escaped, and so not taken for a tag
    assert "b" not in page.tags
    assert page.tags.count("circle") == 2  # that which equals BF16 has no finite PSNR
    assert "1 more were measured and are not shown." in " ".join(page.texts)


@pytest.mark.parametrize(
    ("groups", "call", "error", "message"),
    [
        ({"a": ("to_vv",)}, {}, fp8_compile.PatternError, "did you mean"),
        ({"a": ("mlp", "img_mod")}, {}, AblationError, "'a': 'img_mod' matches none of the layers to_q, to_v, mlp.0"),
        ({}, {}, AblationError, "groups: expected at least one, got {}"),
        ({BASELINE: ()}, {}, AblationError, "is the name of the unquantized row"),
        ({"a": ("*",)}, {}, fp8_compile.NothingConvertedError, r"no layer .* was quantized: ignored_layers: \*"),
        ({"a": ()}, {"num_inference_steps": 1}, AblationError, "one step cannot be timed"),
    ],
)
def test_what_cannot_be_measured_is_refused(groups: Any, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ablate(Variants(Pipeline(), OPTIONS), groups, PROMPTS, (0,), rounds=1, **call)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": {}}, r"groups: expected at least one, got \{\}"),
        ({"prompts": ()}, r"prompts: expected at least one, got \(\)"),
        ({"seeds": []}, r"seeds: expected at least one, got \[\]"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
        ({"rounds": 1.5}, r"rounds: expected an integer of at least 1, got 1\.5"),
        ({"num_inference_steps": 1}, "one step cannot be timed"),
        ({"written": Path(__file__) / "a.json"}, "cannot be written: .* is a file, not a folder"),
    ],
)
def test_a_bad_call_is_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(Variants, "generate", lambda *args, **call: pytest.fail("drawn"))
    given = {"groups": {"all": ()}, "prompts": PROMPTS, "seeds": (0,), "rounds": 1, **wrong}
    with pytest.raises(AblationError, match=message):
        ablate(Variants(Pipeline(), OPTIONS), **given)


def test_a_row_that_fails_is_told_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, file, before = Variants.generate, tmp_path / "out" / "a.json", []

    def failing(self: Variants, *args: Any, **call: Any) -> Any:
        if file.exists():
            before.append([row["name"] for row in json.loads(file.read_text())["rows"]])
        if self._calls.get((self.regions[0], ("mlp",))) is self.regions[0].module._compiled_call_impl:
            raise torch.OutOfMemoryError("no memory\nleft")
        return generate(self, *args, **call)

    monkeypatch.setattr(Variants, "generate", failing)
    groups = {"<mlp>": ("mlp",), "all": ()}
    found = ablate(Variants(Pipeline(), OPTIONS), groups, PROMPTS[:1], (0,), rounds=1, written=file)
    assert before == [[BASELINE], [BASELINE, "<mlp>"]]  # what is known is written at once
    written = json.loads(file.read_text())
    assert [row["failure"] for row in written["rows"]] == ["", "OutOfMemoryError: no memory left", ""]
    assert [row["speedup"] is None for row in written["rows"]] == [False, True, False]
    table = [line for line in ablation_page.markdown(found).splitlines() if line.startswith("|")]
    assert "| &lt;mlp> (failed: OutOfMemoryError: no memory left) |" in table[3]
    assert len({line.count("|") for line in table}) == 1
    assert [i for i in Page(ablation_page.html(found)).ids if "pictures" in i] == ["pictures-1", "pictures-3"]
    with pytest.raises(AblationError, match="pictures: expected a number of at least 1, got 0"):
        ablation_page.html(found, 0)
    with pytest.raises(AblationError, match="every group failed: a: OutOfMemoryError"):
        ablate(Variants(Pipeline(), OPTIONS), {"a": ("mlp",)}, PROMPTS[:1], (0,), rounds=1)


def test_the_command_writes_a_table_json_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "groups.toml").write_text('"text in BF16" = ["txt_mlp"]\n"all" = []\n')
    prompt = "a large red circle on a white background"
    options = ["--steps", "2", "--seed", "0", "--prompt", prompt, "--rounds", "1", "--inner-backend", "eager"]
    options += ["--small-m", "weight-only", "--groups", str(tmp_path / "groups.toml")]
    done = CliRunner().invoke(app, ["ablate", *options, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert [row["name"] for row in written["rows"]] == [BASELINE, "text in BF16", "all"]
    assert written["settings"]["options"]["small_m"] == "weight-only"
    assert 0 < written["rows"][1]["fp8_layers"] < written["rows"][2]["fp8_layers"]
    assert written["rows"][0]["prompt_adherence"]["all"][1] == 1  # the prompt is a scene, so its picture was judged
    assert (tmp_path / "out" / "ablation.md").read_text() in done.output
    assert Page((tmp_path / "out" / "ablation.html").read_text()).ids.count("pictures-3") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "none.json"], "No such file"),
        (["--inner-backend", "inducter"], "inner_backend='inducter' is not valid, did you mean 'inductor'?"),
        (["--dtype", "float32"], "use one of those"),
        (["--steps", "1"], "--steps 1: one step cannot be timed"),
        (["--output", __file__], "cannot be written: "),
        (["--steps", "2", "--height", "40", "--model", "embedded:z-image"], "Height must be divisible by 16 (got 40)"),
        (["--model", "no/such/model"], "'no/such/model' could not be loaded"),
    ],
)
def test_bad_input_ends_with_a_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["ablate", "--output", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert not list(tmp_path.iterdir())


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
PROBE = """<iframe style="width:WIDTHpx;height:600px;border:0"></iframe><pre id="seen"></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
const page = frame.contentDocument;
document.querySelector("#seen").textContent = JSON.stringify({
  width: page.documentElement.scrollWidth,
  pictures: [...page.images].every(image => image.complete && image.naturalWidth > 0),
  marks: [...page.querySelectorAll("circle")].every(mark => mark.getBoundingClientRect().width > 2),
  ground: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  text: frame.contentWindow.getComputedStyle(page.body).color,
}); };
frame.srcdoc = TEXT;
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to show the page in")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (360, True)])
def test_a_browser_shows_the_page(found: Ablation, tmp_path: Path, width: int, dark: bool) -> None:
    text = json.dumps(ablation_page.html(found)).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(PROBE.replace("WIDTH", str(width)).replace("TEXT", text))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", str(tmp_path / "probe.html")], capture_output=True, text=True, check=True, timeout=60
    )
    seen = json.loads(done.stdout.split('<pre id="seen">')[1].split("</pre>")[0])
    assert seen["width"] <= width  # nothing but the table scrolls sideways
    assert seen["pictures"]
    assert seen["marks"]
    ground, ink = (sum(map(int, seen[name][4:-1].split(","))) for name in ("ground", "text"))
    assert (ground < ink) == dark


@pytest.mark.slow
def test_attention_is_one_more_thing_to_keep() -> None:
    """Without FP8 attention, no layer is called so."""
    from bench.tiny import build_qwen_image

    groups = {"all FP8": (), "skip attention itself": ("sdpa",)}
    call: Any = {"height": 64, "width": 64, "num_inference_steps": 2}
    pipe: Any = build_qwen_image()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(AblationError, match="'sdpa' matches none of the layers"):
        ablate(Variants(pipe, OPTIONS), groups, PROMPTS[:1], (0,), rounds=1, **call)
    variants = Variants(pipe, {**OPTIONS, "attention": "fp8-emulated"})
    found = ablate(variants, groups, PROMPTS[:1], (0,), rounds=1, **call)
    assert [(row.fp8_layers > 0, row.fp8_attentions) for row in found.rows] == [(False, 0), (True, 2), (True, 0)]
    page = ablation_page.markdown(found)
    assert "FP8 attentions" in page
    assert ablation_page.IN_VAIN not in page
    for patterns, expected in (((), "fp8"), (("sdpa",), "as-written")):
        (report,) = variants.reports(patterns).values()
        assert {row.decision for row in report.attentions} == {expected}
    variants.close()
