"""The choices that an ablation compares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8_compile.measure.groups import GroupsError, groups_for, read_groups
from fp8_compile.patterns import first_match
from fp8_compile.recipes.qwen_image import QWEN_IMAGE_GROUPS
from tests.support.pipelines import Pipeline


def test_the_choices_for_qwen_image_are_thirteen_and_all_differ() -> None:
    from bench.tiny import build_transformer

    model = build_transformer()
    linears = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {
        name: frozenset(path for path in linears if first_match(patterns, path))
        for name, patterns in QWEN_IMAGE_GROUPS.items()
    }
    assert len(set(kept.values())) == len(kept) == 13
    assert not kept["all FP8"]
    assert all(any(first_match([p], path) for path in linears) for ps in QWEN_IMAGE_GROUPS.values() for p in ps)
    assert groups_for(model) == QWEN_IMAGE_GROUPS


def test_the_choices_for_other_models_are_the_parts_of_their_blocks() -> None:
    assert groups_for(Pipeline().transformer) == {
        "all FP8": (),
        "skip to_q": ("to_q",),
        "skip to_v": ("to_v",),
        "skip mlp": ("mlp",),
    }


def test_groups_are_read_from_json_and_toml(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text('{"all": [], "some": ["mlp", "re:to_.$"]}')
    (tmp_path / "g.toml").write_text("all = []\nsome = [\"mlp\", 're:to_.$']\n")
    expected = {"all": (), "some": ("mlp", "re:to_.$")}
    assert read_groups(tmp_path / "g.json") == read_groups(tmp_path / "g.toml") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("g.yaml", "", r"groups are read from \.json and \.toml files"),
        ("g.json", "{", "g.json': Expecting property name"),
        ("g.toml", "a = ", "g.toml': Invalid value"),
        ("g.json", "[]", r"expected a table of at least one name and its patterns, got \[\]"),
        ("g.json", "{}", r"expected a table .*, got \{\}"),
        ("g.json", '{"a": ["mlp"], "a": []}', "g.json': 'a' is given twice"),
        ("g.json", '{"a": "mlp"}', "'a': expected a list of patterns, got 'mlp'"),
        ("g.json", '{"a": ["re:("]}', "'a': ignored_layers: 're:\\('"),
        ("g.json", '{"a": [1]}', "'a': ignored_layers: 1"),
        ("g.json", None, "No such file"),
    ],
)
def test_a_file_that_holds_no_groups_is_refused(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(GroupsError, match=message):
        read_groups(tmp_path / name)
