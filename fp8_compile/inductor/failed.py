"""What a failed compilation leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def forgets_guards(backend: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorates a backend: where it raises, the guards that Dynamo has collected for this graph are dropped.

    They refer weakly to the parameters, and live as long as the exception does, which a notebook keeps. A parameter
    that is a wrapper subclass cannot be moved until then. Dynamo itself drops them only if the backend returned.
    """

    @functools.wraps(backend)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return backend(*args, **kwargs)
        except BaseException:
            tracing = torch._guards.TracingContext.try_get()
            if tracing is not None:  # a backend may be called without Dynamo
                tracing.guards_context.dynamo_guards.clear()
            raise

    return guarded
