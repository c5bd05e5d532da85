"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.waiting = Gauge("fp8_serve_waiting_pictures", "Pictures that wait for the worker", registry=self.registry)
        self.pictures = Counter("fp8_serve_pictures", "Pictures drawn", registry=self.registry)
        self.failures = Counter("fp8_serve_failures", "Requests that failed while drawn", registry=self.registry)
        self.steps = Counter("fp8_serve_steps", "Denoising steps; one serves a whole batch", registry=self.registry)
        self.compile_seconds = Counter(
            "fp8_serve_compile_seconds", "Seconds of compiling after the warm-up", registry=self.registry
        )
        self.batch_size = Histogram(
            "fp8_serve_batch_pictures",
            "Pictures drawn together",
            buckets=(1, 2, 3, 4, 5, 6, 7, 8, 16),
            registry=self.registry,
        )
        self.phases = Histogram(
            "fp8_serve_phase_seconds",
            "Of a picture in the queue; of a batch in the text encoders, the steps, and after the last step",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.requests = Counter("fp8_serve_requests", "Answers", ["path", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "fp8_serve_request_seconds",
            "From the first byte of a request to the last of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.restarts = Counter("fp8_serve_worker_restarts", "Of a worker that had died", registry=self.registry)
        self.memory = Gauge(
            "fp8_serve_gpu_bytes", "GPU memory, by torch, after the last batch", ["kind"], registry=self.registry
        )

    def exposition(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
