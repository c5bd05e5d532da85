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
"""

from __future__ import annotations

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
MODELS = ["flux", "qwenimage", "sd3", "wan", "hunyuan_video", "ltx", "z_image", "flux2", "chroma", "cogvideox"]
FOLDER = "tests/models/transformers"


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
        module = f"{FOLDER}/test_models_transformer_{model}.py"
        options = ["-p", "bench.peers_plugin", "-p", "no:cacheprovider", "-q", "--tb=short", "-k", keyword]
        command = [sys.executable, "-m", "pytest", *options, module]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: some tests failed
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        lines = output.read_text().replace(str(checkout), "CHECKOUT").splitlines()
        return [{"run": kind, "model": model, **json.loads(line)} for line in lines]


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
    parser.add_argument("--models", nargs="+", default=MODELS, help="modules, without 'test_models_transformer_'")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--inner", default="aot_eager", help="what compiles in stock, and behind fp8_diffusion")
    parser.add_argument("-k", default="", dest="keyword", help="pytest's own: which of the tests")
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    if not (checkout / FOLDER).is_dir():
        parser.error(f"{checkout} is no checkout of diffusers: it has no {FOLDER}")
    # The results name no folder of this machine.
    sys.argv = ["CHECKOUT" if argument == str(arguments.checkout) else argument for argument in sys.argv]
    tests: list[dict[str, Any]] = []
    version = (checkout / "src/diffusers/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
    for model in arguments.models:
        for kind in arguments.runs:
            start = time.monotonic()
            tests += run(checkout, model, kind, arguments.inner, arguments.keyword)
            print(f"{model}, {kind}: {time.monotonic() - start:.0f} s", file=sys.stderr)
            common.write(arguments.output, {"diffusers_tested": version, "keyword": arguments.keyword, "tests": tests})
    print(summary(tests))
    for test in regressions(tests):
        print(f"\n{test['run']}: {test['test']}\n  {test['reason']}")
    sys.exit(bool(regressions(tests)))


if __name__ == "__main__":
    main()
