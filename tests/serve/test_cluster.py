"""Workers of a Ray cluster behind one ingress: requests are answered also where a worker dies under them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.ray_cluster import Cluster, ClusterServer, free_port, on_cluster, ray_cluster
from tests.support.serving import MODEL, PROMPT, WatchedSession, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]

# One picture at a time, so that none depends on which others are drawn with it.
OPTIONS = "--replicas 2 --no-quantization --inner-backend eager --max-batch 1 --max-queue 10"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with ray_cluster(cpus=4) as made:
        yield made


@pytest.fixture(scope="module")
def served(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterServer]:
    port, log = free_port(), tmp_path_factory.mktemp("log") / "log"
    command = ["fp8_compile", "serve", "--ray", *OPTIONS.split(), "--port", str(port)]
    with on_cluster(cluster, port, log, signal.SIGTERM, *command) as made:
        wait_for(lambda: f"ready: {made.url}/v1 serves {MODEL}" in log.read_text())
        yield made
    assert not cluster.workers()


def test_a_config_of_serve_run(cluster: Cluster, tmp_path: Path) -> None:
    """The first test here, since Ray Serve takes one config at a time."""
    port = free_port()
    config = tmp_path / "config.yaml"
    config.write_text(
        f"http_options: {{host: 127.0.0.1, port: {port}}}\n"
        "applications:\n"
        "- name: fp8-diffusion\n"
        "  import_path: fp8_compile.cli.ray_config:application\n"
        f"  args: {{options: {OPTIONS} --no-key}}\n"
        "  deployments: [{name: Worker, num_replicas: 1}]\n"
    )
    command = ["ray.serve.scripts", "run", str(config)]
    with on_cluster(cluster, port, tmp_path / "log", signal.SIGINT, *command) as configured:
        assert configured.draw(seed=1)
        assert len(cluster.workers()) == 1


def test_it_answers_as_the_server_of_one_machine(served: ClusterServer, session: WatchedSession) -> None:
    arguments = session.arguments(prompt=PROMPT, num_inference_steps=4)
    direct = session.call(3, callback_on_step_end=lambda p, i, t, kwargs: kwargs, **arguments).images[0]
    assert served.draw(seed=3, num_inference_steps=4) == [direct.tobytes()]
    assert served.draw(seed=2, n=2, num_inference_steps=4)[1] == direct.tobytes()
    assert served.status(foo=1) == (400, "unknown_parameter")
    assert served.status(size="65x64") == (400, "invalid_value")
    assert httpx.get(f"{served.url}/v1/nowhere").json()["error"]["code"] == "not_found"
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    stream = served.openai.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 3})
    events = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in stream] == events


def test_more_than_may_wait_is_429(served: ClusterServer) -> None:
    with ThreadPoolExecutor(40) as pool:
        answers = Counter(pool.map(lambda _: served.status(num_inference_steps=30), range(40)))
    assert answers.keys() == {(200, ""), (429, "queue_full")}
    assert answers[200, ""] >= 10  # those that may wait
    assert served.draw()


def test_a_client_that_leaves_is_not_drawn_for(served: ClusterServer) -> None:
    """Else what nobody waits for would keep both workers busy for minutes."""
    body = {"prompt": PROMPT, "n": 10, "num_inference_steps": 100}
    with ThreadPoolExecutor(4) as pool:
        for leaving in [
            pool.submit(httpx.post, f"{served.url}/v1/images/generations", json=body, timeout=2) for _ in range(4)
        ]:
            with pytest.raises(httpx.ReadTimeout):
                leaving.result()
    with httpx.Client(timeout=10) as client:
        assert client.post(f"{served.url}/v1/images/generations", json={"prompt": PROMPT}).status_code == 200


def test_no_accepted_request_is_lost_with_a_worker(served: ClusterServer) -> None:
    served.wait_for_workers()
    expected = served.draw(seed=7, n=2, num_inference_steps=60)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.draw, seed=7, n=2, num_inference_steps=60) for _ in range(8)]
        first = served.cluster.workers()[0]
        wait_for(lambda: any(each.done() for each in asked), 60)
        served.kill(first)
        assert [each.result() for each in asked] == [expected] * 8


def test_a_stream_that_has_shown_a_preview_ends_with_an_error(served: ClusterServer) -> None:
    served.wait_for_workers()
    served.draw()
    body = {"num_inference_steps": 100}
    stream = iter(served.openai.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=body))
    assert next(stream).type == "image_generation.partial_image"
    for worker in served.cluster.workers():
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the worker that drew this was lost"):
        list(stream)


def test_each_worker_draws_the_same_picture(served: ClusterServer) -> None:
    served.wait_for_workers()
    first, second = served.cluster.workers()
    served.kill(first)
    expected = served.draw(seed=11)  # by the second, since another takes long to load
    served.wait_for_workers()
    served.kill(second)
    assert served.draw(seed=11) == expected  # by the third
