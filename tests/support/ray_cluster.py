"""Ray on this machine, as a process that a test starts and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.serving import PROMPT, decoded, wait_for

# Else a cluster would ask for the token that an earlier one may have left in the home directory.
NO_TOKENS = {"RAY_AUTH_MODE": "disabled"}


class Cluster:
    """Ray on this machine.

    Args:
        parent: the process that has started its raylets.
    """

    def __init__(self, parent: int, address: str) -> None:
        self._parent = parent
        self.environment = {**os.environ, **NO_TOKENS, "RAY_ADDRESS": address}

    def workers(self, name: str = "ray::ServeReplica:fp8-diffusion:Worker") -> list[int]:
        """Processes of this cluster that draw."""
        return [pid for of_node in self.workers_by_node(name) for pid in of_node]

    def workers_by_node(self, name: str = "ray::ServeReplica:fp8-diffusion:Worker") -> list[list[int]]:
        """`workers`, of each node that has any."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        raylets = [pid for pid, parent, _ in rows if parent == str(self._parent)]
        nodes = [
            [int(pid) for pid, parent, title in rows if parent == raylet and title.startswith(name)]
            for raylet in raylets
        ]
        return [of_node for of_node in nodes if of_node]


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[Cluster]:
    """One node with so many CPUs."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short name, since sockets stand in it
        port = free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", str(cpus)]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder, "--port", str(port)]
        process = subprocess.Popen(command, env={**os.environ, **NO_TOKENS}, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: answers(port), 60)
            yield Cluster(process.pid, f"127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


class ClusterServer:
    """The application on a cluster, and clients for it."""

    def __init__(self, cluster: Cluster, port: int) -> None:
        self.cluster = cluster
        self.url = f"http://127.0.0.1:{port}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def draw(self, **body: Any) -> list[bytes]:
        """The pixels of each picture."""
        data = self.openai.images.generate(prompt=PROMPT, extra_body=body).data
        assert data is not None
        return [decoded(item.b64_json).tobytes() for item in data]

    def status(self, **body: Any) -> tuple[int, str]:
        """Of an answer: its status, and the code of its error."""
        answer = httpx.post(f"{self.url}/v1/images/generations", json={"prompt": PROMPT, **body}, timeout=120)
        return answer.status_code, answer.json().get("error", {}).get("code", "")

    def kill(self, worker: int) -> None:
        """End ``worker``, and wait until it is gone."""
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: worker not in self.cluster.workers())

    def wait_for_workers(self) -> None:
        wait_for(lambda: len(self.cluster.workers()) == 2, 120)


@contextlib.contextmanager
def on_cluster(cluster: Cluster, port: int, log: Path, end: signal.Signals, *command: str) -> Iterator[ClusterServer]:
    """The server of ``command``, which writes to ``log``, until ``end`` ends it."""
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", *command], env=cluster.environment, stderr=output)
    server = ClusterServer(cluster, port)
    try:
        wait_for(lambda: process.poll() is not None or server.ready(), 180)
        assert process.poll() is None, log.read_text()
        yield server
    finally:
        process.send_signal(end)
        process.wait(90)
