"""Text encoders in FP8, by their recipes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fp8_compile.errors import OptionError
from fp8_compile.measure.quality import psnr
from fp8_compile.pipelines.denoisers import PipelineError
from fp8_compile.pipelines.session import Session
from fp8_compile.pipelines.text_encoders import quantize_text_encoders
from fp8_compile.weights.quantized_weight import QuantizedWeight

pytestmark = pytest.mark.pipeline


def test_a_text_encoder_becomes_smaller_and_the_picture_stays_near() -> None:
    plain = Session.load("embedded:qwen-image", quantized=False)
    session = Session.load("embedded:qwen-image", quantized=False, text_encoders="fp8")
    (record,) = session.text_encoders
    assert (record.name, record.kind, record.reason) == ("text_encoder", "Qwen2_5_VLForConditionalGeneration", None)
    encoder = session.pipe.text_encoder
    assert record.bytes_after == sum(parameter.nbytes for parameter in encoder.parameters()) < record.bytes_before
    converted = {name for name, p in encoder.named_parameters() if isinstance(p, QuantizedWeight)}
    assert record.weights == len(converted) > 0
    assert not any("visual" in name or "lm_head" in name for name in converted)
    arguments = session.arguments(prompt="a red circle on a white background")
    assert psnr(plain.call(0, **arguments).images[0], session.call(0, **arguments).images[0]) > 25


def test_what_a_recipe_keeps_stays() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(UMT5Config(vocab_size=64, d_model=256, d_ff=512, d_kv=64, num_layers=1, num_heads=4))
    (record,) = quantize_text_encoders(SimpleNamespace(text_encoder=encoder.bfloat16()), "fp8", "cpu")
    kept = {n for n, p in encoder.named_parameters() if n.endswith("wo.weight") and not isinstance(p, QuantizedWeight)}
    assert len(kept) == 1
    assert record.weights == 6


def test_encoders_that_stay_say_why_and_an_unknown_method_is_refused_before_any_work() -> None:
    kinds = {"text_encoder": type("CLIPTextModel", (nn.Linear,), {}), "text_encoder_2": nn.Linear}
    pipe = SimpleNamespace(**{name: kind(64, 64) for name, kind in kinds.items()}, text_encoder_3=None)
    message = (
        r"no text encoder of SimpleNamespace can be quantized: text_encoder \(CLIPTextModel\): its recipe keeps all "
        r"of it; text_encoder_2 \(Linear\): there is no recipe for it"
    )
    with pytest.raises(PipelineError, match=message):
        quantize_text_encoders(pipe, "fp8", "cpu")
    with pytest.raises(OptionError, match="method='int3' is not valid"):
        Session.load("no/such/model", text_encoders="int3")
