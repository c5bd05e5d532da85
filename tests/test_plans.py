"""``layers``: what holds for single layers; and that few rows are a property of the layer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fp8_compile
from fp8_compile.errors import OptionError, PatternError, UnmatchedPatternWarning
from tests.support.blocks import LOAD, OPTIONS, WIDTH, model, tokens
from tests.support.sqnr import sqnr

# Quicker to compile: what the rewritten graph computes is what counts here.
EAGER = {"inner_backend": "eager"}
PLAN: dict[str, Any] = {
    "blocks.1.img_mlp.0": "keep",
    "to_k": {"activation_scheme": "none"},
    "img_mlp": {"method": "int8"},
}
EXPECTED = {"to_q": "fp8-row", "to_k": "fp8-weight-only", "img_mlp.0": "int8-row", "img_mlp.2": "int8-row"}


def schemes(made: nn.Module) -> dict[str, str]:
    return {row.path: row.scheme or row.reason for row in fp8_compile.report(made).layers}


@torch.no_grad()
def test_a_plan_is_the_same_whichever_way_a_model_is_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, x = model(), tokens()
    whole = copy.deepcopy(made)
    expected = whole.compile_whole(**EAGER, layers=PLAN)(x)
    found = schemes(whole)
    assert found == {
        **{f"blocks.{i}.{name}": scheme for i in range(3) for name, scheme in EXPECTED.items()},
        "blocks.1.img_mlp.0": "layers: blocks.1.img_mlp.0: keep",
    }
    blocks = copy.deepcopy(made)
    assert torch.equal(blocks.compile_blocks(**EAGER, layers=PLAN)(x), expected)
    assert schemes(blocks) == found

    fp8_compile.quantize_(made, {**LOAD, "layers": PLAN})
    file = tmp_path / "model.safetensors"
    fp8_compile.save_fp8_checkpoint(made, file)
    assert torch.equal(copy.deepcopy(made).compile_blocks(**EAGER)(x), expected)
    with safe_open(file, framework="pt") as opened:
        rows = json.loads(opened.metadata()["fp8_compile"])
    assert {(row["method"], row["options"].get("activation_scheme")) for row in rows} == {
        ("fp8", "dynamic"),
        ("fp8", "none"),
        ("int8", None),
    }
    again = model()
    fp8_compile.load_fp8_checkpoint(again, file)
    assert torch.equal(again.compile_whole(**EAGER)(x), expected)
    assert schemes(again) == {**found, "blocks.1.img_mlp.0": "not in FP8 in the checkpoint"}


@torch.no_grad()
def test_the_first_entry_that_names_a_layer_counts() -> None:
    made = model(1)
    made.compile_whole(**EAGER, layers={"to_q": "keep", "*": {"method": "int8"}})(tokens())
    assert schemes(made)["blocks.0.to_q"] == "layers: to_q: keep"
    assert schemes(made)["blocks.0.to_k"] == "int8-row"
    torch._dynamo.reset()  # to which options that differ in the order of a dict are the same
    made = model(1)
    made.compile_whole(**EAGER, layers={"*": {"method": "int8"}, "to_q": "keep"})(tokens())
    assert schemes(made)["blocks.0.to_q"] == "int8-row"


@torch.no_grad()
def test_an_entry_is_added_to_the_options_of_its_method() -> None:
    made = model(1)
    made.compile_whole(**EAGER, granularity="tensor", layers={"to_q": {"small_m": "keep", "min_m": 64}})(tokens())
    assert schemes(made)["blocks.0.to_q"] == "M is below min_m 64"
    assert schemes(made)["blocks.0.to_k"] == "fp8-tensor"
    fp8_compile.quantize_(made := model(1), {**LOAD, "granularity": "tensor", "layers": {"to_q": {"min_m": 64}}})
    assert made.blocks[0].to_q.weight.scheme.granularity == "tensor"  # type: ignore[union-attr]


@torch.no_grad()
def test_a_conflict_of_two_options() -> None:
    with pytest.raises(PatternError, match=r"layers: 'to_q': is in ignored_layers, too"):
        fp8_compile.quantize_(model(), {**LOAD, "ignored_layers": ["to_q"], "layers": {"to_q": "keep"}})
    options = {"ignored_layers": ["blocks.0"], "layers": {"to_q": {"method": "int8"}}}
    message = r"layers: 'to_q': names blocks.0.to_q, which 'blocks.0' of ignored_layers names, too"
    with pytest.raises(PatternError, match=message):
        fp8_compile.quantize_(model(), {**LOAD, **options})
    for compiled in (model().compile_whole(**EAGER, **options), model().compile_blocks(**EAGER, **options)):
        with pytest.raises(Exception, match=message):
            compiled(tokens())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["to_q"], r"layers=\['to_q'\]: expected a dict, for example \{'img_mod': 'keep'\}"),
        ({"to_q": "leave"}, "layers: 'to_q': expected 'keep' or a dict of options, got 'leave'"),
        ({"to_q": {}}, "layers: 'to_q': expected 'keep' or a dict of options, got {}"),
        ({"to_q": {"method": "fp9"}}, "layers: 'to_q': method='fp9' is not valid, did you mean 'fp8'"),
        ({"to_q": {"granlarity": "row"}}, "layers: 'to_q': granlarity is no option of 'fp8', did you mean 'granular"),
        ({"to_q": {"method": "int8", "granularity": "row"}}, "layers: 'to_q': granularity belongs to method 'fp8'"),
        ({"to_q": {"ignored_layers": ["x"]}}, "layers: 'to_q': ignored_layers is no option of 'fp8'"),
        ({"re:(": "keep"}, r"layers: 're:\(': not a valid regular expression"),
        ({"to_q": {"granularity": "row", "weight_block_size": [1, 128]}}, "layers: 'to_q': .* exclude each other"),
    ],
)
def test_what_is_not_valid(layers: Any, message: str) -> None:
    with pytest.raises((OptionError, PatternError), match=message):
        fp8_compile.quantize_(model(), {**LOAD, "layers": layers})


def test_entries_that_name_nothing() -> None:
    with pytest.raises(PatternError, match=r"layers: 'img_mlpp': no layer has a segment 'img_mlpp'; did you mean"):
        fp8_compile.quantize_(model(), {**LOAD, "layers": {"img_mlpp": "keep"}})
    with pytest.warns(UnmatchedPatternWarning, match="layers: 'vision_tower' matched none of the 12 linears"):
        fp8_compile.quantize_(model(), {**LOAD, "layers": {"vision_tower": {"method": "int8"}}})


def test_load_time_refuses_what_needs_a_graph() -> None:
    with pytest.raises(OptionError, match="small_m='keep'"):
        fp8_compile.quantize_(model(), {**LOAD, "layers": {"to_q": {"small_m": "keep"}}})


@torch.no_grad()
def test_compiling_with_another_plan_than_the_weights_have() -> None:
    made = model(1)
    fp8_compile.quantize_(made, {**LOAD, "layers": {"img_mlp": {"method": "int8"}}})
    with pytest.raises(Exception, match="method='fp8': the weights were quantized with method='int8'"):
        copy.deepcopy(made).compile_whole(**EAGER, layers={"img_mlp": {"method": "fp8"}})(tokens())
    made.compile_whole(**EAGER, layers={"to_q": {"activation_scheme": "none"}})(tokens())
    assert schemes(made)["blocks.0.to_q"] == "fp8-weight-only"
    assert schemes(made)["blocks.0.to_k"] == "fp8-row"


class Modulated(nn.Module):
    """A modulation that is fed once per sample, as a vector and as a row of a sequence, and a layer of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.img_mod, self.time, self.mlp = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift = self.img_mod(nn.functional.silu(temb)).unsqueeze(1)
        return self.mlp(x * (1 + shift)) + self.time(temb.unsqueeze(1))


@torch.no_grad()
@pytest.mark.parametrize("loaded", [False, True], ids=["compiled", "load-time"])
def test_a_sample_runs_alike_alone_and_in_a_batch(loaded: bool) -> None:
    torch.manual_seed(0)
    made = Modulated().bfloat16().eval()
    exact = copy.deepcopy(made).float()
    if loaded:
        fp8_compile.quantize_(made, LOAD)
    made.compile(backend="fp8_diffusion", fullgraph=True, dynamic=False, options=OPTIONS)
    x, temb = torch.randn(30, 16, WIDTH).bfloat16(), torch.randn(30, WIDTH).bfloat16()
    alone = torch.cat([made(x[i : i + 1], temb[i : i + 1]) for i in range(8)])
    # As far as each is from the exact result, they are from one another without this: FP8 activations against none.
    assert sqnr(exact(x[:8].float(), temb[:8].float()), alone) < 35
    assert sqnr(alone, made(x[:8], temb[:8])) > 50
    assert sqnr(alone, made(x, temb)[:8]) > 40  # above 16 rows, dequantized weights are rounded to bfloat16
    assert {row.path: row.scheme for row in fp8_compile.report(made).layers} == {
        "img_mod": "fp8-weight-only",
        "time": "fp8-weight-only",
        "mlp": "fp8-row",
    }


def test_the_order_of_entries_counts_whichever_name_of_a_layer_they_mean() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.to_qkv = (nn.Linear(WIDTH, WIDTH).bfloat16() for _ in range(3))
            self.b.weight = self.a.weight

    for named, path in (("b", "a"), ("to_q", "to_qkv")):
        plan = {named: {"method": "int8"}, "*": "keep"}
        fp8_compile.quantize_(made := Tied(), {**LOAD, "layers": plan})
        weight: Any = made.get_submodule(path).weight
        assert weight.scheme.method == "int8"


def test_what_was_said_last_counts() -> None:
    made = model(1)
    fp8_compile.quantize_(made, {**LOAD, "ignored_layers": ["to_q"]})
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(made, {**LOAD, "layers": {"to_q": "keep"}})
    assert schemes(made)["blocks.0.to_q"] == "layers: to_q: keep"
    with pytest.warns(fp8_compile.NothingConvertedWarning):
        fp8_compile.quantize_(made, {**LOAD, "ignored_layers": ["to_q"]})
    assert schemes(made)["blocks.0.to_q"] == "ignored_layers: to_q"
