"""Which module paths an entry of ``ignored_layers`` names.

A path is what ``named_modules`` says, relative to the compiled region: ``transformer_blocks.3.img_mlp.net.2`` when the
whole transformer is compiled, ``img_mlp.net.2`` when each block is. A pattern matches whole segments anywhere in it:

=====================  ==============================================================================
``img_mlp``            every path with that segment
``attn.to_out``        those two segments, one after the other
``blocks.0.*``         ``*`` stands for any characters, dots included; ``?`` for one within a segment
``re:blocks\\.[0-3]``   a regular expression, searched anywhere in the path (anchor it with ``^``, ``$``)
``to_qkv``             a fused name of another engine: the layers that `FUSED` lists for it
=====================  ==============================================================================

A LoRA-wrapped layer bears the wrapped layer's name (PEFT's ``base_layer`` is not part of a path).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import PatternError

# Names under which other engines know several layers at once (vLLM's packed_modules_mapping and vllm-omni's models).
FUSED: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}

_ADAPTER_SEGMENTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})


def layer_path(path: str) -> str:
    """``path`` without the wrappers that adapters and compilation put around a layer."""
    return ".".join(s for s in path.split(".") if s not in ("base_layer", "_orig_mod"))


def is_adapter(path: str) -> bool:
    """Whether ``path`` lies inside a low-rank adapter (PEFT's LoRA) rather than in the model's own layers."""
    return not _ADAPTER_SEGMENTS.isdisjoint(path.split("."))


@dataclass(frozen=True)
class Pattern:
    """One entry of ``ignored_layers``.

    Raises:
        PatternError: the entry is no string, empty, or an invalid regular expression.
    """

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not (self.text.startswith("re:") or all(self.text.split("."))):
            raise PatternError(self.text, "expected a module path such as 'img_mlp'")
        if self.text == "re:":
            raise PatternError(self.text, "an empty expression would name every layer; '*' does")
        try:
            _regex(self.text)
        except re.error as error:
            raise PatternError(self.text, f"not a valid regular expression: {error}") from error

    def matches(self, path: str) -> bool:
        """Whether this pattern names ``path``, a path as `layer_path` gives it."""
        return _regex(self.text).search(path) is not None


@functools.cache
def _regex(text: str) -> re.Pattern[str]:
    if text.startswith("re:"):
        return re.compile(text.removeprefix("re:"))
    choices = ([segment, *FUSED.get(segment, ())] for segment in text.split("."))
    globs = (".".join(choice) for choice in itertools.product(*choices))
    body = "|".join("".join({"*": ".*", "?": "[^.]"}.get(c, re.escape(c)) for c in glob) for glob in globs)
    return re.compile(rf"(?:^|\.)(?:{body})(?:\.|$)")


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """The first of ``patterns`` that names ``path``."""
    return next((text for text in patterns if Pattern(text).matches(path)), None)


def check_unmatched(pattern: str, paths: Sequence[str], whole_model: bool = False) -> None:
    """Refuse a pattern that no path of a complete compiled region matches, where the cause can be told.

    Args:
        pattern: matched none of ``paths``.
        paths: of all linears in the region.
        whole_model: the region is a model, so that nothing is outside of it.

    Raises:
        PatternError: the pattern is a misspelt segment of a path, or names something outside the region by an index.
            Otherwise the function returns: the pattern may well be meant for another model or another part.
    """
    if pattern.startswith("re:"):
        return
    known = sorted({segment for path in paths for segment in path.split(".")})
    segments = pattern.split(".")
    for segment in segments:
        near = _near_name(segment, known)
        if near is not None:
            raise PatternError(pattern, f"no layer has a segment {segment!r}; did you mean {near!r}?")
    if not whole_model and segments[0] not in known and any(s.isdigit() or set(s) & set("*?") for s in segments[1:]):
        raise PatternError(
            pattern,
            f"names layers outside the compiled region, whose layers are {', '.join(paths)}. When every block is "
            "compiled alone, one graph serves all of them and a block's index is not known: leave the index out, or "
            "compile the whole transformer with torch.compile(transformer, ...)",
        )


def _near_name(segment: str, known: Sequence[str]) -> str | None:
    if segment in known or segment.isdigit() or set(segment) & set("*?"):
        return None

    def letters(name: str) -> str:
        return re.sub(r"\d", "", name)

    # attn1 and attn2 are neighbours, not misspellings of each other.
    candidates = [name for name in known if letters(name) != letters(segment)]
    near = difflib.get_close_matches(segment, candidates, n=1, cutoff=0.8)
    return near[0] if near else None
