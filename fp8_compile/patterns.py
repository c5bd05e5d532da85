"""Which module paths an entry of ``ignored_layers`` names.

A path is what ``named_modules`` says of the outermost module that is running: ``transformer_blocks.3.img_mlp.net.2``,
also when each block is compiled alone. A pattern matches whole segments anywhere in it:

=====================  ==============================================================================
``img_mlp``            every path with that segment
``attn.to_out``        those two segments, one after the other
``blocks.0.*``         ``*`` stands for any characters, dots included; ``?`` for one within a segment
``re:blocks\\.[0-3]``   a regular expression, searched anywhere in the path (anchor it with ``^``, ``$``)
``to_qkv``             a fused name: also the layers that `FUSED` lists for it
=====================  ==============================================================================

Where parts of a model were compiled, the path within such a part may be matched instead (``re:^img_mlp``). A layer of a
fused name is also named by what names one of those that it was fused of.
A LoRA-wrapped layer bears the wrapped layer's name (PEFT's ``base_layer`` is not part of a path).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import PatternError

# Names of several layers at once: those that diffusers fuses, and what other engines call them (vLLM's
# packed_modules_mapping and vllm-omni's models).
FUSED: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}

LONGEST = 1000
"""Characters of a pattern: a longer expression is a mistake, or made to be slow."""

_ADAPTER_SEGMENTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})


def layer_path(path: str) -> str:
    """``path`` without the wrappers that adapters and compilation put around a layer."""
    return ".".join(s for s in path.split(".") if s not in ("base_layer", "_orig_mod"))


def join(path: str, name: str) -> str:
    """The path of ``name`` below ``path``; either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def parameter_layer(path: str, leaf: str) -> str:
    """The path of the layer whose weight is the parameter ``leaf`` of the module at ``path``."""
    return join(path, "" if leaf == "weight" else leaf)


@functools.lru_cache(maxsize=1 << 16)
def spellings(path: str) -> tuple[str, ...]:
    """``path``, and those of the layers that a layer of a fused name took the place of."""
    segments = path.split(".")
    others = (
        ".".join((*segments[:i], part, *segments[i + 1 :]))
        for i, segment in enumerate(segments)
        for part in FUSED.get(segment, ())
    )
    return path, *others


def is_adapter(path: str) -> bool:
    """Whether ``path`` lies inside a low-rank adapter (PEFT's LoRA) rather than in the model's own layers."""
    return not _ADAPTER_SEGMENTS.isdisjoint(path.split("."))


@dataclass(frozen=True)
class Pattern:
    """One entry of ``ignored_layers``, or of another option.

    Attributes:
        option: whose entry it is, for messages.

    Raises:
        PatternError: the entry is no string, empty, or an invalid regular expression.
    """

    text: str
    option: str = "ignored_layers"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not (self.text.startswith("re:") or all(self.text.split("."))):
            raise PatternError(self.text, "expected a module path such as 'img_mlp'", self.option)
        if self.text == "re:":
            raise PatternError(self.text, "an empty expression would name every layer; '*' does", self.option)
        if len(self.text) > LONGEST:
            problem = f"has {len(self.text)} characters; at most {LONGEST} are allowed"
            raise PatternError(f"{self.text[:40]}...", problem, self.option)
        try:
            _parts(self.text)
        except (re.error, OverflowError, RecursionError, MemoryError) as error:
            raise PatternError(self.text, f"not a valid regular expression: {error}", self.option) from error

    def matches(self, path: str) -> bool:
        """Whether this pattern names ``path``, a path as `layer_path` gives it."""
        if self.text.startswith("re:"):
            return _parts(self.text)[0].search(path) is not None
        # Each part at its first place behind the one before: a later place could not help the parts that follow.
        text, end = f".{path}.", 0
        for part in _parts(self.text):
            found = part.search(text, end)
            if found is None:
                return False
            end = found.end()
        return True


@functools.cache
def _parts(text: str) -> tuple[re.Pattern[str], ...]:
    """What must be found in a path, dots around it, one after the other: one expression, or what lies between ``*``."""
    if text.startswith("re:"):
        return (re.compile(text.removeprefix("re:")),)
    dot = re.escape(".")
    whole = dot + dot.join(_choice(segment) for segment in text.split(".")) + dot
    return tuple(re.compile(part) for part in whole.split("*") if part)


def _choice(segment: str) -> str:
    """An expression for one segment; its ``*`` stay, for `_parts` to split at."""
    names = "|".join(re.escape(name) for name in (segment, *FUSED.get(segment, ())))
    return f"(?:{names})" if segment in FUSED else "*".join(_characters(part) for part in segment.split("*"))


def _characters(part: str) -> str:
    return "".join("[^.]" if c == "?" else re.escape(c) for c in part)


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """The first of ``patterns`` that names ``path``."""
    return _first_match(tuple(patterns), path)


def first_match_of(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of ``patterns`` that names one of ``names``."""
    patterns = tuple(patterns)
    found = {p for name in names if (p := first_match(patterns, name)) is not None}
    return min(found, key=patterns.index, default=None)


@functools.lru_cache(maxsize=1 << 16)
def _first_match(patterns: tuple[str, ...], path: str) -> str | None:
    names, others = _index(patterns)
    among = [names[segment] for segment in path.split(".") if segment in names]
    first = min(among, default=len(patterns))
    for number, pattern in others:
        if number > first:
            break
        if pattern.matches(path):
            return pattern.text
    return patterns[first] if among else None


@functools.lru_cache(maxsize=256)
def _index(patterns: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[int, Pattern]]]:
    """The places of those that are plain names of one segment, by segment; and the others with their places."""
    names: dict[str, int] = {}
    others = []
    for number, text in enumerate(patterns):
        if not _is_name(text):
            others.append((number, Pattern(text)))
            continue
        for name in (text, *FUSED.get(text, ())):
            names.setdefault(name, number)
    return names, others


def matching(patterns: Iterable[str], paths: Iterable[str]) -> set[str]:
    """Those of ``patterns`` that name at least one of ``paths``."""
    paths = dict.fromkeys(paths)
    segments = {segment for path in paths for segment in path.split(".")}

    def names_one(text: str) -> bool:
        if _is_name(text):
            return not segments.isdisjoint((text, *FUSED.get(text, ())))
        return any(map(Pattern(text).matches, paths))

    return {text for text in patterns if names_one(text)}


def _is_name(text: str) -> bool:
    """Whether the pattern is a plain name of one segment."""
    return not (text.startswith("re:") or set(text) & set(".*?"))


def check_unmatched(pattern: str, paths: Iterable[str], option: str = "ignored_layers") -> None:
    """Refuse a pattern that is a misspelt name of a layer.

    Args:
        pattern: matched none of ``paths``.
        paths: of all linears of a model.
        option: whose entry it is.

    Raises:
        PatternError: a segment of it looks like one of a path, or it is written as other tools write patterns.
            Otherwise the function returns: the pattern may well be meant for another model or another part.
    """
    if pattern.startswith("re:"):
        return
    if (problem := _slip(pattern)) is not None:
        raise PatternError(pattern, problem, option)
    known = sorted({segment for path in paths for segment in path.split(".")})
    for segment in pattern.split("."):
        near = _near_name(segment, known)
        if near is not None:
            raise PatternError(pattern, f"no layer has a segment {segment!r}; did you mean {near!r}?", option)


def _slip(text: str) -> str | None:
    """What is wrong with a pattern that matched nothing and is written as other tools write them."""
    if index := re.search(r"\[(\d+)\]", text):
        dotted = re.sub(r"\[(\d+)\]", r".\1", text)
        return f"an index is a segment of its own: {dotted!r}, not [{index[1]}]"
    for separator in ";,":
        if separator in text:
            return f"{separator!r} is in no path; expected a pattern for each entry of a list"
    if text.startswith("^") or text.endswith("$"):
        return f"looks like a regular expression, which begins with 're:': {'re:' + text!r}"
    head, _, leaf = text.rpartition(".")
    if head and leaf in ("weight", "bias"):
        return f"a pattern names layers, not their parameters: {head!r}"
    return None


def _near_name(segment: str, known: Sequence[str]) -> str | None:
    if segment in known or segment.isdigit() or set(segment) & set("*?"):
        return None

    def letters(name: str) -> str:
        return re.sub(r"\d", "", name)

    # attn1 and attn2 are neighbours, not misspellings of each other.
    candidates = [name for name in known if letters(name) != letters(segment)]
    near = difflib.get_close_matches(segment, candidates, n=1, cutoff=0.8)
    return near[0] if near else None


MOST_LISTED = 30
"""Names in a listing, which shall fit a screen."""


def folded(paths: Iterable[str], most: int = MOST_LISTED) -> list[str]:
    """``paths`` as few lines: those that differ in one number alone are one, such as ``blocks.{0..59}.attn.to_q``.

    Args:
        most: entries; where there are more, the last says how many are left out.
    """
    groups: dict[str, list[int]] = {}
    for path in dict.fromkeys(paths):
        head = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1{}", path, count=1)
        number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
        groups.setdefault(head, []).append(-1 if number is None else int(number[1]))
    names = [head.replace("{}", _range(numbers), 1) if "{}" in head else head for head, numbers in groups.items()]
    return names if len(names) <= most else [*names[: most - 1], f"and {len(names) - most + 1} more"]


def _range(numbers: Sequence[int]) -> str:
    """``7``, ``{0..59}`` or ``{0,2,5}``."""
    known = sorted(set(numbers))
    if len(known) == 1:
        return str(known[0])
    if known == list(range(known[0], known[-1] + 1)):
        return f"{{{known[0]}..{known[-1]}}}"
    return f"{{{','.join(map(str, known))}}}"
