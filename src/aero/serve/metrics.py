"""Prometheus metrics of a server or of the client's endpoint: counts and times, never what was asked or answered."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from aero.errors import AeroError
from aero.serve.settings import address

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """One registry a process. ``passes``: seconds of one forward pass, as this party computed it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.sessions = Gauge("aero_sessions", "Sessions now.", registry=registry)
        self.sessions_total = Counter("aero_sessions_begun", "Sessions begun.", registry=registry)
        self.failed = Counter("aero_sessions_failed", "Sessions that did not end in order.", registry=registry)
        self.refused = Counter("aero_calls_refused", "Calls turned away.", registry=registry)
        self.requests = Counter("aero_requests", "Requests answered.", registry=registry)
        self.tokens = Counter("aero_tokens", "Tokens generated (counted at the client).", registry=registry)
        self.bytes_sent = Counter("aero_engine_bytes_sent", "Bytes sent by this party's engine.", registry=registry)
        self.rounds = Counter("aero_engine_messages", "Messages sent by this party's engine.", registry=registry)
        self.passes = Histogram("aero_pass_seconds", "One forward pass.", buckets=_SECONDS, registry=registry)

    def serve(self, where: str) -> None:
        """Offer them over HTTP at ``host:port``. Raises AeroError if the port is taken."""
        host, port = address(where)
        try:
            start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise AeroError(f"Cannot offer metrics on {where}: {error.strerror or error}.") from None
