"""A cluster that changes under load: a node is lost, workers are added and taken away, the application is updated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.ray_cluster import NO_TOKENS, Cluster, ClusterServer, free_port, on_cluster, ray_cluster
from tests.support.serving import PROMPT, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]

OPTIONS = "--no-quantization --inner-backend eager --max-batch 1 --no-key"


class Load:
    """Clients that ask again and again, until the block ends; `answers` counts what they got."""

    def __init__(self, server: ClusterServer, clients: int, steps: int) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self._server = server
        self._clients = clients
        self._steps = steps
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(clients)

    def __enter__(self) -> Load:
        self._running = [self._pool.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for each in self._running:
            each.result()

    def _ask(self) -> None:
        body = {"prompt": PROMPT, "num_inference_steps": self._steps}
        while not self._enough.is_set():
            answer = httpx.post(f"{self._server.url}/v1/images/generations", json=body, timeout=120)
            self.answers[answer.status_code, answer.json().get("error", {}).get("message", "")] += 1


def write_config(path: Path, port: int, worker: str) -> Path:
    path.write_text(
        f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
        "applications:\n"
        "- name: fp8-diffusion\n"
        "  import_path: fp8_compile.cli.ray_config:application\n"
        f"  args: {{options: {OPTIONS}}}\n"
        f"  deployments: [{{name: Worker, {worker}}}]\n"
    )
    return path


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, object, object]]:
    """Two raylets with a CPU each, so that each has one of two workers."""
    import ray.cluster_utils

    for name, value in NO_TOKENS.items():
        monkeypatch.setenv(name, value)

    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        # Where Ray notes the address of a cluster: a folder that there need not be on a machine that never had one.
        monkeypatch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        made = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        )
        try:
            second = made.add_node(num_cpus=1)
            made.wait_for_nodes()
            yield Cluster(os.getpid(), made.address), made, second
        finally:
            made.shutdown()


def test_no_accepted_request_is_lost_with_a_node(two_nodes: tuple[Cluster, object, object], tmp_path: Path) -> None:
    cluster, nodes, second = two_nodes
    port = free_port()
    command = ["fp8_compile", "serve", "--ray", "--replicas", "2", *OPTIONS.split(), "--port", str(port)]
    with on_cluster(cluster, port, tmp_path / "log", signal.SIGTERM, *command) as served:
        wait_for(lambda: [len(pids) for pids in cluster.workers_by_node()] == [1, 1], 120)
        with Load(served, clients=4, steps=30) as load:
            wait_for(lambda: load.answers.total() >= 8, 60)
            nodes.remove_node(second, allow_graceful=False)  # type: ignore[attr-defined]
            before = load.answers.total()
            wait_for(lambda: load.answers.total() >= before + 12, 120)
        assert load.answers.keys() == {(200, "")}
        assert [len(pids) for pids in cluster.workers_by_node()] == [1]


def test_workers_are_added_under_load_and_taken_away_after_it(tmp_path: Path) -> None:
    port = free_port()
    scaling = "min_replicas: 1, max_replicas: 2, target_ongoing_requests: 1, look_back_period_s: 4"
    delays = "metrics_interval_s: 1, upscale_delay_s: 1, downscale_delay_s: 5"
    config = write_config(tmp_path / "config.yaml", port, f"autoscaling_config: {{{scaling}, {delays}}}")
    command = ["ray.serve.scripts", "run", str(config)]
    with (
        ray_cluster(cpus=4) as cluster,
        on_cluster(cluster, port, tmp_path / "log", signal.SIGINT, *command) as served,
    ):
        assert len(cluster.workers()) == 1
        with Load(served, clients=4, steps=20) as load:
            wait_for(lambda: len(cluster.workers()) == 2, 120)
            before = load.answers.total()
            wait_for(lambda: load.answers.total() >= before + 20, 120)
        wait_for(lambda: len(cluster.workers()) == 1, 120)
        assert served.draw()
        assert load.answers.keys() == {(200, "")}


UPDATE = """
import sys
import ray
from ray import serve
from fp8_compile.cli.ray_config import application

ray.init()
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
for options in sys.argv[2:]:
    serve.run(application({"options": options}), name="fp8-diffusion")
    print("deployed", flush=True)
    sys.stdin.readline()
serve.shutdown()
"""


def test_an_update_under_load_loses_no_request(tmp_path: Path) -> None:
    """Of the ingress and the workers, as ``serve deploy`` does it, two workers one after the other."""
    port = free_port()
    versions = [
        f"--replicas 2 {OPTIONS} --name {name} --warmup {size}" for name, size in (("a", "64x64"), ("b", "32x32"))
    ]
    with ray_cluster(cpus=4) as cluster:
        driver = subprocess.Popen(
            [sys.executable, "-c", UPDATE, str(port), *versions],
            env=cluster.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert driver.stdin is not None
        assert driver.stdout is not None

        def next_line() -> str:
            assert driver.stdin is not None
            driver.stdin.write("\n")
            driver.stdin.flush()
            return printed()

        def printed() -> str:
            assert driver.stdout is not None
            return driver.stdout.readline()

        while printed() != "deployed\n":
            assert driver.poll() is None
        served = ClusterServer(cluster, port)
        old = set(cluster.workers())
        assert len(old) == 2
        with Load(served, clients=4, steps=8) as load:
            wait_for(lambda: load.answers.total() >= 8, 60)
            assert next_line() == "deployed\n"
            wait_for(lambda: not old & set(cluster.workers()), 60)
            before = load.answers.total()
            wait_for(lambda: load.answers.total() >= before + 8, 60)
        assert load.answers.keys() == {(200, "")}
        assert [model.id for model in served.openai.models.list()] == ["b"]
        driver.stdin.write("\n")
        driver.stdin.flush()
        driver.wait(90)
