"""Scenes, their captions, and the detector that judges pictures of them."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFilter

from fp8_compile.measure.scene_detector import detect
from fp8_compile.measure.scenes import COLORS, SIZE, Scene, SceneError, parse, scenes

TWO = Scene(2, "square", "blue", "yellow")


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (TWO, "two blue squares on a yellow background"),
        (Scene(1, "circle", "orange", "white"), "an orange circle on a white background"),
        (Scene(4, "cross", "red", "black", "small"), "four small red crosses on a black background"),
        (
            Scene(1, "triangle", "green", "orange", "large", "top"),
            "a large green triangle at the top of an orange background",
        ),
    ],
)
def test_captions_read_like_prompts_and_are_parsed_again(scene: Scene, caption: str) -> None:
    assert scene.caption == caption
    assert parse(f" {caption.capitalize()}. ") == scene


def test_every_scene_has_a_caption_of_its_own() -> None:
    captions = [scene.caption for scene in scenes()]
    assert len(set(captions)) == len(captions) == 6048


@pytest.mark.parametrize(
    "caption", ["", "a cat", "five red circles on a white background", "a red circle on a red background"]
)
def test_a_caption_of_no_scene_is_refused_with_an_example(caption: str) -> None:
    with pytest.raises(SceneError, match="describes no scene; it must read like"):
        parse(caption)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 5}, "count=5: valid for this scene: 1, 2, 3, 4"),
        ({"count": 2.0}, "count=2.0: valid for this scene: 1, 2, 3, 4"),
        ({"color": ["red"]}, "color=['red']: valid for this scene: red, green"),
        ({"shape": "star"}, "shape='star': valid for this scene: circle, square, triangle, cross"),
        ({"color": "pink"}, "color='pink'"),
        ({"background": "blue"}, "background='blue': valid for this scene: red, green, yellow"),
        ({"size": "huge"}, "size='huge': valid for this scene: small, medium, large"),
        ({"position": "top"}, "position='top': valid for this scene: None"),
        ({"count": 1, "position": "corner"}, "position='corner': valid for this scene: None, center, left"),
    ],
)
def test_attributes_of_no_scene_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SceneError, match=re.escape(message)):
        replace(TWO, **wrong)


def test_a_loose_drawing_needs_chance() -> None:
    with pytest.raises(SceneError, match="loose=True: nothing can vary without rng"):
        TWO.draw(loose=True)


def test_the_detector_knows_every_drawn_scene() -> None:
    rng = random.Random(0)
    for scene in rng.sample(list(scenes()), 300):
        verdict = detect(scene.draw(rng)).follows(scene)
        assert all(verdict.values()), (scene, verdict)
        assert ("position" in verdict) == (scene.position is not None)


def test_the_detector_bears_the_blur_and_the_shades_of_a_generated_picture() -> None:
    rng = random.Random(1)
    right = 0
    for scene in rng.sample(list(scenes()), 200):
        picture = scene.draw(rng).filter(ImageFilter.GaussianBlur(0.7)).point(lambda v: min(255, round(v * 0.95 + 8)))
        right += all(detect(picture).follows(scene).values())
    assert right >= 198


@pytest.mark.parametrize(
    "other",
    [
        replace(TWO, count=3),
        replace(TWO, shape="circle"),
        replace(TWO, color="purple"),
        replace(TWO, background="orange"),
        replace(TWO, size="small"),
    ],
)
def test_the_detector_tells_each_attribute_apart(other: Scene) -> None:
    verdict = detect(other.draw(random.Random(2))).follows(TWO)
    wrong = {name for name, good in verdict.items() if not good}
    assert wrong == {name for name in verdict if getattr(other, name) != getattr(TWO, name)}


def test_shapes_that_differ_have_no_common_attribute() -> None:
    picture = Image.new("RGB", (SIZE, SIZE), COLORS["white"])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((6, 6, 25, 25), fill=COLORS["red"])
    pen.ellipse((38, 38, 57, 57), fill=COLORS["green"])
    found = detect(picture)
    assert (found.count, found.shape, found.color, found.size, found.position) == (2, None, None, "medium", None)


def test_an_empty_picture_shows_nothing() -> None:
    found = detect(Image.new("RGB", (SIZE, SIZE), COLORS["black"]))
    assert (found.count, found.shape, found.background) == (0, None, "black")


def test_noise_with_a_region_of_no_colour_of_its_own_shows_no_scene() -> None:
    noise = Image.frombytes("L", (SIZE, SIZE), random.Random(14).randbytes(SIZE * SIZE))
    assert not all(detect(noise.convert("RGB")).follows(TWO).values())
