from __future__ import annotations

import re
from random import Random

import pytest

from fp8_compile import Fp8Error, PatternError
from fp8_compile.cli.arguments import parse_patterns
from fp8_compile.patterns import (
    FUSED,
    Pattern,
    _first_match,
    _parts,
    check_unmatched,
    first_match,
    folded,
    is_adapter,
    layer_path,
    matching,
)

WHOLE = "transformer_blocks.3.img_mlp.net.2"


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        # Whole segments, anywhere.
        ("img_mlp", WHOLE, True),
        ("img_mlp", "img_mlp.net.2", True),
        ("img_mlp", "img_mlp", True),
        ("img_mlp", "block.img_mlp", True),
        ("mlp", WHOLE, False),
        ("img", WHOLE, False),
        ("img_mlp", "txt_img_mlp.net.2", False),
        ("img_mlp", "img_mlp2.net.2", False),
        ("img_mlp", "IMG_MLP.net.2", False),
        ("to_q", "attn.to_qkv", False),
        # Several segments, one after the other.
        ("img_mlp.net", WHOLE, True),
        ("img_mlp.net.2", WHOLE, True),
        ("img_mlp.net.2", "img_mlp.net.20", False),
        ("img_mlp.2", WHOLE, False),
        ("net.img_mlp", WHOLE, False),
        ("attn.to_out", "blocks.0.attn.to_out.0", True),
        ("attn.to_out", "blocks.0.attn.norm.to_out.0", False),
        ("transformer_blocks.3", WHOLE, True),
        ("transformer_blocks.3", "transformer_blocks.30.img_mlp.net.2", False),
        ("transformer_blocks.3", "single_transformer_blocks.3.proj_mlp", False),
        ("transformer_blocks.3.img_mlp", "img_mlp.net.2", False),
        ("2", WHOLE, True),
        ("3", WHOLE, True),
        ("0", WHOLE, False),
        # Characters that mean something in a regular expression mean themselves.
        ("img.mlp", "img_mlp", False),
        ("img+mlp", "imggmlp", False),
        ("(img_mlp)", "img_mlp", False),
        ("[it]mg_mlp", "img_mlp", False),
        ("net|attn", "net.2", False),
        # Globs.
        ("blocks.0.*", "blocks.0.attn.to_q", True),
        ("blocks.0.*", "blocks.0", False),
        ("blocks.0.*", "blocks.01.attn", False),
        ("blocks.*.to_q", "blocks.7.attn.to_q", True),
        ("blocks.*.to_q", "blocks.7.attn.to_k", False),
        ("img_*", WHOLE, True),
        ("*_mlp", WHOLE, True),
        ("*mlp*", WHOLE, True),
        ("*", WHOLE, True),
        ("img_*", "txt_img.img", False),
        ("to_?", "attn.to_q", True),
        ("to_?", "attn.to_out", False),
        ("to_?", "attn.to_", False),
        ("to?q", "to.q", False),
        ("blocks.?.attn", "blocks.7.attn", True),
        ("blocks.?.attn", "blocks.17.attn", False),
        # Regular expressions, anywhere unless anchored.
        (r"re:blocks\.[0-3]", "transformer_blocks.2.attn", True),
        (r"re:blocks\.[0-3]\.", "transformer_blocks.20.attn", False),
        (r"re:blocks\.[0-3]", "transformer_blocks.4.attn", False),
        (r"re:^blocks", "transformer_blocks.2", False),
        (r"re:^transformer", "transformer_blocks.2", True),
        (r"re:net\.2$", WHOLE, True),
        (r"re:net$", WHOLE, False),
        (r"re:mlp", WHOLE, True),
        (r"re:to_(q|k)$", "attn.to_k", True),
        (r"re:to_(q|k)$", "attn.to_v", False),
        (r"re:to_qkv", "attn.to_q", False),
        # Fused names of other engines, and modules that really bear them.
        ("to_qkv", "attn.to_q", True),
        ("to_qkv", "attn.to_k", True),
        ("to_qkv", "attn.to_v", True),
        ("to_qkv", "attn.to_qkv", True),
        ("to_qkv", "attn.to_out.0", False),
        ("to_qkv", "attn.add_q_proj", False),
        ("attn.to_qkv", "blocks.3.attn.to_k", True),
        ("attn.to_qkv", "blocks.3.cross.to_k", False),
        ("blocks.*.to_qkv", "blocks.3.attn.to_v", True),
        ("add_kv_proj", "attn.add_k_proj", True),
        ("add_kv_proj", "attn.add_v_proj", True),
        ("add_kv_proj", "attn.add_q_proj", True),
        ("add_kv_proj", "attn.to_k", False),
        ("qkv_proj", "self_attn.k_proj", True),
        ("gate_up_proj", "mlp.up_proj", True),
        ("gate_up_proj", "mlp.down_proj", False),
        ("w13", "feed_forward.w1", True),
        ("w13", "feed_forward.w3", True),
        ("w13", "feed_forward.w2", False),
    ],
)
def test_matches(pattern: str, path: str, expected: bool) -> None:
    assert Pattern(pattern).matches(path) == expected


@pytest.mark.parametrize("fused", FUSED)
def test_fused_names_stand_for_their_parts_and_themselves(fused: str) -> None:
    for name in (fused, *FUSED[fused]):
        assert Pattern(fused).matches(f"blocks.0.{name}")
        assert not Pattern(fused).matches(f"blocks.0.{name}_norm")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("attn.to_q.base_layer", "attn.to_q"),
        ("_orig_mod.blocks.0.to_q", "blocks.0.to_q"),
        ("blocks.0._orig_mod.to_q.base_layer", "blocks.0.to_q"),
        ("attn.to_q.lora_A.default", "attn.to_q.lora_A.default"),
        ("attn.my_base_layer", "attn.my_base_layer"),
        ("", ""),
    ],
)
def test_layer_path(path: str, expected: str) -> None:
    assert layer_path(path) == expected


def test_layer_that_an_adapter_wraps_bears_its_own_name() -> None:
    assert Pattern("attn.to_q").matches(layer_path("blocks.0.attn.to_q.base_layer"))
    assert Pattern("re:to_q$").matches(layer_path("blocks.0.attn.to_q.base_layer"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("attn.to_q.lora_A.default", True),
        ("attn.to_q.lora_B.default", True),
        ("lora_A", True),
        ("attn.to_q.base_layer", False),
        ("attn.to_q", False),
        ("lora_Adapter.to_q", False),
    ],
)
def test_is_adapter(path: str, expected: bool) -> None:
    assert is_adapter(path) == expected


def test_first_match() -> None:
    patterns = ["to_k", "re:to_.", "img_mlp", "*"]
    assert first_match(patterns, "attn.to_q") == "re:to_."
    assert first_match(patterns, "attn.to_k") == "to_k"
    assert first_match(patterns[:3], "norm") is None
    assert first_match([], "attn.to_q") is None


@pytest.mark.parametrize("entry", ["", ".", "...", None, 3, b"img_mlp", ["img_mlp"], ("img_mlp",), {}])
def test_entry_that_is_no_path(entry: object) -> None:
    with pytest.raises(PatternError, match="expected a module path such as 'img_mlp'") as error:
        Pattern(entry)
    assert error.value.pattern == entry
    assert repr(entry) in str(error.value)


def test_an_empty_expression_names_nothing_in_particular() -> None:
    with pytest.raises(PatternError, match="would name every layer; '\\*' does"):
        Pattern("re:")


@pytest.mark.parametrize("entry", ["re:(", "re:[0-3", "re:*", r"re:a{2,1}"])
def test_invalid_regular_expression(entry: str) -> None:
    with pytest.raises(PatternError, match="not a valid regular expression") as error:
        Pattern(entry)
    assert error.value.pattern == entry


def test_pattern_error_is_of_this_package_and_a_value_error() -> None:
    assert issubclass(PatternError, Fp8Error)
    assert issubclass(PatternError, ValueError)


BLOCK = [
    "img_mod.1",
    "attn.to_q",
    "attn.to_k",
    "attn.to_out.0",
    "attn.add_k_proj",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
]
MODEL = [f"transformer_blocks.{i}.{path}" for i in range(3) for path in BLOCK]


@pytest.mark.parametrize("paths", [BLOCK, MODEL], ids=["block", "model"])
@pytest.mark.parametrize(
    ("pattern", "segment", "near"),
    [
        ("img_mpl", "img_mpl", "img_mlp"),
        ("image_mlp", "image_mlp", "img_mlp"),
        ("attn.to_outt", "to_outt", "to_out"),
        ("add_k_porj", "add_k_porj", "add_k_proj"),
        ("img_mpl.net.2", "img_mpl", "img_mlp"),
        ("img_mlp.nett.2", "nett", "net"),
    ],
)
def test_misspelt(pattern: str, segment: str, near: str, paths: list[str]) -> None:
    with pytest.raises(PatternError) as error:
        check_unmatched(pattern, paths)
    assert str(error.value) == (
        f"ignored_layers: {pattern!r}: no layer has a segment {segment!r}; did you mean {near!r}?"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        "txt_mlp",  # another part of the same family
        "proj_mlp",
        "norm_out",
        "ff",
        "lm_head",
        "re:img_mpl",  # a regular expression says what it says
        "img_mpl*",
        "?mg_mpl",
        "attn.img_mlp",  # names that exist, together nowhere
        "gate_up_proj",
        "w13",
        "0",
    ],
)
def test_pattern_for_something_else_is_no_error(pattern: str) -> None:
    check_unmatched(pattern, BLOCK)


@pytest.mark.parametrize("pattern", ["attn2", "attn2.to_q", "attn12"])
def test_numbered_neighbours_are_no_misspelling(pattern: str) -> None:
    check_unmatched(pattern, ["attn1.to_q", "attn1.to_k", "ff.net.2"])
    check_unmatched(pattern, ["attn.to_q", "attn.to_k", "ff.net.2"])


@pytest.mark.parametrize(
    "pattern", ["transformer_blocks.7", "transformer_blocks.*.txt_mlp", "transformer_blocks.7.img_mlp"]
)
def test_index_in_the_whole_model_is_no_error(pattern: str) -> None:
    check_unmatched(pattern, MODEL)


def wildcard(pattern: str, text: str) -> bool:
    """``*`` is any characters, ``?`` one that is no dot; by trying everything."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(wildcard(pattern[1:], text[i:]) for i in range(len(text) + 1))
    return (
        bool(text)
        and (text[0] == pattern[0] or (pattern[0] == "?" and text[0] != "."))
        and wildcard(pattern[1:], text[1:])
    )


def test_globs_mean_what_trying_everything_finds() -> None:
    random = Random(0)
    for _ in range(3000):
        glob = "".join(random.choices("ab.*?", k=random.randint(1, 6)))
        path = ".".join("".join(random.choices("ab", k=random.randint(1, 2))) for _ in range(random.randint(1, 3)))
        if all(glob.split(".")):
            assert Pattern(glob).matches(path) == wildcard(f"*.{glob}.*", f".{path}."), (glob, path)


@pytest.mark.parametrize("glob", ["****x", "*.*.*.*.*.*.*.*x", "*" * 400 + "x", ".".join(["to_qkv"] * 60)])
def test_globs_are_matched_in_one_pass(glob: str) -> None:
    """Each part between stars is searched for once, by an expression that cannot go back: it repeats nothing."""
    parts = _parts(glob)
    assert len(parts) <= glob.count("*") + 1
    assert not any(set(part.pattern.replace("\\.", "")) & set("*+{") for part in parts)
    assert not Pattern(glob).matches(".".join(["to_q"] * 59 + ["other"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("re:" + "a" * 1000, "has 1003 characters; at most 1000 are allowed"),
        ("re:x{99999999999}", "not a valid regular expression: the repetition number is too large"),
        ("re:" + "(" * 900, "not a valid regular expression: "),
    ],
)
def test_an_expression_that_is_too_much(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        Pattern(text)


def test_many_patterns_and_many_layers() -> None:
    """Plain names are looked up; each of the others is compiled once, and tried once for each distinct path."""
    patterns = [f"name_{i}" for i in range(2000)] + ["*.img_mlp.*", "attn", "name_7"]
    paths = [f"blocks.{i}.{leaf}" for i in range(60) for leaf in ("attn.to_q", "img_mlp.net.2", "norm", "name_7")]
    assert {first_match(patterns, path) for path in paths} == {"attn", "*.img_mlp.*", None, "name_7"}
    before = _first_match.cache_info().misses
    assert first_match(list(patterns), paths[0]) == "attn"
    assert _first_match.cache_info().misses == before
    assert matching(patterns, paths) == {"*.img_mlp.*", "attn", "name_7"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("transformer_blocks[0]", "an index is a segment of its own: 'transformer_blocks.0', not [0]"),
        ("^0$", "looks like a regular expression, which begins with 're:': 're:^0$'"),
        ("attn;img_mlp", "';' is in no path; expected a pattern for each entry of a list"),
        ("attn,img_mlp", "',' is in no path"),
        ("img_mlp.net.2.weight", "a pattern names layers, not their parameters: 'img_mlp.net.2'"),
    ],
)
def test_what_other_tools_would_take_is_explained(pattern: str, message: str) -> None:
    assert not Pattern(pattern).matches(WHOLE)
    with pytest.raises(PatternError, match=re.escape(message)):
        check_unmatched(pattern, [WHOLE])


def test_a_listing_folds_numbers_and_fits_a_screen() -> None:
    paths = [f"transformer_blocks.{i}.{name}" for i in range(60) for name in ("attn.to_q", "img_mlp.net.2")]
    assert folded([*paths, "proj_out", "blocks.0.a", "blocks.2.a"]) == [
        "transformer_blocks.{0..59}.attn.to_q",
        "transformer_blocks.{0..59}.img_mlp.net.2",
        "proj_out",
        "blocks.{0,2}.a",
    ]
    many = folded(f"layer_{i}" for i in range(100))
    assert (len(many), many[-1]) == (30, "and 71 more")


def test_a_comma_in_brackets_separates_nothing_on_the_command_line() -> None:
    given = ["img_mlp, re:blocks\\.[0,1]\\.", "re:x{1,2}(a,b),attn"]
    assert parse_patterns(given)[0] == ["img_mlp", "re:blocks\\.[0,1]\\.", "re:x{1,2}(a,b)", "attn"]
