"""Ray on this machine, as a process that a test starts and ends."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.support.serving import wait_for


class Cluster:
    """Ray on this machine, with as many CPUs as it is told."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process = process
        self.environment = {**os.environ, "RAY_ADDRESS": address}

    def workers(self, name: str = "ray::ServeReplica:fp8-diffusion:Worker") -> list[int]:
        """Processes of this cluster that draw."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()[1:]]
        ours = {pid for pid, parent, _ in rows if parent == str(self._process.pid)}
        return [int(pid) for pid, parent, title in rows if parent in ours and title.startswith(name)]


@contextlib.contextmanager
def ray_cluster(cpus: int) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short name, since sockets stand in it
        port = free_port()
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", str(cpus)]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--temp-dir", folder, "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: answers(port), 60)
            yield Cluster(process, f"127.0.0.1:{port}")
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
