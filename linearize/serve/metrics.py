"""Counters of a server, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

disable_created_metrics()  # a line for each series that says when it began


class Metrics:
    """One server's numbers, in a registry of their own.

    Attributes:
        requests: answered, by endpoint and status.
        prompt_tokens, tokens: read and made.
        ended: texts, by reason: stop, length, cancelled, timeout, closing, failed.
        running, waiting: texts in slots, and before them.
        seconds, first: of whole texts, and until their first token.
    """

    def __init__(self, slots: int, state_bytes: int) -> None:
        self.registry = of = CollectorRegistry()
        self.requests = Counter(
            "linearize_requests", "Requests answered", ["endpoint", "status"], registry=of
        )
        self.prompt_tokens = Counter("linearize_prompt_tokens", "Tokens of prompts read", registry=of)
        self.tokens = Counter("linearize_generated_tokens", "Tokens made", registry=of)
        self.ended = Counter("linearize_texts", "Texts that ended, by reason", ["reason"], registry=of)
        self.running = Gauge("linearize_texts_running", "Texts in slots", registry=of)
        self.waiting = Gauge(
            "linearize_texts_waiting", "Texts that wait for a slot or are being read", registry=of
        )
        self.seconds = Histogram(
            "linearize_text_seconds", "From a text's arrival to its end", buckets=SECONDS, registry=of
        )
        self.first = Histogram(
            "linearize_first_token_seconds",
            "From a text's arrival to its first token",
            buckets=SECONDS,
            registry=of,
        )
        Gauge("linearize_slots", "Texts at once", registry=of).set(slots)
        Gauge("linearize_state_bytes", "Memory of all slots' states", registry=of).set(state_bytes)

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self.registry)
