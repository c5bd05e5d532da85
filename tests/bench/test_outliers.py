"""The transform that makes outlier channels: same function, harder to quantize."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.outlier_channels import OutlierError, add_outliers
from bench.tiny import build_transformer, build_z_image_transformer
from tests.support.sqnr import sqnr


def _model() -> Any:
    torch.manual_seed(0)
    model = build_transformer().eval()
    for block in model.transformer_blocks:
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            nn.init.normal_(modulation.weight, std=0.3)
    return model


def _run(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=torch.randn(1, 16, 64, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(1, 13, 256, generator=generator).to(dtype),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]
    return out


def test_the_function_stays_and_activations_and_weights_have_outliers() -> None:
    model = _model()
    plain, hard = model, copy.deepcopy(model)
    places = add_outliers(hard, 2.0**8, channels=2)
    assert len(places) == 5 * len(model.transformer_blocks)
    assert all(len(channels) == 2 for channels in places.values())
    assert sqnr(_run(plain), _run(hard)) > 90

    largest: dict[str, float] = {}
    for name, m in (("plain", plain), ("hard", hard)):
        handle = m.transformer_blocks[0].attn.to_q.register_forward_pre_hook(
            lambda module, args, name=name: largest.__setitem__(name, args[0].abs().max().item())
        )
        _run(m)
        handle.remove()
    assert largest["hard"] > 50 * largest["plain"]
    rows = hard.transformer_blocks[0].attn.to_v.weight.abs().amax(dim=1)
    assert set(rows.topk(2).indices.tolist()) == set(places["transformer_blocks.0.attn.to_v"])


def test_only_the_chosen_blocks_change() -> None:
    model = _model()
    changed = copy.deepcopy(model)
    add_outliers(changed, 4.0, blocks=[1])
    before, after = model.state_dict(), changed.state_dict()
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert names
    assert all(name.startswith("transformer_blocks.1.") for name in names)


def _updates(model: Any) -> Tensor:
    """What the first block adds to both streams; the streams themselves would hide its error."""
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(1, tokens, 256, generator=generator).bfloat16() for tokens in (16, 13))
    rotary = model.pos_embed([(1, 4, 4)], max_txt_seq_len=13, device=image.device)
    temb = torch.randn(1, 256, generator=generator).bfloat16()
    with torch.no_grad():
        new_text, new_image = model.transformer_blocks[0](image, text, None, temb, rotary)
    return torch.cat([(new_text - text).flatten(), (new_image - image).flatten()])


def test_per_tensor_scales_suffer_most() -> None:
    found = {}
    for name, factor in (("plain", None), ("hard", 2.0**10)):
        model = _model()
        if factor is not None:
            add_outliers(model, factor)
        model.bfloat16()
        expected = _updates(model)
        for granularity in ("row", "tensor"):
            compiled = copy.deepcopy(model)
            options = {"granularity": granularity, "inner_backend": "aot_eager", "strict": True}
            compiled.transformer_blocks[0].compile(backend="fp8_diffusion", fullgraph=True, options=options)
            found[name, granularity] = sqnr(expected, _updates(compiled))
            torch.compiler.reset()
    assert found["plain", "row"] > found["hard", "row"], found
    assert found["hard", "tensor"] < found["hard", "row"] - 3, found
    assert found["hard", "tensor"] < found["plain", "tensor"] - 3, found


def test_a_z_image_keeps_its_function_and_gets_outliers_in_every_linear_of_its_layers() -> None:
    torch.manual_seed(0)
    plain = build_z_image_transformer().eval()
    hard = copy.deepcopy(plain)
    places = add_outliers(hard, 2.0**8)
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(16, 1, 8, 8, generator=generator), torch.randn(13, 256, generator=generator)
    inputs: dict[str, dict[str, float]] = {"plain": {}, "hard": {}}
    out = {}
    for name, model in (("plain", plain), ("hard", hard)):
        for path, linear in model.layers.named_modules():
            if isinstance(linear, nn.Linear) and "adaLN" not in path:
                linear.register_forward_pre_hook(
                    lambda _, args, path=path, name=name: inputs[name].__setitem__(path, args[0].abs().max().item())
                )
        with torch.no_grad():
            out[name] = model([latents], torch.tensor([0.5]), [text], return_dict=False)[0][0]
    assert sqnr(out["plain"], out["hard"]) > 90
    assert len(inputs["hard"]) == 2 * 7
    assert all(inputs["hard"][path] > 30 * largest for path, largest in inputs["plain"].items())
    assert set(places) == {
        f"layers.{i}.{place}"
        for i in range(2)
        for place in ("attention_norm1", "ffn_norm1", "attention.to_v", "feed_forward.w3")
    }
    first, second = (model.noise_refiner.state_dict() for model in (plain, hard))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_of_another_class_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(OutlierError, match=r"Linear has no known places.*QwenImageTransformer2DModel, ZImage"):
        add_outliers(nn.Linear(2, 2), 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 1.0}, r"factor=1\.0: outliers need more than 1"),
        ({"factor": float("nan")}, "factor=nan"),
        ({"factor": float("inf")}, r"factor=inf: weights up to \S+ overflow torch\.float32"),
        ({"factor": 2.0, "blocks": [2]}, r"blocks=\[2\]: the transformer has blocks 0 to 1"),
        ({"factor": 2.0, "channels": 257}, "channels=257: from 1 to 256"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OutlierError, match=message):
        add_outliers(_model(), **arguments)
