"""What the server counts, for Prometheus. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The metrics of one server.

    Attributes:
        requests: Requests by ``route`` and ``status``.
        refused: Requests that were refused with the status 429.
        prompt_tokens: Tokens of prompts, with those of scenes.
        generated_tokens: Generated tokens.
        encoding: Seconds per encoded scene, with the wait for other scenes.
        first_token: Seconds from a request to its first piece of text.
        whole_answer: Seconds per answered request.
        step: Number of answers in each step of the engine.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("spa3r_requests", "Requests.", ["route", "status"], registry=registry)
        self.refused = Counter("spa3r_requests_refused", "Requests refused with 429.", registry=registry)
        self.prompt_tokens = Counter("spa3r_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("spa3r_generated_tokens", "Generated tokens.", registry=registry)
        self.encoding = self._seconds("encoding", "Encoding a scene, with the wait for others.")
        self.first_token = self._seconds("first_token", "From a request to its first text.")
        self.whole_answer = self._seconds("answer", "Answered requests.")
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.step = Histogram("spa3r_step_answers", "Answers per step.", registry=registry, buckets=sizes)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"spa3r_{name}_seconds", text, registry=self.registry, buckets=SECONDS)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a value that is read when the metrics are."""
        Gauge(f"spa3r_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
