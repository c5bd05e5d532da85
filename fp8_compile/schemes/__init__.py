"""The methods of quantization: one file each, one line in the table below.

Other packages add a method by an entry point of the group ``fp8_compile.methods``, or by `register_method`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import OptionError, UnknownMethodError
from ..options import DEFAULT_METHOD, Fp8Options, closest
from .fp8 import Fp8
from .int8 import Int8
from .scheme import MOST_ROWS, ONES, Call, Scheme, Spec, check_class, finite, high_precision

__all__ = [
    "DEFAULT_METHOD",
    "MOST_ROWS",
    "ONES",
    "Call",
    "Scheme",
    "Spec",
    "finite",
    "high_precision",
    "method_named",
    "methods",
    "own_options",
    "owner_of",
    "register_method",
    "scheme_for",
    "scheme_named",
]

_METHODS: dict[str, type[Scheme]] = {
    "fp8": Fp8,
    "int8": Int8,
}

ENTRY_POINTS = "fp8_compile.methods"
"""The group whose entry points are methods of other packages: the method's name, and where its class is."""


def register_method(scheme: type[Scheme]) -> None:
    """Make ``method=scheme.method`` available.

    Args:
        scheme: a subclass of `Scheme`, a frozen dataclass whose fields are the method's own options.

    Raises:
        OptionError: it is no such class, or its name is taken.
    """
    name = check_class(scheme).method
    taken = name in _METHODS and _METHODS[name] is not scheme
    if taken or (name in _entry_points() and method_named(name) is not scheme):
        raise OptionError(f"method {name!r} is registered already; registered: {', '.join(methods())}")
    _METHODS[name] = scheme


def methods() -> list[str]:
    """The names of the methods: of this package, of entry points, and registered ones."""
    return sorted({*_METHODS, *_entry_points()})


def method_named(name: str) -> type[Scheme]:
    """The method of that name.

    Raises:
        UnknownMethodError: there is none, or its package cannot be imported.
        OptionError: what its package names is no method.
    """
    if name in _METHODS:
        return _METHODS[name]
    if name not in _entry_points():
        raise UnknownMethodError(
            f"method={name!r} is not valid{closest(name, methods())}; valid: {', '.join(methods())}. A method of "
            "another package must be installed with it, or registered by importing the module that calls "
            "fp8_compile.register_method"
        )
    point = _entry_points()[name]
    try:
        return check_class(point.load(), name)
    except (ImportError, AttributeError) as error:
        raise UnknownMethodError(f"method={name!r}, {point.value}, cannot be imported: {error}") from error


@functools.cache
def _entry_points() -> dict[str, EntryPoint]:
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    for name in found.keys() & _METHODS.keys():
        raise OptionError(f"method {name!r} of {found[name].value} has the name of a method of this package")
    return found


def own_options(method: str) -> dict[str, Any]:
    """The names of the method's own options, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(method_named(method))}


def owner_of(option: str) -> str | None:
    """A method that has an option of this name, or None."""
    for method in methods():
        try:
            if option in own_options(method):
                return method
        except OptionError:  # of another package that is broken; whoever asks for that method is told
            continue
    return None


def scheme_named(method: str, options: Mapping[str, Any]) -> Scheme:
    """The scheme that a weight, a file or the user names.

    Raises:
        UnknownMethodError: no method of that name is registered.
        OptionError: an option is unknown to the method, or not valid.
    """
    kind, own = method_named(method), own_options(method)
    for name in options:
        if name not in own:
            owner = owner_of(name)
            whose = f" belongs to method {owner!r}, not to {method!r}" if owner else f" is no option of {method!r}"
            raise OptionError(f"{name}{whose}{closest(name, own)}; its options are {', '.join(own) or 'none'}")
    return kind(**{name: _as_tuple(value) for name, value in options.items()})


def scheme_for(options: Fp8Options, pattern: str | None = None) -> Scheme:
    """The scheme that weights get which are not quantized yet.

    Args:
        pattern: the entry of ``layers`` that names them; None if none does.

    Raises:
        OptionError: the method is not registered, or an option of its own is not valid.
    """
    method, own = options.asked_of(pattern)
    return scheme_named(DEFAULT_METHOD if method is None else method, own)


def _as_tuple(value: Any) -> Any:
    """JSON has lists only, and a scheme is hashed."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
