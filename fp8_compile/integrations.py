"""Register with diffusers when it is imported, before or after this package, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLES = "diffusers.quantizers.auto"
NAME = "fp8_diffusion"


def register() -> None:
    """Put our quantizer into diffusers' tables: now, if they are loaded, or as soon as they are."""
    tables = sys.modules.get(_TABLES)
    if tables is not None and hasattr(tables, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _fill(tables)
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


def _fill(tables: Any) -> None:
    from .diffusers_quantizer import Fp8DiffusionConfig, Fp8DiffusionQuantizer

    tables.AUTO_QUANTIZER_MAPPING[NAME] = Fp8DiffusionQuantizer
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = Fp8DiffusionConfig


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the module with the tables, and fills these once it is executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_fill(module: ModuleType) -> None:
            execute(module)
            _fill(module)

        loader.exec_module = execute_and_fill
        return spec
