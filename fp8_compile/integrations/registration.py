"""Register with diffusers and transformers when they are imported, before or after this package; import neither.

`integrations.diffusers` and `integrations.transformers` register themselves when they are imported, so all that is done
here is to import them in time: the former when diffusers' tables are loaded, the latter when both are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_DIFFUSERS = "diffusers.quantizers.auto"
_TRANSFORMERS = "transformers.quantizers.auto"


def register() -> None:
    """Put our quantizers into the tables that are loaded, and into the others as soon as they are."""
    importlib.import_module(f"{__package__}.torchao")  # imports nothing of torchao's
    sys.meta_path.insert(0, _WhenLoaded([name for name in (_DIFFUSERS, _TRANSFORMERS) if name not in sys.modules]))
    for tables in (_DIFFUSERS, _TRANSFORMERS):
        if tables in sys.modules:
            _loaded(tables)


def _loaded(tables: str) -> None:
    if tables == _DIFFUSERS:
        importlib.import_module(f"{__package__}.diffusers")
    # The module for transformers builds on that for diffusers, so it waits for both.
    both = f"{__package__}.diffusers" in sys.modules and _TRANSFORMERS in sys.modules
    if both and importlib.util.find_spec("transformers.core_model_loading") is not None:
        importlib.import_module(f"{__package__}.transformers")


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the modules with the tables, and acts once one is executed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        self.names.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _loaded(fullname)

        loader.exec_module = execute_and_register
        return spec
