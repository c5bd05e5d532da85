"""The table of docs/zoo.md, from what the tests of `tests/test_zoo.py` recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TITLE = """# The zoo

Every transformer class of diffusers {diffusers}, with a tiny config and random weights, compiled by torch {torch} on a
CPU: by stock with `backend="aot_eager"`, and by this backend around the same inner compiler. The tests that measure it
(`pytest -m slow tests/test_zoo.py`) hold that

- this backend makes as many graphs as stock does,
- converting before compiling gives the same bits as converting by compiling; some classes have layers that one of both
  cannot convert (`apart` in `tests/support/zoo_more.py` says why), which are kept for this comparison,
- the result is at least 20 dB from that of eager BF16. The weights are random and the layers few: this figure is there
  to find mistakes, and says nothing of pictures.

`min_features` is 64 here, because the models are tiny. *FP8* counts layers of the model compiled as a whole, and
*unquantized* says why others stay. *Graphs* are those of the first call; *breaks* marks what stock compiles with
`fullgraph=False` only. *Blocks* means that each block is compiled alone.

| class | linears | FP8 | unquantized | graphs, whole | graphs, blocks | dB, whole | dB, blocks |
|---|---|---|---|---|---|---|---|
"""


def _graphs(found: dict[str, Any] | None) -> str:
    if found is None:
        return "failed"
    same = found["graphs"] == found["stock_graphs"]
    count = str(found["graphs"]) if same else f"{found['graphs']}, stock {found['stock_graphs']}"
    return count if found["fullgraph"] else f"{count}, breaks"


def _line(name: str, whole: dict[str, Any] | None, blocks: dict[str, Any] | None) -> str:
    some = whole or blocks
    cells = [f"`{name}`"]
    if some is None:
        cells += ["", "", "failed"]
    else:
        reasons = sorted(some["reasons"].items(), key=lambda item: -item[1])
        cells += [str(some["linears"]), str(some["quantized"]), "; ".join(f"{n} {reason}" for reason, n in reasons)]
    cells += [_graphs(whole), _graphs(blocks)]
    cells += ["" if found is None else f"{found['sqnr']:.0f}" for found in (whole, blocks)]
    return f"| {' | '.join(cells)} |"


def write(
    page: Path,
    found: Mapping[tuple[str, bool], dict[str, Any] | None],
    known: Iterable[str],
    missing: Iterable[str] | None,
) -> None:
    """Write the page, or rewrite the lines of those classes that were tried in both ways.

    Args:
        found: by class and whether by blocks, what was recorded; None of a test that failed before.
        known: the classes that have a tiny config.
        missing: those that have none; None where that was not asked.
    """
    import diffusers
    import torch

    lines = {}
    if page.exists():
        lines = {line.split("`")[1]: line for line in page.read_text().splitlines() if line.startswith("| `")}
    if missing is not None:
        lines = {name: line for name, line in lines.items() if name in set(known)}
        lines |= {name: f"| `{name}` | | | not covered | | | | |" for name in missing}
    for name, by_blocks in found:
        if by_blocks and (name, False) in found:
            lines[name] = _line(name, found[name, False], found[name, True])
    lines |= {name: f"| `{name}` | | | not measured | | | | |" for name in known if name not in lines}
    title = TITLE.format(diffusers=diffusers.__version__, torch=torch.__version__.partition("+")[0])
    page.write_text(title + "".join(f"{lines[name]}\n" for name in sorted(lines)))
