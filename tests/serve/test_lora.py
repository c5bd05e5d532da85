"""LoRA adapters from start-up: each request names its own. `test_engine` has that none compiles anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import save_file

from fp8_compile.measure.quality import psnr
from fp8_compile.pipelines.adapters import AdapterError, Adapters
from fp8_compile.pipelines.session import Session
from tests.support.lora_files import TARGETS, write_lora
from tests.support.serving import MODEL, PROMPT, Served, WatchedSession, decoded, serving

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def files(session: WatchedSession, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    transformer = session.pipe.transformer
    return {
        "small": write_lora(transformer, folder / "small.safetensors", 1, 4, TARGETS[:2]),
        "large": write_lora(transformer, folder / "large.safetensors", 2, 8),
    }


@pytest.fixture(scope="module")
def adapted(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    session = Session.load(MODEL, quantized=False)
    session = dataclasses.replace(
        session, adapters=Adapters(session.pipe, {**files, "third": files["large"]}, at_once=2)
    )
    with serving(session, tmp_path_factory.mktemp("pictures")) as made:
        yield made


def test_each_request_has_its_adapter(adapted: Served, files: dict[str, Path]) -> None:
    asked: dict[str, Any] = {
        "none": None,
        "small": {"small": 1.0},
        "large": {"large": 1.0},
        "weak": {"large": 0.3},
        "zero": {"large": 0.0},
        "both": {"small": 1.0, "large": 1.0},
        "both again": {"large": 1.0, "small": 1.0},
        "one and none": {"large": 0.0, "small": 1.0},
    }
    names = ["none", "small", "large", "weak", "none", "both", "small", "zero", "weak", "large", "both again", "both"]
    names += ["one and none"]
    drawn: dict[str, list[bytes]] = {}
    for name in names:
        (item,) = adapted.draw(seed=0, lora=asked[name])
        drawn.setdefault(name, []).append(decoded(item.b64_json).tobytes())
    assert all(len(set(pictures)) == 1 for pictures in drawn.values())
    assert drawn["zero"] == drawn["none"][:1]
    assert drawn["both again"] == drawn["both"][:1]
    assert drawn["one and none"] == drawn["small"][:1]
    assert len({pictures[0] for pictures in drawn.values()}) == 5
    # Against the same adapters, loaded as diffusers does.
    twin = Session.load(MODEL, quantized=False)
    for expected, name in ((["small"], "small"), (["small", "large"], "both")):
        twin.pipe.load_lora_weights(
            files[expected[-1]].parent, weight_name=files[expected[-1]].name, adapter_name=expected[-1]
        )
        twin.pipe.set_adapters(expected)
        picture = twin.call(0, **twin.arguments(prompt=PROMPT)).images[0]
        near = {
            other: psnr(picture, decoded(adapted.draw(seed=0, lora=asked[other])[0].b64_json))
            for other in ("none", "small", "large", "weak", "both")
        }
        assert near.pop(name) > 45, near
        assert max(near.values()) < 40, near
    with pytest.raises(openai.BadRequestError, match="there is no adapter 'other'; valid: small, large, third"):
        adapted.draw(lora={"other": 1.0})
    with pytest.raises(openai.BadRequestError, match="3 adapters, and this server takes 2 at once"):
        adapted.draw(lora={"small": 1.0, "large": 1.0, "third": 1.0})


def test_a_corrupt_file_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    from bench.tiny import build_qwen_image

    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(files["small"].read_bytes()[:1000])
    with pytest.raises(AdapterError, match=r"lora bad='.*corrupt.safetensors' cannot be used"):
        Adapters(build_qwen_image(), {"good": files["large"], "bad": corrupt})
    save_file({"transformer.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="it holds no LoRA weights"):
        Adapters(build_qwen_image(), {"bad": tmp_path / "other.safetensors"})
    save_file(
        {
            f"{module}.x.lora_{matrix}.weight": torch.zeros(1, 1)
            for module in ("transformer", "text_encoder")
            for matrix in "AB"
        },
        tmp_path / "texts.safetensors",
    )
    with pytest.raises(AdapterError, match="it has weights for text_encoder, and only denoisers change their adapters"):
        Adapters(build_qwen_image(), {"bad": tmp_path / "texts.safetensors"})
