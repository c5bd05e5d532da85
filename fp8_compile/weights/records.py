"""What a model remembers of its conversion: plain dicts in its modules, which go along with copies and pickles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..options import KEEP, Fp8Options
from ..patterns import first_match_of, spellings

NOT_A_LINEAR = "no nn.Linear's weight, which is all that quantize_ converts"


def ignored_by(pattern: str) -> str:
    """The reason of a layer that ``pattern`` names."""
    return f"ignored_layers: {pattern}"


def kept_by_plan(pattern: str) -> str:
    """The reason of a layer that ``layers`` says shall stay."""
    return f"layers: {pattern}: {KEEP}"


def narrower(features: tuple[int, int], least: int) -> str | None:
    """Why a linear of so many input and output features stays, or None."""
    return f"narrower than min_features {least}" if min(features) < least else None


_RECORD, _KEPT = "_fp8_quantized", "_fp8_kept"


@dataclass(frozen=True)
class Record:
    """What `fp8_compile.quantize_` was asked of a module, and what it left; kept in the module as a plain dict.

    Attributes:
        options: as the flat dict that the user may give.
        kept: the reason, by path within the module, for each linear that stayed.
        unmatched: entries of ``ignored_layers`` and ``layers`` that named no linear.
        calibrated: where static input scales come from; empty if there are none.
    """

    options: Mapping[str, Any]
    kept: Mapping[str, str]
    unmatched: tuple[str, ...]
    calibrated: str = ""

    def reason(self, module: nn.Module, leaf: str, path: str) -> str | None:
        """Why the parameter ``leaf`` of ``module``, at ``path`` within the recorded module, stays, or None.

        What was not there then is decided on as it would have been.
        """
        if path in self.kept:
            return self.kept[path]
        patterns = self.options.get("ignored_layers", ())
        pattern = first_match_of(patterns, spellings(path))
        if pattern is not None:
            return ignored_by(pattern)
        plan = self.options.get("layers", {})
        entry = first_match_of(plan, spellings(path))
        if entry is not None and plan[entry] == KEEP:
            return kept_by_plan(entry)
        if leaf != "weight" or not isinstance(module, nn.Linear):
            return NOT_A_LINEAR
        least = self.options.get("min_features", Fp8Options.min_features)
        return narrower((module.in_features, module.out_features), least)


def record_of(module: nn.Module) -> Record | None:
    """What ``module`` itself remembers, or None."""
    found = module.__dict__.get(_RECORD)
    if found is None:
        return None
    return Record(found["options"], found["kept"], tuple(found["unmatched"]), found.get("calibrated", ""))


def write_record(module: nn.Module, record: Record) -> None:
    """Let ``module`` remember ``record``. It goes along when the module is copied or pickled."""
    module.__dict__[_RECORD] = {
        "options": dict(record.options),
        "kept": dict(record.kept),
        "unmatched": list(record.unmatched),
        "calibrated": record.calibrated,
    }


def note_kept(module: nn.Module, leaf: str, reason: str | None) -> None:
    """Let ``module`` itself say why its parameter ``leaf`` stays, for when it runs without what has the record."""
    kept = {name: text for name, text in module.__dict__.get(_KEPT, {}).items() if name != leaf}
    if reason is not None:
        kept[leaf] = reason
    module.__dict__.pop(_KEPT, None)
    if kept:
        module.__dict__[_KEPT] = kept


def kept_by_itself(module: nn.Module, leaf: str) -> str | None:
    """Why ``module`` itself says that its parameter ``leaf`` stays, or None."""
    reason: str | None = module.__dict__.get(_KEPT, {}).get(leaf)
    return reason


def delete_records(model: nn.Module) -> None:
    """Let ``model`` and all its parts forget what they were asked."""
    for module in model.modules():
        module.__dict__.pop(_RECORD, None)
        module.__dict__.pop(_KEPT, None)
