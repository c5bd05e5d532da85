"""Measures of quality on made-up pictures, and compiled methods against BF16 on the embedded trained pipelines."""

from __future__ import annotations

import functools
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bench.outliers import load, measure
from fp8_compile.embedded import EMBEDDED_CALLS
from fp8_compile.measure.quality import (
    METRICS,
    QualityError,
    Sample,
    compare,
    cosine,
    generate,
    lpips,
    prompt_adherence,
    psnr,
    relative_l2,
    require_lpips,
    ssim,
)
from fp8_compile.measure.scenes import Scene, SceneError, scenes
from tests.support.pipelines import Pipeline

pytestmark = pytest.mark.pipeline

GREY = Image.new("RGB", (64, 64), (100, 100, 100))
RAMP = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def sample(image: Image.Image = RAMP, latents: tuple[float, float] = (1.0, 2.0), prompt: str = "p") -> Sample:
    return Sample(prompt, 0, image, torch.tensor(latents)[:, None] * torch.tensor([[3.0, 4.0]]))


def test_psnr_and_ssim_of_known_pictures() -> None:
    lighter = GREY.point(lambda v: v + 16)
    assert psnr(GREY, lighter) == pytest.approx(20 * math.log10(255 / 16))
    assert psnr(GREY, GREY) == math.inf
    assert ssim(RAMP, RAMP) == pytest.approx(1)
    assert ssim(RAMP, RAMP.transpose(Image.Transpose.FLIP_TOP_BOTTOM)) < 0.6


def test_distances_of_known_latents() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])
    assert relative_l2(a, b) == pytest.approx(1 / 5)
    assert relative_l2(b, a) == pytest.approx(1 / math.sqrt(18))
    assert cosine(a, b) == pytest.approx(21 / (5 * math.sqrt(18)))
    assert cosine(a, -a) == pytest.approx(-1)


def test_a_comparison_holds_the_trajectory_the_mean_and_the_worst() -> None:
    grey = sample(GREY)
    off = replace(grey, image=GREY.point(lambda v: v + 16), latents=grey.latents * torch.tensor([[1.0], [1.5]]))
    near = replace(grey, image=GREY.point(lambda v: v + 4))
    found = compare([grey, grey], [off, near])
    assert found.rows[0].relative_l2 == pytest.approx((0, 0.5))
    assert found.rows[0].cosine == pytest.approx((1, 1))
    assert found.mean["relative_l2"] == pytest.approx(0.25)
    assert found.worst["relative_l2"] == pytest.approx(0.5)
    assert found.worst["psnr"] == pytest.approx(20 * math.log10(255 / 16))
    assert found.mean["psnr"] == pytest.approx(20 * math.log10(255 / 8))
    assert all(metric in str(found) for metric in found.metrics)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nothing_is_worse_than_a_picture_of_nan(order: tuple[int, int]) -> None:
    bad = replace(sample(), latents=torch.full((2, 2), math.nan))
    pictures = [sample(), bad]
    found = compare([sample(), sample()], [pictures[i] for i in order])
    assert all(math.isnan(found.worst[metric]) for metric in ("relative_l2", "cosine"))
    assert found.worst["psnr"] == math.inf


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "1 pictures cannot be compared with 0"),
        ([sample(prompt="q")], "'p', seed 0, cannot be compared with 'q', seed 0"),
        ([replace(sample(), seed=7)], "seed 7"),
        ([replace(sample(), latents=torch.zeros(3, 2))], r"latents of shape \(2, 2\) and \(3, 2\)"),
        ([sample(RAMP.resize((32, 64)))], r"pictures of \(64, 64\) and \(32, 64\) pixels"),
    ],
)
def test_what_does_not_belong_together_is_not_compared(others: list[Sample], message: str) -> None:
    with pytest.raises(QualityError, match=message):
        compare([sample()], others)


def test_what_makes_a_picture_its_own_is_not_given_for_all() -> None:
    with pytest.raises(QualityError, match="output_type='latent': every picture is generated alone"):
        generate(Pipeline(), ["p"], [0], output_type="latent")


def test_prompt_adherence_counts_what_pictures_show() -> None:
    two, three = Scene(2, "square", "blue", "yellow"), Scene(3, "square", "blue", "yellow")
    shown = two.draw(random.Random(0))
    counts = prompt_adherence([sample(shown, prompt=two.caption), sample(shown, prompt=three.caption)])
    assert counts["all"] == counts["count"] == (1, 2)
    assert counts["color"] == counts["shape"] == (2, 2)
    assert "position" not in counts
    with pytest.raises(SceneError, match="'a cat' describes no scene"):
        prompt_adherence([sample(prompt="a cat")])


def test_lpips_is_measured_only_if_asked_for() -> None:
    plain = compare([sample()], [sample()])
    assert plain.metrics == tuple(metric for metric in METRICS if metric != "lpips")
    assert plain.rows[0].lpips is None


def test_lpips_fetches_nothing_and_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    # As little of the two packages as is asked before anything is loaded.
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://example.org/alexnet.pth"))
    models = SimpleNamespace(AlexNet_Weights=weights)
    for name, module in (("lpips", SimpleNamespace()), ("torchvision.models", models)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    require_lpips.cache_clear()
    with pytest.raises(QualityError, match=re.escape(str(tmp_path / "checkpoints" / "alexnet.pth"))):
        lpips(GREY, RAMP)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(QualityError, match=r"lpips.* not installed; LPIPS needs: pip install 'fp8-compile\[lpips\]'"):
        compare([sample()], [sample()], perceptual=True)
    assert not list(tmp_path.iterdir())


def test_lpips_is_that_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("lpips", "torchvision"):
        pytest.importorskip(package, reason=f"{package} is an optional extra", exc_type=(ImportError, RuntimeError))
    from torchvision.models import AlexNet_Weights, alexnet

    # Random weights instead of the released ones, found where torchvision looks for those.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    name = AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save(alexnet().state_dict(), tmp_path / "checkpoints" / name)
    require_lpips.cache_clear()
    assert lpips(GREY, GREY) == 0
    found = compare([sample()], [replace(sample(), image=RAMP.transpose(Image.Transpose.FLIP_TOP_BOTTOM))], True)
    assert found.worst["lpips"] > 0
    require_lpips.cache_clear()


HELD_OUT = [scene.caption for scene in random.Random(0).sample([s for s in scenes() if s.held_out], 6)]
SEEDS = (0, 1)


@functools.cache
def _plain(name: str) -> tuple[Sample, ...]:
    return generate(load(name), HELD_OUT, SEEDS, **EMBEDDED_CALLS[name])


# Of the mean over 12 pictures, and of the worst. Measured for row: 50.2 and 44.2 dB, SSIM 0.997 and 0.996, relative L2
# 0.035 and 0.042, cosine 0.9994 and 0.9992; for tensor: 51.0 and 46.8 dB, the rest the same: there are no outliers.
# Z-Image, row: 54.2 and 52.9 dB, SSIM 0.998 and 0.997, relative L2 0.017 and 0.019; tensor: 54.0, 51.8, 0.018, 0.023.
# int8: 55.1 and 53.1 dB, SSIM 0.998 and 0.996, relative L2 0.012 and 0.013, cosine 0.9999; Z-Image 55.2, 53.9, 0.998,
# 0.997, 0.009, 0.010 and 0.99995.
# Blocks of 128 x 128 ("block"): 50.8 and 46.5 dB, Z-Image 53.8 and 52.0; of 1 x 128 ("group"): 51.5 and 44.8, Z-Image
# 54.2 and 52.7; the rest as for row.
FLOORS: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("qwen-image", "row"): {
        "psnr": (46, 39),
        "ssim": (0.993, 0.988),
        "relative_l2": (0.06, 0.08),
        "cosine": (0.998, 0.997),
    },
    ("qwen-image", "tensor"): {
        "psnr": (47, 41),
        "ssim": (0.993, 0.988),
        "relative_l2": (0.06, 0.08),
        "cosine": (0.998, 0.997),
    },
    ("qwen-image", "block"): {
        "psnr": (46, 41),
        "ssim": (0.993, 0.988),
        "relative_l2": (0.06, 0.08),
        "cosine": (0.998, 0.997),
    },
    ("qwen-image", "group"): {
        "psnr": (47, 39),
        "ssim": (0.993, 0.988),
        "relative_l2": (0.06, 0.08),
        "cosine": (0.998, 0.997),
    },
    ("z-image", "row"): {
        "psnr": (50, 47),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.03, 0.04),
        "cosine": (0.999, 0.998),
    },
    ("z-image", "tensor"): {
        "psnr": (50, 46),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.03, 0.045),
        "cosine": (0.999, 0.998),
    },
    ("qwen-image", "int8"): {
        "psnr": (52, 49),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.02, 0.025),
        "cosine": (0.9997, 0.9995),
    },
    ("z-image", "int8"): {
        "psnr": (52, 50),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.015, 0.02),
        "cosine": (0.9998, 0.9997),
    },
    ("z-image", "block"): {
        "psnr": (49, 46),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.03, 0.04),
        "cosine": (0.999, 0.998),
    },
    ("z-image", "group"): {
        "psnr": (50, 47),
        "ssim": (0.995, 0.992),
        "relative_l2": (0.03, 0.04),
        "cosine": (0.999, 0.998),
    },
}


EVERYDAY = ("row", "int8")


@pytest.mark.parametrize(
    ("name", "choice"),
    [pytest.param(*key, marks=[] if key[1] in EVERYDAY else [pytest.mark.slow]) for key in FLOORS],
)
def test_gate_the_compiled_pipeline_draws_what_bf16_draws(name: str, choice: str) -> None:
    plain = _plain(name)
    quantized = generate(load(name, choice=choice), HELD_OUT, SEEDS, **EMBEDDED_CALLS[name])
    found = compare(plain, quantized)
    for metric, (mean, worst) in FLOORS[name, choice].items():
        better = METRICS[metric]
        assert better(found.mean[metric], mean) == found.mean[metric], f"{metric}, mean:\n{found}"
        assert better(found.worst[metric], worst) == found.worst[metric], f"{metric}, worst:\n{found}"
    assert found.worst["relative_l2"] > 0  # quantization was at work
    assert prompt_adherence(quantized)["all"][0] >= prompt_adherence(plain)["all"][0] - 1


# Measured on these 3 pictures, PSNR, mean: row 39.1 and 43.4 dB, block 36.0 and 38.5 dB, group 43.8 and 47.1 dB, and
# all show what they should; tensor 9.7 and 17.2 dB, and none does; int8 8.5 and 9.8 dB: beside such a value, 127 steps
# leave others nothing.
HARD = {"qwen-image": 2.0**17, "z-image": 2.0**18}


@pytest.mark.slow
@pytest.mark.parametrize("name", HARD)
def test_gate_outliers_spare_finer_scales_and_ruin_one_per_tensor(name: str) -> None:
    found = measure(name, HARD[name], HELD_OUT[:3])
    assert {granularity: measured["right"] for granularity, measured in found.items()} == {
        "BF16": 3,
        "tensor": 0,
        "row": 3,
        "block": 3,
        "group": 3,
        "int8": 0,
        "int8 rotated": 0,
    }
    assert found["tensor"]["psnr_mean"] < 20
    assert found["row"]["psnr_mean"] > 33
    assert found["block"]["psnr_mean"] > 31
    assert found["group"]["psnr_mean"] > found["row"]["psnr_mean"]


def test_gate_a_rotation_spares_int8_the_outliers() -> None:
    """Measured on these 3 pictures, PSNR, mean: int8 13.9 dB and no picture right, rotated 42.0 dB and all."""
    found = measure("qwen-image", 2.0**8, HELD_OUT[:3], ["int8", "int8 rotated"])
    assert found["int8"]["psnr_mean"] < 20
    assert found["int8 rotated"]["psnr_mean"] > 37
    assert found["int8 rotated"]["right"] == 3
