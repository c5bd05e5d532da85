from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from fp8_compile.pipelines.session import Session
from tests.support.serving import MODEL, Served, WatchedSession, serving


@pytest.fixture(scope="session")
def session() -> WatchedSession:
    """The embedded pipeline as it is, in BF16 and not compiled."""
    loaded = Session.load(MODEL, quantized=False)
    return WatchedSession(**{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)})


@pytest.fixture(scope="session")
def served(session: WatchedSession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests that leave it as it was."""
    with serving(session, tmp_path_factory.mktemp("pictures")) as made:
        yield made
