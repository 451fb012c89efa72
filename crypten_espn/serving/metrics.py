"""Counts of what a host reports, for Prometheus: a registry for each host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import singledispatchmethod

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from .events import (
    Burnt,
    Connected,
    Dealing,
    Dealt,
    Event,
    Failed,
    Inference,
    Prepared,
    Refused,
    SessionOpened,
)

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_BYTES = "Bytes to and from the peers, by what they were for"


class Metrics:
    """What `/metrics` shows of one server or dealer.

    No label holds a name that a peer chose, so their number is bounded.

    Args:
        role: of the host.
        connections: how many are open.
    """

    def __init__(self, role: str, *, connections: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._prefix = f"crypten_espn_{role}"
        self.gauge("connections_open", "Connections that were greeted", connections)
        self._connected = self._counter("connections", "Connections greeted", "role")
        self._sessions = self._counter("sessions", "Sessions begun or gone on with")
        self._refused = self._counter("refusals", "Connections refused", "reason")
        self._failed = self._counter("failures", "Faults of this side")
        self._inferences = self._counter("inferences", "Inferences answered")
        self._inputs = self._counter("inputs", "Inputs answered, over all batches")
        self._burnt = self._counter("burnt", "Inferences begun and not answered")
        self._prepared = self._counter("prepared", "Inferences prepared or dealt")
        self._bytes = self._counter("bytes", _BYTES, "phase", "direction")
        self._seconds = Histogram(
            f"{self._prefix}_seconds",
            "Seconds of an inference by phase, and of preparing an order",
            ["phase"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def gauge(self, name: str, about: str, value: Callable[[], int]) -> None:
        """Show a number that is looked up when somebody asks for it."""
        made = Gauge(f"{self._prefix}_{name}", about, registry=self._registry)
        made.set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"{self._prefix}_{name}", about, labels, registry=self._registry)

    @singledispatchmethod
    def count(self, event: Event) -> None:
        """Count an event; most kinds are only written to the log."""

    @count.register
    def _(self, event: Connected) -> None:
        self._connected.labels(event.role).inc()
        self._seconds.labels("greeting").observe(event.seconds)

    @count.register
    def _(self, event: SessionOpened) -> None:
        self._sessions.inc()

    @count.register
    def _(self, event: Dealing) -> None:
        self._sessions.inc()

    @count.register
    def _(self, event: Refused) -> None:
        self._refused.labels(event.reason).inc()

    @count.register
    def _(self, event: Failed) -> None:
        self._failed.inc()

    @count.register
    def _(self, event: Prepared) -> None:
        self._prepared.inc(event.count)
        self._seconds.labels("prepare").observe(event.seconds)
        self._bytes.labels("prepare", "sent").inc(event.sent)
        self._bytes.labels("prepare", "received").inc(event.received)

    @count.register
    def _(self, event: Dealt) -> None:
        self._prepared.inc(event.count)
        self._seconds.labels("deal").observe(event.seconds)
        self._bytes.labels("deal", "sent").inc(event.sent)

    @count.register
    def _(self, event: Inference) -> None:
        self._inferences.inc()
        self._inputs.inc(event.batch)
        for phase, seconds in (
            ("inference", event.seconds),
            ("material", event.material_s),
            ("compute", event.compute_s),
            ("wait", event.wait_s),
        ):
            self._seconds.labels(phase).observe(seconds)
        self._bytes.labels("inference", "sent").inc(event.sent)
        self._bytes.labels("inference", "received").inc(event.received)

    @count.register
    def _(self, event: Burnt) -> None:
        self._burnt.inc()


class _Summed:
    """A collector of several pages, added up."""

    def __init__(self, pages: Sequence[bytes], gone: Sequence[bytes]) -> None:
        self._families: dict[str, Metric] = {}
        self._values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]
        self._values = {}
        for text in pages:
            self._add(text, gauges=True)
        for text in gone:
            self._add(text, gauges=False)

    def _add(self, text: bytes, *, gauges: bool) -> None:
        for family in text_string_to_metric_families(text.decode()):
            made = family.name.endswith("_created")
            if family.type == "gauge" and not (gauges or made):
                continue
            self._families.setdefault(family.name, family)
            values = self._values.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                if made:  # since when: the first is
                    values[key] = min(values.get(key, sample.value), sample.value)
                else:
                    values[key] = values.get(key, 0.0) + sample.value

    def collect(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            total = Metric(name, family.documentation, family.type)
            for (sample, labels), value in self._values[name].items():
                total.add_sample(sample, dict(labels), value)
            yield total


def summed(pages: Sequence[bytes], *, gone: Sequence[bytes] = ()) -> bytes:
    """The metrics of several processes as one page.

    Args:
        pages: of those that run.
        gone: the last ones of those that do not, of which only counts remain.
    """
    registry = CollectorRegistry()
    registry.register(_Summed(pages, gone))
    return generate_latest(registry)
