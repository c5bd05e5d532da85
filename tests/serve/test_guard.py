"""Who is let in."""

from __future__ import annotations

import pytest

from fp8_compile.errors import OptionError
from fp8_compile.serve.guard import check_access


@pytest.mark.parametrize(
    ("host", "keys", "forced", "allowed"),
    [
        ("127.0.0.1", (), False, True),
        ("127.0.0.53", (), False, True),
        ("::1", (), False, True),
        ("localhost", (), False, True),
        ("0.0.0.0", (), False, False),
        ("::", (), False, False),
        ("192.168.0.2", (), False, False),
        ("pictures.example", (), False, False),
        ("0.0.0.0", ("sesame",), False, True),
        ("0.0.0.0", (), True, True),
        ("127.0.0.1", ("sesame", " "), True, False),
    ],
)
def test_other_machines_need_a_key(host: str, keys: tuple[str, ...], forced: bool, allowed: bool) -> None:
    if allowed:
        check_access(host, keys, forced)
        return
    with pytest.raises(OptionError, match="API key"):
        check_access(host, keys, forced)
