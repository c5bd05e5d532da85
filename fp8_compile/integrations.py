"""Register with diffusers when it is imported, before or after this package, without importing it.

`diffusers_quantizer` fills diffusers' tables at its own end, so all that is done here is to import it in time.
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

_TABLES = "diffusers.quantizers.auto"


def register() -> None:
    """Put our quantizer into diffusers' tables: now, if they are loaded, or as soon as they are."""
    tables = sys.modules.get(_TABLES)
    if tables is not None and hasattr(tables, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _register()
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


def _register() -> None:
    # By name: whoever imports `diffusers_quantizer` itself gets here while that is half executed.
    importlib.import_module(f"{__package__}.diffusers_quantizer")


class _WhenLoaded(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the module with the tables, and acts once it is executed."""

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

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        loader.exec_module = execute_and_register
        return spec
