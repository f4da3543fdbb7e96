"""What a server counts, in Prometheus' format."""

from collections.abc import Iterator
from typing import Any

from thoughtbubbles.serving.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
PREFIX = "thoughtbubbles"


class ServerMetrics:
    """Counters and histograms of one server.

    Args:
        engine: whose totals are shown.
    """

    def __init__(self, engine: Engine) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def histogram(name: str, words: str) -> Any:
            return Histogram(f"{PREFIX}_{name}", words, buckets=SECONDS, registry=self._registry)

        labels = ["path", "status"]
        self._requests = Counter(f"{PREFIX}_requests", "Requests by HTTP status", labels, registry=self._registry)
        self.first_token = histogram("first_token_seconds", "From an order to the first text of its answer")
        self.answer = histogram("answer_seconds", "From an order to the end of its answer")

    def count(self, path: str, status: int) -> None:
        """Note a request that was answered."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """All figures, and the media type that they are written in."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """The engine's figures as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        engine, totals = self._engine, self._engine.totals
        yield GaugeMetricFamily(f"{PREFIX}_slots", "Answers that can be written at a time", engine.slots)
        yield GaugeMetricFamily(f"{PREFIX}_running", "Answers that are being written", engine.running)
        yield GaugeMetricFamily(f"{PREFIX}_waiting", "Answers that wait for a slot", engine.waiting)
        ended = CounterMetricFamily(f"{PREFIX}_answers", "Answers by how they ended", labels=["ended"])
        for how in ("finished", "cancelled", "failed"):
            ended.add_metric([how], getattr(totals, how))
        yield ended
        yield CounterMetricFamily(f"{PREFIX}_prompt_tokens", "Tokens of prompts that were read", totals.prompt_tokens)
        yield CounterMetricFamily(f"{PREFIX}_generated_tokens", "Tokens that were chosen", totals.tokens)
        yield CounterMetricFamily(
            f"{PREFIX}_streams", "Streams alive after the last layer of those read", totals.streams
        )
        yield CounterMetricFamily(f"{PREFIX}_steps", "Steps of the rows that write", totals.steps)
