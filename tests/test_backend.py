"""The backend as torch.compile drives it: found by name, its errors and warnings, its report, its traces and caches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fp8_compile
from fp8_compile.schemes.fp8 import Fp8
from fp8_compile.schemes.int8 import Int8
from tests.support.blocks import OPTIONS, WIDTH, Model, model, tokens
from tests.support.processes import run_python
from tests.support.sqnr import sqnr


def inner(error: pytest.ExceptionInfo[BackendCompilerFailed]) -> Exception:
    return error.value.inner_exception


@torch.no_grad()
def compiled(m: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return torch.compile(m, backend="fp8_diffusion", options={**OPTIONS, **options})(x)


# --- found by name ---


def test_a_process_that_imports_nothing_of_ours_finds_the_backend() -> None:
    done = run_python("""
        import sys, torch
        assert "fp8_diffusion" in torch.compiler.list_backends()
        assert not any(name.startswith("fp8_compile") for name in sys.modules)
        m = torch.nn.Linear(64, 64).bfloat16()
        options = {"ignored_layers": [], "inner_backend": "aot_eager", "min_features": 64}
        with torch.no_grad():
            torch.compile(m, backend="fp8_diffusion", options=options)(torch.randn(32, 64).bfloat16())
        import fp8_compile
        print(fp8_compile.report(m).totals["quantized"])
    """)
    assert done.stdout.split() == ["1"]


def test_importing_the_package_is_light() -> None:
    done = run_python("""
        import sys, fp8_compile
        heavy = {"diffusers", "transformers", "typer", "rich", "PIL", "peft", "torch._inductor", "torch._dynamo"}
        print(*sorted(heavy & sys.modules.keys()))
    """)
    assert done.stdout.split() == []


def test_no_graph_without_linears_is_touched() -> None:
    seen = []
    backend = lambda gm, inputs: seen.append(gm.code) or gm.forward  # noqa: E731
    x = tokens()
    assert torch.equal(compiled(nn.GELU(), x, inner_backend=backend), nn.GELU()(x))
    assert len(seen) == 1
    assert "quantize" not in seen[0]


# --- errors and warnings ---


def test_gradients_are_refused_with_the_remedy() -> None:
    m = torch.compile(model(), backend="fp8_diffusion", options=OPTIONS)
    with pytest.raises(BackendCompilerFailed, match=r"torch\.no_grad\(\)") as error:
        m(tokens())
    assert isinstance(inner(error), fp8_compile.GradientError)
    with torch.no_grad():
        m(tokens())
    with torch.inference_mode():
        m(tokens())


def test_a_gpu_that_is_too_old_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8_compile import backend, device

    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    device.check_device(cuda, Int8())
    device.check_device(cuda, Fp8())
    with pytest.raises(fp8_compile.UnsupportedDeviceError, match="mps"):
        device.check_device(torch.device("mps"), Fp8())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(fp8_compile.UnsupportedDeviceError, match=r"T4.*7\.5; method 'fp8' needs 8\.0 or higher"):
        device.check_device(cuda, Fp8())

    def refuse(device: torch.device, scheme: Fp8) -> None:
        raise fp8_compile.UnsupportedDeviceError(str(device))

    monkeypatch.setattr(backend, "check_device", refuse)
    started: list[Any] = []
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(model(), tokens(), inner_backend=lambda gm, inputs: started.append(gm))
    assert isinstance(inner(error), fp8_compile.UnsupportedDeviceError)
    assert not started


def test_nothing_converted_is_a_warning_that_counts_the_reasons() -> None:
    with pytest.warns(fp8_compile.NothingConvertedWarning, match=r"none of the 12 linears.*12 x .*min_features 5000"):
        out = compiled(m := model(), x := tokens(), min_features=5000)
    with torch.no_grad():
        assert torch.equal(out, m(x))
    assert {row.reason for row in fp8_compile.report(m).layers} == {"narrower than min_features 5000"}


def test_nothing_converted_is_an_error_under_strict() -> None:
    with pytest.raises(BackendCompilerFailed, match="none of the 12 linears") as error:
        compiled(model(), tokens(), ignored_layers=["blocks"], strict=True)
    assert isinstance(inner(error), fp8_compile.NothingConvertedError)


def test_a_misspelt_pattern_is_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match="did you mean 'img_mlp'") as error:
        compiled(model(), tokens(), ignored_layers=["img_mpl"])
    assert isinstance(inner(error), fp8_compile.PatternError)


@pytest.mark.parametrize("way", ["regional", "whole"])
def test_a_block_index_names_the_block_however_it_is_compiled(way: str) -> None:
    m, x = model(), tokens()
    if way == "whole":
        compiled(m, x, ignored_layers=["blocks.0.*"])
    else:
        m.compile_blocks(ignored_layers=["blocks.0.*"])
        with torch.no_grad():
            m(x)
    kept = {row.path for row in fp8_compile.report(m).layers if row.decision == "unquantized"}
    assert {path.split(".")[1] for path in kept} == {"0"}
    assert len(kept) == 4


def test_a_pattern_that_matches_nothing_is_a_warning_and_a_row() -> None:
    with pytest.warns(fp8_compile.UnmatchedPatternWarning, match="'vision_tower'"):
        compiled(m := model(), tokens(), ignored_layers=["img_mlp", "vision_tower"])
    report = fp8_compile.report(m)
    assert report.unmatched_patterns == ("vision_tower",)
    assert "'vision_tower' matched nothing" in str(report)


def test_a_pattern_for_another_kind_of_block_is_no_complaint(recwarn: pytest.WarningsRecorder) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    m = nn.Sequential(*model(1).blocks, Other().bfloat16())
    for block in m:
        block.compile(backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": ["img_mlp"]})
    with torch.no_grad():
        m(tokens())
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert fp8_compile.report(m).unmatched_patterns == ()


@pytest.mark.filterwarnings("ignore::fp8_compile.NothingConvertedWarning")
def test_a_pattern_of_the_other_half_of_a_broken_graph_is_no_complaint(recwarn: pytest.WarningsRecorder) -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            torch._dynamo.graph_break()
            return self.blocks[1](x)

    m = Broken(2).bfloat16()
    compiled(m, tokens(), ignored_layers=["blocks.1.*"])
    kept = {row.path for row in fp8_compile.report(m).layers if row.decision == "unquantized"}
    assert kept == {f"blocks.1.{name}" for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")}
    assert not [w for w in recwarn if issubclass(w.category, fp8_compile.UnmatchedPatternWarning)]


def test_an_unknown_option_reaches_the_user() -> None:
    with pytest.raises(BackendCompilerFailed, match="unknown option 'ignore_layers', did you mean 'ignored_layers'"):
        compiled(model(), tokens(), ignore_layers=["img_mlp"])


# --- what torch.compile passes ---


@pytest.mark.inductor
def test_mode_reaches_inductor_and_settings_last_for_one_compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, config

    seen: list[dict[str, Any]] = []

    def compile_nothing(gm: Any, inputs: Any, config_patches: dict[str, Any], **_: Any) -> Any:
        seen.append(config_patches)
        return lambda *args: args[:1]

    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing)
    before = config.get_config_copy()
    m, x = model(1), tokens()
    with torch.no_grad():
        torch.compile(m, backend="fp8_diffusion", mode="max-autotune-no-cudagraphs")(x)
        torch.compiler.reset()
        torch.compile(m, backend="fp8_diffusion", options={"mode": "reduce-overhead", "epilogue_fusion": False})(x)
    assert seen[0]["max_autotune"] is True
    assert seen[1]["triton.cudagraphs"] is True
    assert seen[1]["epilogue_fusion"] is False
    assert config.get_config_copy() == before


def test_options_may_be_an_instance() -> None:
    options = fp8_compile.Fp8Options(inner_backend="eager", min_features=WIDTH, ignored_layers=["img_mlp"])
    with torch.no_grad():
        torch.compile(m := model(1), backend="fp8_diffusion", options=options)(tokens())
    assert fp8_compile.report(m).totals["quantized"] == 2


def test_float16_models() -> None:
    m, x = Model().half(), tokens().half()
    with torch.no_grad():
        expected = m(x)
        out = compiled(m, x)
    assert out.dtype == torch.float16
    assert sqnr(expected, out) > 24


def test_autocast_keeps_the_dtype_of_each_layer() -> None:
    m, x = model(1), tokens().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = m(x)
        out = compiled(m, x)
    assert out.dtype == expected.dtype
    assert sqnr(expected, out) > 24
    assert fp8_compile.report(m).totals["quantized"] == 4


def test_an_empty_batch() -> None:
    m = model(1)
    assert compiled(m, tokens(0), min_m=1, ignored_layers=[]).shape == (1, 0, WIDTH)


# --- the report ---


def test_report_as_data() -> None:
    compiled(m := model(2), tokens(), ignored_layers=["img_mlp.0"])
    data = json.loads(json.dumps(fp8_compile.report(m).to_dict()))
    assert [row["path"] for row in data["layers"]] == [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("to_q", "to_k", "img_mlp.0", "img_mlp.2")
    ]
    before = WIDTH * WIDTH * 2
    assert data["layers"][0] == {
        "path": "blocks.0.to_q",
        "in_features": WIDTH,
        "out_features": WIDTH,
        "decision": "quantized",
        "reason": "",
        "scheme": "fp8-row",
        "rows": [32],
        "bytes_before": before,
        "bytes_after": WIDTH * WIDTH + 4 * WIDTH,
        "mixes_samples": False,
    }
    assert data["layers"][2]["reason"] == "ignored_layers: img_mlp.0"
    assert data["layers"][2]["bytes_after"] == data["layers"][2]["bytes_before"] == 4 * before
    assert data["totals"]["quantized"] == 6
    assert data["totals"]["unquantized"] == 2
    assert data["totals"]["extra_bytes"] == 2 * (6 * WIDTH * WIDTH + 4 * 3 * WIDTH)
    assert data["unmatched_patterns"] == []
    assert len(data["graphs"]) == 1


def test_report_as_a_table_folds_equal_blocks() -> None:
    compiled(m := model(3), tokens(), ignored_layers=["img_mlp.0"])
    table = str(fp8_compile.report(m))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert rows["blocks.*.to_q"] == ["3", "64", "64", "quantized", "fp8-row", "32", "0.02", "0.01"]
    assert rows["blocks.*.img_mlp.0"][3:] == ["unquantized", "32", "0.10", "0.10", "ignored_layers:", "img_mlp.0"]
    assert "9 quantized, 3 unquantized" in table


def test_report_tells_for_how_many_rows_a_graph_was_planned() -> None:
    """A graph of dynamic shapes that saw few rows first runs their way with many."""
    m = model(1)
    m.compile(backend="fp8_diffusion", dynamic=True, options={**OPTIONS, "min_m": 16})
    with torch.no_grad():
        for rows in (4, 6, 32):
            m(tokens(rows))
    assert {(row.scheme, row.rows) for row in fp8_compile.report(m).layers} == {("fp8-weight-only", (4,))}


def test_a_module_that_torch_export_made() -> None:
    m = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2 * WIDTH)).bfloat16()
    x = tokens()
    with torch.no_grad():
        exported: Any = torch.export.export(m, (x,)).module()
        exported.compile(backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, "ignored_layers": ["2"]})
        assert sqnr(m(x), exported(x)) > 28
    rows = {row.path: row.reason for row in fp8_compile.report(exported).layers}
    assert rows == {"0": "", "2": "ignored_layers: 2"}


@pytest.mark.parametrize("at_load", [False, True])
def test_a_module_whose_weights_are_handed_to_a_function(at_load: bool) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.layer(self.attn(x, x, x, need_weights=False)[0]))  # type: ignore[no-any-return]

    m, x = Pool().bfloat16().eval().requires_grad_(False), tokens()
    if at_load:
        fp8_compile.quantize_(m, {"min_features": WIDTH})
    m.compile(backend="fp8_diffusion", fullgraph=True, options=OPTIONS)
    with torch.no_grad():
        m(x)
    rows = {row.path: (row.decision, row.reason) for row in fp8_compile.report(m).layers}
    attention, encoder = (
        ("unquantized", f"read by {name}, which is no linear")
        for name in ("multi_head_attention_forward", "_transformer_encoder_layer_fwd")
    )
    assert {path: rows[path] for path in ("attn.out_proj", "layer.linear1", "layer.linear2", "proj")} == {
        "attn.out_proj": attention,
        "layer.linear1": encoder,
        "layer.linear2": encoder,
        "proj": ("quantized", ""),
    }


@pytest.mark.parametrize("at_load", [False, True])
def test_report_tells_of_experts(at_load: bool) -> None:
    """Stacked in one parameter they are no linears, and the report would be silent about most of a model's bytes."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, WIDTH, 2 * WIDTH))
            self.small = nn.Parameter(torch.randn(4, WIDTH, 8))
            self.positions = nn.Parameter(torch.randn(1, 2 * WIDTH, WIDTH))
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.proj(x + self.positions[:, : x.shape[1]]).expand(4, -1, -1)
            return torch.bmm(hidden, self.up), torch.bmm(hidden, self.small)

    m = nn.Sequential(Experts()).bfloat16().eval().requires_grad_(False)
    if at_load:
        fp8_compile.quantize_(m, {"min_features": WIDTH})
    else:
        assert [row.path for row in fp8_compile.report(m).layers] == ["0.proj"]  # of 256 features, by default
        m.compile(backend="fp8_diffusion", fullgraph=True, options=OPTIONS)
        with torch.no_grad():
            m(tokens())
    report = fp8_compile.report(m)
    experts, proj = report.layers
    assert (experts.path, experts.decision, experts.reason) == (
        "0.up",
        "unquantized",
        "experts: a parameter of three dimensions",
    )
    assert (experts.in_features, experts.out_features) == (WIDTH, 2 * WIDTH)
    assert experts.bytes_before == experts.bytes_after == 4 * WIDTH * 2 * WIDTH * 2
    assert (proj.path, proj.decision) == ("0.proj", "quantized")
    assert report.totals["bytes_before"] == experts.bytes_before + proj.bytes_before


def test_report_tells_what_each_pass_did() -> None:
    compiled(m := model(2), tokens(), disabled_passes=["real_rotary"])
    report = fp8_compile.report(m)
    (graph,) = report.graphs
    results = [(r.name, r.matches, r.note) for r in report.passes[graph]]
    assert results == [
        ("plan_linears", 8, ""),
        ("quantize_attention", 0, ""),
        ("rotary_pairs", 0, ""),
        ("float32_attention", 0, ""),
        ("quantize_linears", 8, ""),
        ("real_rotary", None, "disabled"),
        ("sigmoid_gelu", None, "not run by inner_backend 'aot_eager'"),
        ("cast_after_sum", None, "not run by inner_backend 'aot_eager'"),
        ("e4m3_on_cpu", None, "not run by inner_backend 'aot_eager'"),
        ("one_fp8_copy", None, "not run by inner_backend 'aot_eager'"),
    ]
    assert all(r.milliseconds > 0 for r in report.passes[graph][:4])
    assert report.to_dict()["passes"][graph][0]["matches"] == 8
    assert "plan_linears: 8 matches in " in str(report)
    assert "one_fp8_copy: not run by inner_backend 'aot_eager' (1 graphs)" in str(report)


def test_report_names_what_no_graph_reached() -> None:
    m = nn.Sequential(nn.Linear(WIDTH, WIDTH), *model(1).blocks).bfloat16()
    m[1].compile(backend="fp8_diffusion", options=OPTIONS)
    with torch.no_grad():
        m(tokens())
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert rows["0"].reason == "in no graph that the backend compiled"
    assert rows["1.to_q"].decision == "quantized"
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fp8_compile.report("transformer")  # type: ignore[arg-type]


# --- traces ---


def test_torch_logs_shows_decisions_as_they_fall() -> None:
    code = """
        import torch
        from tests.support.blocks import OPTIONS, model, tokens
        with torch.no_grad():
            torch.compile(model(1), backend="fp8_diffusion", options={**OPTIONS, "ignored_layers": ["to_q"]})(tokens())
    """
    log = run_python(code, TORCH_LOGS="+fp8_compile").stderr
    assert "blocks.0.to_q [64 -> 64]: unquantized, ignored_layers: to_q" in log
    assert "blocks.0.img_mlp.2 [256 -> 64]: quantized" in log
    assert "to_q" not in run_python(code).stderr


def test_graphs_and_plan_go_to_files_on_request(tmp_path: Path) -> None:
    compiled(model(1), tokens(), dump_graphs=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "after_quantize_linears.py",
        "before_passes.py",
        "plan.json",
    ]
    assert "quantize_rowwise" not in (folder / "before_passes.py").read_text()
    assert "quantize_rowwise" in (folder / "after_quantize_linears.py").read_text()
    assert json.loads((folder / "plan.json").read_text())[0]["path"] == "blocks.0.to_q"


def test_tlparse_gets_the_plan_and_the_graphs(tmp_path: Path) -> None:
    code = """
        import torch
        from tests.support.blocks import OPTIONS, model, tokens
        with torch.no_grad():
            torch.compile(model(1), backend="fp8_diffusion", options=OPTIONS)(tokens())
    """
    run_python(code, TORCH_TRACE=str(tmp_path))
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("fp8_plan", "fp8_before_passes", "fp8_after_quantize_linears"):
        assert f'"name": "{name}"' in trace


# --- few rows ---


class Modulated(nn.Module):
    """A block's modulation: one row for each picture."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.mod(temb)[:, None].chunk(2, dim=-1)
        return self.proj(nn.functional.layer_norm(x, (WIDTH,)) * (1 + scale) + shift)


@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("pictures", [1, 2])
@torch.no_grad()
def test_modulation_with_its_weight_alone_in_fp8(pictures: int, inner_backend: str) -> None:
    m = Modulated().bfloat16()
    x, temb = tokens().expand(pictures, -1, -1), torch.randn(pictures, WIDTH, dtype=torch.bfloat16)
    options = {**OPTIONS, "inner_backend": inner_backend}
    got = torch.compile(m, backend="fp8_diffusion", fullgraph=True, options=options)(x, temb)
    assert 26 < sqnr(m(x, temb), got) < 60
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert (rows["mod.1"].scheme, rows["proj"].scheme) == ("fp8-weight-only", "fp8-row")
    assert rows["mod.1"].bytes_after == 2 * WIDTH * WIDTH + 4 * 2 * WIDTH


@torch.no_grad()
def test_a_weight_used_with_few_and_with_many_rows_is_quantized_once() -> None:
    m = nn.Linear(WIDTH, WIDTH).bfloat16()
    run = torch.compile(m, backend="fp8_diffusion", fullgraph=True, dynamic=False, options=OPTIONS)
    run(torch.randn(1, WIDTH, dtype=torch.bfloat16))
    run(torch.randn(64, WIDTH, dtype=torch.bfloat16))
    (row,) = fp8_compile.report(m).layers
    assert row.scheme == "fp8-weight-only+fp8-row"
    assert fp8_compile.report(m).extra_bytes == WIDTH * WIDTH + 4 * WIDTH


# --- Inductor and its caches ---


@pytest.mark.inductor
def test_a_second_process_compiles_from_the_cache(tmp_path: Path) -> None:
    code = """
        import torch, fp8_compile
        from tests.support.blocks import model, tokens
        from torch._dynamo.utils import counters
        with torch.no_grad():
            m, x = model(1), tokens()
            torch.manual_seed(0)
            out = torch.compile(m, backend="fp8_diffusion", options={"min_features": 64})(x)
        names = ["fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"]
        print(*(counters["inductor"][n] for n in names), *sorted(counters["aot_autograd"].items()))
        print(*(f"{r.name}: {r.matches} {r.note};" for passes in fp8_compile.report(m).passes.values() for r in passes))
    """
    first, second = (run_python(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).stdout for _ in range(2))
    assert "('autograd_cache_hit'" not in first
    assert "('autograd_cache_miss', 1)" in first
    assert "('autograd_cache_hit', 1)" in second
    assert "autograd_cache_miss" not in second
    before = (
        "plan_linears: 4 ; quantize_attention: 0 ; real_rotary: 0 ; rotary_pairs: 0 ; float32_attention: 0 ; "
        "sigmoid_gelu: 0 ; cast_after_sum: 0 ; quantize_linears: 4 ; e4m3_on_cpu"
    )
    # How many casts there are depends on the CPU.
    assert re.search(rf"{re.escape(before)}: [1-9]\d* ; one_fp8_copy: 0 ;", first)
    assert f"{before}: None from cache; one_fp8_copy: None from cache;" in second


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["QwenImage", "ZImage"])
def test_inductor_compiles_real_blocks(name: str) -> None:
    from tests.support.zoo import MODELS

    tiny = MODELS[name]
    m = tiny.build()
    with torch.no_grad():
        expected = tiny.output(m(**tiny.inputs(0)))
        m.compile_repeated_blocks(backend="fp8_diffusion", fullgraph=True, options={"min_features": 64})  # type: ignore[operator]
        out = tiny.output(m(**tiny.inputs(0)))
    assert sqnr(expected, out) > {"QwenImage": 42, "ZImage": 26}[name]
    assert fp8_compile.report(m).totals["quantized"] > 30


# --- graphs that have something odd in them ---


@pytest.mark.parametrize("whole", [True, False], ids=["alone", "beside a graph break"])
def test_a_graph_without_inputs(whole: bool) -> None:
    """What lies between two graph breaks may make its own tensors only."""

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            grid = torch.arange(3) + 1
            return grid if whole else self.proj(x) * int(grid.sum())

    m = Grid().bfloat16()
    assert torch.equal(compiled(m, tokens()), m(tokens())) or not whole
    assert fp8_compile.report(m).totals["quantized"] == (not whole)


def test_a_block_mask_that_vmap_makes_inside_the_graph() -> None:
    """The tensors that vmap batches have no storage."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q = self.to_q(x).view(1, -1, 4, WIDTH // 4).transpose(1, 2)
            length = x.shape[1]
            mask = create_block_mask(lambda b, h, i, j: i >= j, 1, None, length, length, device="cpu")
            return flex_attention(q, q, q, block_mask=mask)  # type: ignore[return-value]

    m, x = Attention().bfloat16(), tokens(128)
    with torch.no_grad():
        assert sqnr(m(x), compiled(m, x)) > 24
    assert fp8_compile.report(m).totals["quantized"] == 1


def test_batches_of_various_lengths_in_one_nested_tensor() -> None:
    m, x = nn.Linear(WIDTH, WIDTH).bfloat16(), tokens(24)[0]
    nested = torch.nested.nested_tensor([x[:16], x[16:]], layout=torch.jagged)
    with torch.no_grad(), pytest.warns(fp8_compile.NothingConvertedWarning, match="number of rows is known only"):
        assert torch.equal(compiled(m, nested).values(), m(nested).values())


@pytest.mark.filterwarnings("ignore::fp8_compile.NothingConvertedWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64, torch.int32, torch.bool])
@pytest.mark.parametrize("count", [4, 32])
def test_an_input_that_eager_mode_refuses_is_refused(dtype: torch.dtype, count: int) -> None:
    m, x = nn.Linear(WIDTH, WIDTH).bfloat16(), tokens(count).to(dtype)
    for run in (m, lambda x: compiled(m, x)):
        with pytest.raises(Exception, match="must have the same dtype"):
            run(x)


@pytest.mark.parametrize("count", [4, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_of_the_callers_changes_no_arithmetic_of_ours(
    autocast: torch.dtype, dtype: torch.dtype, count: int
) -> None:
    """In float16 the sums of FP8 values, up to 448 * 448 each, would be Inf."""
    m, x = nn.Linear(512, 512).to(dtype), (10 * torch.randn(count, 512)).to(dtype)
    with torch.no_grad():
        true = nn.functional.linear(x.double(), m.weight.double(), m.bias.double())
        without = compiled(m, x)
        with torch.autocast("cpu", autocast):
            out = compiled(m, x)
    assert out.dtype == autocast
    assert sqnr(true, out) > sqnr(true, without) - 1


def test_a_report_of_linears_that_are_no_matrices() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.weight = nn.Parameter(torch.ones(WIDTH * WIDTH, dtype=torch.int8), requires_grad=False)

    m = nn.Sequential(nn.Linear(WIDTH, WIDTH).bfloat16(), Packed(), nn.LazyLinear(WIDTH))
    fp8_compile.quantize_(m, {"min_features": WIDTH})
    rows = {row.path: row for row in fp8_compile.report(m).layers}
    assert [rows[path].decision for path in "012"] == ["quantized", "unquantized", "unquantized"]
    assert (rows["1"].reason, rows["1"].bytes_after) == ("weight is packed by another library", WIDTH * WIDTH)
    assert rows["2"].reason == "weight has no values yet"
