"""What Prometheus may read at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from t2.generation.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        labels = {"registry": self.registry, "namespace": "t2"}
        self.requests = Counter("requests", "Requests by expert and status.", ["expert", "status"], **labels)  # type: ignore[arg-type]
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts by expert.", ["expert"], **labels)  # type: ignore[arg-type]
        self.tokens = Counter("generation_tokens", "Tokens made by expert.", ["expert"], **labels)  # type: ignore[arg-type]
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=SECONDS,
            **labels,  # type: ignore[arg-type]
        )
        self.whole = Histogram("request_seconds", "From the request to its end.", buckets=SECONDS, **labels)  # type: ignore[arg-type]
        for name, text, value in (
            ("requests_running", "Requests in the batch.", lambda: engine.running),
            ("requests_waiting", "Requests that wait for a row.", lambda: engine.waiting),
            ("cache_bytes", "Keys and values of rows.", lambda: engine.cache_bytes),
            ("prefix_bytes", "Keys and values of beginnings of prompts.", lambda: engine.prefixes.nbytes),
            (
                "prefix_hit_share",
                "Share of prompts' tokens that were known.",
                lambda: engine.prefixes.hits / max(engine.prefixes.lookups, 1),
            ),
        ):
            Gauge(name, text, **labels).set_function(value)  # type: ignore[arg-type]

    def text(self) -> bytes:
        return generate_latest(self.registry)
