"""diffusers' own tests of its transformers, with ``fp8_diffusion`` in the place of ``torch.compile``'s default backend.

A checkout of diffusers is needed, with its tests; the path is given, and its own sources are imported. Nothing of it is
copied here: `bench.peers_plugin` changes what a CPU asks for, and `bench.peers_mixins` subclasses its mixins. Each
module of tests runs three times, in BF16:

* ``stock``: the inner backend alone. What fails here fails without us;
* ``ours``: the backend, which quantizes the BF16 weights when it compiles;
* ``converted``: with `fp8_compile.quantize_` first, as each model is made.

What runs: the compile tests, LoRA hot-swapping, and, in the first two, the tests of a quantization library on
`fp8_compile.Fp8DiffusionConfig`. Tests that a stock run passes and another one does not are printed with their error.

    python -m bench.peers CHECKOUT --output bench/results/peers.json

All modules take hours. What is known goes into ``--output`` after each module and run; the same command again goes on
with those that are not in it, and ``--models`` names some to be run again.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import common

RUNS = ("stock", "ours", "converted")
FOLDER = "tests/models/transformers"
FINISHED = (0, 1, 5)
"""pytest's exit codes where all passed, where some failed, and where there were none."""


def modules(checkout: Path) -> dict[str, Path]:
    """Every module of tests of a transformer, by the model's name; the plugin says which of its tests can run."""
    files = sorted((checkout / FOLDER).glob("test_models_*.py"))
    return {file.stem.removeprefix("test_models_").removeprefix("transformer_"): file for file in files}


def run(checkout: Path, model: str, kind: str, inner: str, keyword: str) -> list[dict[str, Any]]:
    """What became of each test of one module in one run; a process of its own, since tests change global settings."""
    here = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "tests.jsonl")
        paths = [str(here), str(checkout / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "DIFFUSERS_TEST_DEVICE": "cpu",
            "DIFFUSERS_VERBOSITY": "warning",  # some tests read the log
            "PEERS_RUN": kind,
            "PEERS_INNER": inner,
            "PEERS_OUTPUT": str(output),
        }
        module = str(modules(checkout)[model].relative_to(checkout))
        options = ["-p", "bench.peers_plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-k", keyword]
        command = [sys.executable, "-m", "pytest", *options, module]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        records = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        if done.returncode not in FINISHED:  # a module that cannot be imported, or a crash, is a failure like others
            said = f"ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
            records.append({"test": f"{model}.py", "part": "module", "outcome": "failed", "in_fp8": 0, "reason": said})
        for record in records:
            record["reason"] = record["reason"].replace(str(checkout), "CHECKOUT")
        return [{"run": kind, "model": model, **record} for record in records]


def summary(tests: list[dict[str, Any]]) -> str:
    """Passed of all that were not skipped, for each model and part of the suite, and for each run."""
    passed = Counter((t["model"], t["part"], t["run"]) for t in tests if t["outcome"] == "passed")
    counted = Counter((t["model"], t["part"], t["run"]) for t in tests if t["outcome"] != "skipped")
    rows = [
        [f"{model}, {part}"]
        + [f"{passed[model, part, kind]} of {counted[model, part, kind]}" for kind in RUNS]
        + [str(max((t["in_fp8"] for t in tests if (t["model"], t["part"]) == (model, part)), default=0))]
        for model, part in dict.fromkeys((t["model"], t["part"]) for t in tests)
    ]
    total = [f"{sum(t['outcome'] == 'passed' for t in tests if t['run'] == kind)}" for kind in RUNS]
    return common.table(["tests", *RUNS, "layers in FP8"], [*rows, ["passed in all", *total, ""]])


def regressions(tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that fail with us and not in stock, where some are skipped."""
    failed_in_stock = {t["test"] for t in tests if t["run"] == "stock" and t["outcome"] == "failed"}
    return [t for t in tests if t["outcome"] == "failed" and t["run"] != "stock" and t["test"] not in failed_in_stock]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("checkout", type=Path, help="of diffusers; its version is in the output")
    parser.add_argument("--models", nargs="+", help="these alone, without 'test_models_transformer_', even if known")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--inner", default="aot_eager", help="what compiles in stock, and behind fp8_diffusion")
    parser.add_argument("-k", default="", dest="keyword", help="pytest's own: which of the tests")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    found = modules(checkout)
    if not found:
        parser.error(f"{checkout} is no checkout of diffusers: it has no {FOLDER}")
    if unknown := {*(arguments.models or [])} - {*found}:
        parser.error(f"no module of tests: {', '.join(sorted(unknown))}; known: {', '.join(found)}")
    # The results name no folder of this machine.
    sys.argv = ["CHECKOUT" if argument == str(arguments.checkout) else argument for argument in sys.argv]
    version = (checkout / "src/diffusers/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
    asked = {"diffusers_tested": version, "inner": arguments.inner, "keyword": arguments.keyword}
    tests: list[dict[str, Any]] = []
    earlier: list[dict[str, Any]] = []
    if arguments.output is not None and arguments.output.exists():
        known = json.loads(arguments.output.read_text())
        if {key: known.get(key) for key in asked} != asked:
            parser.error(f"{arguments.output} holds results of other tests; give another --output")
        tests, earlier = known["tests"], [*known["earlier"], known["environment"]]
    done = set() if arguments.models else {(t["model"], t["run"]) for t in tests}
    for model, kind in itertools.product(arguments.models or found, arguments.runs):
        if (model, kind) in done:
            continue
        start = time.monotonic()
        others = [t for t in tests if (t["model"], t["run"]) != (model, kind)]
        tests = others + run(checkout, model, kind, arguments.inner, arguments.keyword)
        print(f"{model}, {kind}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        common.write(arguments.output, {**asked, "earlier": earlier, "tests": tests})
    print(summary(tests))
    for test in regressions(tests):
        print(f"\n{test['run']}: {test['test']}\n  {test['reason']}")
    sys.exit(bool(regressions(tests)))


if __name__ == "__main__":
    main()
