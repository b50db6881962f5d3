"""Metrics of the router for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.router.selector import Choice

MILLISECONDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One registry a router. Mean layers of requests: `layerbudget_layers_sum / layerbudget_layers_count`."""

    def __init__(self, n_layers: int) -> None:
        self.registry = own = CollectorRegistry()
        self._plans = Counter("layerbudget_plans", "Requests by plan", ["plan", "because"], registry=own)
        layers = [*range(1, n_layers + 1)]
        self._layers = Histogram("layerbudget_layers", "Layers that requests run", buckets=layers, registry=own)
        self._decision = Histogram(
            "layerbudget_decision_ms", "Milliseconds until a request has its plan", buckets=MILLISECONDS, registry=own
        )
        self.first_byte = Histogram(
            "layerbudget_first_byte_seconds", "Until the engine begins its answer", buckets=SECONDS, registry=own
        )
        self._answers = Counter("layerbudget_answers", "Answers by status", ["status"], registry=own)
        self.broken = Counter("layerbudget_broken_streams", "Streams that the engine broke off", registry=own)
        self.in_flight = Gauge("layerbudget_in_flight", "Requests that are being answered", registry=own)
        self._drift = Gauge("layerbudget_drift", "1 while the drift alarm is active and all run in full", registry=own)

    def chosen(self, choice: Choice, milliseconds: float | None = None) -> None:
        self._plans.labels(str(choice.plan), choice.because).inc()
        self._layers.observe(choice.plan.layers)
        if milliseconds is not None:
            self._decision.observe(milliseconds)

    def answered(self, status: int) -> None:
        self._answers.labels(str(status)).inc()

    def page(self, *, drift: bool) -> bytes:
        """The metrics as Prometheus reads them."""
        self._drift.set(drift)
        return generate_latest(self.registry)
