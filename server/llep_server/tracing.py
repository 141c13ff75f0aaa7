"""OpenTelemetry spans of changes and of the scheduler's decisions, where OTEL_EXPORTER_OTLP_ENDPOINT says where to.

Without that variable nothing is imported and nothing is done. The other OTEL_* variables hold as usual.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from llep import __version__
from llep.errors import LlepError
from llep.views import DecisionView
from llep_server.scheduler import Scheduler

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
DECISIONS_EVERY_S = 5.0
MOST_DECISIONS = 100
NANOSECONDS = 1_000_000_000


def from_env(environ: Mapping[str, str]) -> Tracing | None:
    """Tracing to the endpoint that the environment names; None without one, or without the packages."""
    if not environ.get(ENDPOINT_VARIABLE):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        logger.warning("no tracing: %s is not installed: pip install 'llep[otel]'", error.name)
        return None
    name = environ.get("OTEL_SERVICE_NAME") or "llep-control-plane"
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    host = environ[ENDPOINT_VARIABLE].partition("?")[0].rpartition("@")[2]  # without a password
    logger.info("spans of changes and decisions go to %s", host)
    return Tracing(provider)


class Tracing:
    """Spans are made when what they tell of is over, so that nothing waits for them."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer: Tracer = provider.get_tracer("llep", __version__)
        self._newest_decision: int | None = None

    def request(self, scope: Scope, status: int, took_s: float, author: str) -> None:
        """A change that was asked for over HTTP, as a part of the caller's trace if it names one."""
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        route = scope.get("route")
        path = getattr(route, "path", scope["path"])
        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope).items()))
        ended_ns = time.time_ns()
        state = scope["state"]
        span = self._tracer.start_span(
            f"{scope['method']} {path}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=ended_ns - int(took_s * NANOSECONDS),
            attributes={
                **{"http.request.method": scope["method"], "http.route": path},
                **{"http.response.status_code": status, "llep.author": author, "llep.request_id": state["request_id"]},
                **{f"llep.{name}": value for name, value in state.get("log", {}).items()},
            },
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_ns)

    async def follow(self, scheduler: Scheduler) -> None:
        """Spans of the scheduler's decisions from now on, until cancelled."""
        while True:
            try:
                self.decisions(await scheduler.decisions(None, MOST_DECISIONS, None))
            except LlepError as error:
                logger.debug("no decisions to trace: %s", error.message)
            except Exception:
                logger.exception("decisions are not traced")
            await asyncio.sleep(DECISIONS_EVERY_S)

    def decisions(self, newest_first: list[DecisionView]) -> None:
        """Spans of those that were not there the last time; the first time none."""
        known, newest = self._newest_decision, newest_first[0].id if newest_first else 0
        self._newest_decision = newest
        for decision in reversed(newest_first):
            if known is not None and decision.id > known:
                self._decision(decision)

    def close(self) -> None:
        """Send what has not been sent. Takes seconds if nobody takes it."""
        self._provider.shutdown()

    def _decision(self, decision: DecisionView) -> None:
        at_ns = int(decision.time_s * NANOSECONDS)
        optional = {"revision": decision.revision, "expected_gain_ratio": decision.expected_gain_ratio}
        span = self._tracer.start_span(
            f"decision {decision.kind}",
            start_time=at_ns,
            attributes={
                **{"llep.decision": decision.id, "llep.engine": decision.engine, "llep.outcome": decision.outcome},
                "llep.reason": decision.reason,
                **{f"llep.{name}": value for name, value in optional.items() if value is not None},
            },
        )
        span.end(at_ns)
