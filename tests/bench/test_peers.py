"""What the table of `bench.peers` counts, and which tests it blames on the backend."""

from pathlib import Path
from typing import Any

from bench.peers import FOLDER, modules, regressions, summary


def record(run: str, name: str, outcome: str, part: str = "compile", in_fp8: int = 0) -> dict[str, Any]:
    return {"run": run, "model": "flux", "part": part, "test": name, "outcome": outcome, "in_fp8": in_fp8, "reason": ""}


TESTS = [
    record("stock", "shapes", "passed"),
    record("stock", "offloading", "failed"),
    record("stock", "weights", "skipped", part="quantization"),
    record("ours", "shapes", "passed", in_fp8=14),
    record("ours", "offloading", "failed", in_fp8=14),
    record("ours", "weights", "failed", part="quantization", in_fp8=12),
    record("converted", "shapes", "failed"),
    record("converted", "offloading", "passed"),
]


def test_only_what_stock_does_not_fail_is_ours() -> None:
    assert [(t["run"], t["test"]) for t in regressions(TESTS)] == [("ours", "weights"), ("converted", "shapes")]


def test_skipped_tests_are_not_counted() -> None:
    rows = [line.split("  ") for line in summary(TESTS).splitlines()[2:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["flux, compile", "1 of 2", "1 of 2", "1 of 2", "14"],
        ["flux, quantization", "0 of 0", "0 of 1", "0 of 0", "12"],
        ["passed in all", "1", "1", "1"],
    ]


def test_every_module_of_the_folder_is_found_by_its_models_name(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    files = [folder / name for name in ("test_models_transformer_flux.py", "test_models_dit_transformer2d.py")]
    for file in [*files, folder / "__init__.py"]:
        file.touch()
    assert modules(tmp_path) == {"flux": files[0], "dit_transformer2d": files[1]}
