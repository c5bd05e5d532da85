"""Models with experts, converted by compiling and at load time: the same constants, and what the report says."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts
from safetensors import safe_open
from torch import Tensor, nn

import fp8_compile
from fp8_compile import Fp8DiffusionConfig, QuantizedWeight
from fp8_compile.errors import PatternError
from fp8_compile.pipelines.inspection import inspect_pipeline
from fp8_compile.schemes import Call, high_precision
from fp8_compile.schemes.fp8 import EXPERTS as EXPERTS_IN_FP8
from fp8_compile.schemes.fp8 import EXPERTS_DECODED, EXPERTS_DEQUANTIZED, Fp8
from fp8_compile.weights.eligible import EXPERTS, LOOP
from tests.support.sqnr import sqnr
from tests.support.zoo_more import SAMPLES

SAMPLE = SAMPLES["NucleusMoEImageTransformer2DModel"]
LOAD: dict[str, Any] = {"min_features": 64}
OPTIONS: dict[str, Any] = {**LOAD, "inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Block(nn.Module):
    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.experts = SwiGLUExperts(64, 64, 4, use_grouped_mm=grouped)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.tensor([8, 0, 3, 13], device=x.device)
        return x + self.experts(self.proj(x), counts)


class Model(nn.Module):
    """What of a diffusers model is about experts, so that it compiles in a second."""

    def __init__(self, grouped: bool = True) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(grouped) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x)
        return x


STACKS = [f"transformer_blocks.{i}.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")]


def model(grouped: bool = True) -> Model:
    return _filled(lambda: Model(grouped))


def nucleus(use_grouped_mm: bool = True) -> Any:
    """Two blocks, both with experts."""
    more = {"num_layers": 2, "dense_moe_strategy": "all_moe", "use_grouped_mm": use_grouped_mm}
    return _filled(lambda: diffusers.NucleusMoEImageTransformer2DModel(**{**SAMPLE.config, **more}))


def _filled(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make()
        for parameter in made.parameters():
            if parameter.dim() == 3:  # which hold what the memory held
                nn.init.normal_(parameter, std=0.1)
    return made.bfloat16().eval()


def draw(m: nn.Module) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if isinstance(m, Model):
            return m(torch.randn(24, 64).bfloat16())
        return m(**SAMPLE.make_inputs(), return_dict=False)[0]


def rows(m: nn.Module) -> dict[str, Any]:
    return {row.path: row for row in fp8_compile.report(m).layers if ".experts." in row.path}


def compiled(m: Any, by_blocks: bool = False, **options: Any) -> Tensor:
    torch.compiler.reset()
    for part in m.transformer_blocks if by_blocks else [m]:
        part.compile(backend="fp8_diffusion", fullgraph=True, options={**OPTIONS, **options})
    return draw(m)


def constants(m: nn.Module) -> list[Tensor]:
    """Of all experts, from wherever they are kept."""
    from fp8_compile.runtime.constants import state_of

    made: list[Tensor] = []
    for weight in (p for p in m.parameters() if p.dim() == 3):
        if isinstance(weight, QuantizedWeight):
            made += weight.constants
        else:
            state = state_of(weight)
            assert state is not None
            (of_weight,) = state.constants.values()
            made += of_weight.tensors
    return made


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("make", "by_blocks", "floor"),
    [
        pytest.param(model, False, 25, id="whole"),
        pytest.param(model, True, 25, id="blocks"),
        pytest.param(nucleus, True, 18, id="NucleusMoE-blocks", marks=pytest.mark.slow),
        pytest.param(nucleus, False, 18, id="NucleusMoE", marks=pytest.mark.slow),
    ],
)
def test_both_entrances(make: Callable[[], Any], by_blocks: bool, floor: float) -> None:
    """The floor of a NucleusMoE is low because an error makes experts choose other tokens."""
    expected = draw(make())
    m, loaded = make(), make()
    # Outside of what is compiled, they would be dequantized at load time, and are left by compiling.
    keep = ["time_text_embed", "img_in", "norm_out", "proj_out"] if by_blocks and make is nucleus else []
    out = compiled(m, by_blocks, ignored_layers=keep)
    assert sqnr(expected, out) > floor
    found = rows(m)
    stacks = [path for path, p in m.named_parameters() if p.dim() == 3]
    assert list(found) == stacks
    assert len(stacks) == 4
    assert {(row.decision, row.scheme, row.reason) for row in found.values()} == {("quantized", "fp8-row", "")}
    for path, row in found.items():
        weight = m.get_parameter(path)
        experts, k, n = weight.shape
        assert (row.in_features, row.out_features) == (k, n)
        assert (row.bytes_before, row.bytes_after) == (weight.nbytes, experts * n * (k + 4))
    report = fp8_compile.report(m)
    assert report.extra_bytes == sum(row.bytes_after for row in report.layers if row.decision == "quantized")

    fp8_compile.quantize_(loaded, {**LOAD, "ignored_layers": keep})
    assert {type(loaded.get_parameter(path)) for path in stacks} == {QuantizedWeight}
    assert rows(loaded)[stacks[0]].bytes_after == found[stacks[0]].bytes_after
    assert same(constants(m), constants(loaded))
    assert torch.equal(compiled(loaded, by_blocks), out)
    assert fp8_compile.report(loaded).extra_bytes == 0
    assert {(row.decision, row.scheme) for row in rows(loaded).values()} == {("quantized", "fp8-row")}


def test_blocks_share_a_graph_and_not_their_experts() -> None:
    m = model()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(m, by_blocks=True)
    assert len(fp8_compile.report(m).graphs) == 1
    made = constants(m)
    assert not torch.equal(made[0].view(torch.uint8), made[4].view(torch.uint8))
    other = compiled(m, by_blocks=True).clone()
    m.get_parameter(STACKS[2]).mul_(-1)
    assert not torch.equal(draw(m), other)  # the constants follow the weight


def test_experts_quantized_in_memory_run_without_compilation() -> None:
    """By their values, as `dequantize` has them: ``[E, K, N]``, each row of ``[N, K]`` with a scale of its own."""
    m = model()
    weight = m.get_parameter(STACKS[0]).clone()
    fp8_compile.quantize_(m, LOAD)
    quantized = m.get_parameter(STACKS[0])
    assert quantized.shape == weight.shape
    assert quantized.stride() == quantized.dequantize().stride()
    assert quantized.nbytes == weight.numel() + 4 * weight.shape[0] * weight.shape[2]
    assert sqnr(weight, quantized.dequantize()) > 30
    assert torch.equal(quantized[1], quantized.dequantize()[1])
    plain = copy.deepcopy(m)
    for path in STACKS:
        owner = plain.get_submodule(path.rpartition(".")[0])
        leaf = path.rpartition(".")[2]
        owner._parameters[leaf] = nn.Parameter(owner.get_parameter(leaf).dequantize(), requires_grad=False)
    assert torch.equal(draw(m), draw(plain))


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("transformer_blocks.0.*", STACKS[:2]),
        ("experts", STACKS),
        ("gate_up_proj", STACKS[::2]),
        ("gate_proj", STACKS[::2]),
        (r"re:\.1\..*down_proj$", STACKS[3:]),
        (STACKS[1], STACKS[1:2]),
    ],
)
def test_patterns(pattern: str, kept: list[str]) -> None:
    m, loaded = model(), model()
    compiled(m, ignored_layers=[pattern])
    fp8_compile.quantize_(loaded, {**LOAD, "ignored_layers": [pattern]})
    for found in (rows(m), rows(loaded)):
        assert [path for path, row in found.items() if row.reason == f"ignored_layers: {pattern}"] == kept
        assert [path for path, row in found.items() if row.decision == "quantized"] == [
            path for path in STACKS if path not in kept
        ]
        assert all(row.bytes_after == row.bytes_before for path, row in found.items() if path in kept)


@pytest.mark.parametrize(
    ("calls", "scheme", "reason"),
    [
        ((high_precision("no kernel"),), "", "no kernel; its quantized weight is dequantized"),
        ((EXPERTS_DECODED,), "fp8-weight-only", EXPERTS_DECODED.reason),
        ((EXPERTS_DEQUANTIZED,), "fp8-weight-only", ""),
    ],
    ids=["none", "Ampere", "activations as they are"],
)
def test_without_a_kernel(calls: tuple[Call, ...], scheme: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in FP8 save memory all the same; beside those in BF16 they would only cost some."""
    monkeypatch.setattr(Fp8, "for_experts", lambda self, m, device: calls)
    m, loaded = model(), model()
    out = compiled(m)
    found = {(row.decision, row.reason) for row in rows(m).values()}
    assert found == {("unquantized", calls[0].reason) if calls[0].reason else ("quantized", "")}
    fp8_compile.quantize_(loaded, LOAD)
    expected = draw(loaded)
    assert sqnr(expected, compiled(loaded)) > 25  # of linears with activations in FP8
    assert {(row.scheme, row.reason) for row in rows(loaded).values()} == {(scheme, reason)}
    assert all(row.bytes_after < 0.6 * row.bytes_before for row in rows(loaded).values())
    assert sqnr(out, expected) > 25


def test_ampere_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for capability, call in (((8, 6), EXPERTS_DECODED), ((8, 9), EXPERTS_IN_FP8), ((9, 0), EXPERTS_IN_FP8)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert Fp8().for_experts(64, cuda) == (call,)


def test_a_misspelt_name_of_experts() -> None:
    for name, meant in (("expert", "experts"), ("gate_upproj", "gate_up_proj")):
        with pytest.raises(PatternError, match=f"did you mean '{meant}'"):
            fp8_compile.quantize_(model(), {**LOAD, "ignored_layers": [name]})
        with pytest.raises(Exception, match=f"did you mean '{meant}'"):
            compiled(model(), ignored_layers=[name])


@pytest.mark.parametrize("at_load", [False, True])
def test_experts_multiplied_in_a_loop_stay(at_load: bool) -> None:
    m = model(grouped=False)
    expected = draw(m)
    if at_load:
        fp8_compile.quantize_(m, LOAD)
    else:
        m.compile(backend="fp8_diffusion", options=OPTIONS)
    assert sqnr(expected, draw(m)) > 25
    assert {(row.decision, row.reason) for row in rows(m).values()} == {("unquantized", LOOP)}
    assert "use_grouped_mm=True" in LOOP


def test_experts_of_an_unknown_kind_stay() -> None:
    class Bmm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 64, 128))

    m = nn.Sequential(Bmm(), nn.Linear(64, 64), nn.Conv1d(64, 64, 64)).bfloat16()
    fp8_compile.quantize_(m, LOAD)
    assert [(row.path, row.reason) for row in fp8_compile.report(m).layers] == [
        ("0.up", EXPERTS),
        ("1", "in no graph that the backend compiled"),
    ]


@pytest.mark.parametrize(
    "options", [{"granularity": "tensor"}, {"weight_block_size": [128, 128]}, {"method": "int8"}], ids=str
)
def test_other_methods_leave_them(options: dict[str, Any]) -> None:
    m, loaded = model(), model()
    compiled(m, **options)
    fp8_compile.quantize_(loaded, {**LOAD, **options})
    for found in (rows(m), rows(loaded)):
        assert {row.decision for row in found.values()} == {"unquantized"}
        assert all(row.reason.startswith("experts: ") for row in found.values())
        assert list(found) == STACKS


def test_files(tmp_path: Path) -> None:
    m, stacks = nucleus(), [path.replace("experts", "img_mlp.experts") for path in STACKS]
    fp8_compile.quantize_(m, {**LOAD, "ignored_layers": stacks[3:]})
    expected = draw(m)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        values, scale = (file.get_tensor(f"{stacks[0]}{suffix}") for suffix in ("", "_scale"))
    assert (values.dtype, tuple(values.shape), tuple(scale.shape)) == (torch.float8_e4m3fn, (4, 128, 64), (4, 128, 1))
    other = nucleus()
    fp8_compile.load_fp8_checkpoint(other, tmp_path / "model.safetensors")
    m.save_pretrained(tmp_path / "saved")
    kind = diffusers.NucleusMoEImageTransformer2DModel
    read = kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    for found in (other, read):
        assert [type(found.get_parameter(path)) for path in stacks] == [QuantizedWeight] * 3 + [nn.Parameter]
        assert same(constants_of_parameters(m), constants_of_parameters(found))
        assert torch.equal(draw(found), expected)
    assert rows(other)[stacks[3]].reason == "not in FP8 in the checkpoint"
    assert rows(read)[stacks[3]].reason == f"ignored_layers: {stacks[3]}"
    loop = nucleus(use_grouped_mm=False)
    fp8_compile.load_fp8_checkpoint(loop, tmp_path / "model.safetensors")  # what nothing multiplies in FP8 is BF16
    assert rows(loop)[stacks[0]].reason == LOOP
    assert torch.equal(loop.get_parameter(stacks[0]), m.get_parameter(stacks[0]).dequantize())


def constants_of_parameters(m: nn.Module) -> list[Tensor]:
    return [c for p in m.parameters() if isinstance(p, QuantizedWeight) for c in p.constants]


def test_files_whose_scales_are_not_of_experts(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    m = model()
    fp8_compile.quantize_(m, LOAD)
    fp8_compile.save_fp8_checkpoint(m, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{STACKS[0]}_scale"] = tensors[f"{STACKS[0]}_scale"][:, :64].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(fp8_compile.CheckpointError, match=r"has shape \[4, 64, 1\]; the scale of experts of shape"):
        fp8_compile.load_fp8_checkpoint(model(), tmp_path / "model.safetensors")


def test_loading_in_fp8(tmp_path: Path) -> None:
    nucleus(use_grouped_mm=False).save_pretrained(tmp_path)
    read = diffusers.NucleusMoEImageTransformer2DModel.from_pretrained(
        tmp_path, use_grouped_mm=True, quantization_config=Fp8DiffusionConfig(**LOAD), torch_dtype=torch.bfloat16
    )
    m = nucleus()
    fp8_compile.quantize_(m, LOAD)
    assert same(constants_of_parameters(m), constants_of_parameters(read))
    assert torch.equal(draw(m), draw(read))
    assert {row.decision for row in rows(read).values()} == {"quantized"}


def test_one_graph_for_experts_that_stay_and_one_for_the_others() -> None:
    m = model()
    compiled(m, by_blocks=True, ignored_layers=["transformer_blocks.0.*"])
    assert [(path, row.decision) for path, row in rows(m).items()] == [
        (path, "unquantized" if path in STACKS[:2] else "quantized") for path in STACKS
    ]
    assert len(fp8_compile.report(m).graphs) == 2


def test_numbers_of_tokens_that_change() -> None:
    class Share(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = model().transformer_blocks[0].experts

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            return self.experts(x, counts)

    m = Share()
    expected = []
    given = [(torch.randn(n, 64).bfloat16(), torch.tensor([n - 9, 0, 9, 0])) for n in (24, 57, 130)]
    expected = [m(*one) for one in given]
    m.compile(backend="fp8_diffusion", fullgraph=True, dynamic=True, options=OPTIONS)
    for one, out in zip(given, expected, strict=True):
        assert sqnr(out, m(*one)) > 24
    assert len(fp8_compile.report(m).graphs) == 1


def test_inspected(tmp_path: Path) -> None:
    m = nucleus()
    index = {"_class_name": "NucleusMoEImagePipeline", "transformer": ["diffusers", type(m).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    m.save_pretrained(tmp_path / "transformer")
    fp8_compile.quantize_(m, LOAD)
    for in_files in (0, fp8_compile.report(m).totals["quantized"]):
        (plan,) = inspect_pipeline(str(tmp_path), {**LOAD, "ignored_layers": []}).denoisers
        assert [row for row in plan.layers if ".experts." in row.path] == list(rows(m).values())
        assert (plan.in_files, plan.bytes_after) == (in_files, sum(p.nbytes for p in m.parameters()))
        m.save_pretrained(tmp_path / "transformer")


def test_what_experts_in_memory_can_do() -> None:
    """State dicts, files of torch.save, and BF16 values that are quantized on their way in."""
    m, plain = model(), model().state_dict()
    fp8_compile.quantize_(m, LOAD)
    expected = draw(m)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    for state_dict in (torch.load(file, weights_only=True), plain):
        for parameter in m.parameters():
            parameter.zero_()
        m.load_state_dict(state_dict)
        assert torch.equal(draw(m), expected)
    m.to(torch.float16).to(torch.bfloat16)
    assert torch.equal(draw(m), expected)
