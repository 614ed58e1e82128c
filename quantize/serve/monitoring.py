"""What can be watched: Prometheus metrics, and the memory of this machine, its cards and the models' processes.

In: requests as they end, engines, slots. Out: the text of /metrics, memory in bytes, the memory line of the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from quantize.serve.engines.base import Engine
from quantize.serve.limits import Slots
from quantize.serve.logs import Log
from quantize.system.gpus import nvidia_gpus
from quantize.system.machine import ram, resident_bytes

GB = 1e9
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Facts:
    """What the edge knows of a request when it is over. Times in seconds, sizes in bytes."""

    route: str
    status: int
    seconds: float
    model: str | None = None
    runtime: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float | None = None


class Metrics:
    """Counts requests; the state of engines and slots is read when it is asked for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "quantize_requests", "Requests by route and status", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "quantize_request_seconds", "Time to the last byte", ("route",), registry=self.registry, buckets=SECONDS
        )
        self._first = Histogram(
            "quantize_time_to_first_token_seconds", "From request to first token", ("model",),
            registry=self.registry, buckets=SECONDS,
        )  # fmt: skip
        self._in = Counter("quantize_tokens_in", "Tokens of prompts", ("model",), registry=self.registry)
        self._out = Counter("quantize_tokens_out", "Tokens of answers", ("model",), registry=self.registry)
        self.fallbacks = Counter(
            "quantize_fallbacks", "Requests that another model took over", ("model", "by"), registry=self.registry
        )
        self.deaths = Counter(
            "quantize_engine_deaths", "Times that a model's process died", ("model",), registry=self.registry
        )
        self._cache: dict[tuple[str, int], Any] = {}

    def follow(self, engines: Mapping[str, Engine], slots: Mapping[str, Slots]) -> None:
        """Show the state of these, too."""
        self.registry.register(_State(engines, slots))

    def count(self, facts: Facts) -> None:
        """Count one request that is over."""
        children = self._cache.get((facts.route, facts.status))
        if children is None:
            counter = self._requests.labels(facts.route, str(facts.status))
            children = self._cache[facts.route, facts.status] = (counter, self._seconds.labels(facts.route))
        children[0].inc()
        children[1].observe(facts.seconds)
        if facts.model is not None:
            self._in.labels(facts.model).inc(facts.prompt_tokens)
            self._out.labels(facts.model).inc(facts.completion_tokens)
            if facts.first_token_seconds is not None:
                self._first.labels(facts.model).observe(facts.first_token_seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _State:
    """A collector that reads engines and slots."""

    def __init__(self, engines: Mapping[str, Engine], slots: Mapping[str, Slots]) -> None:
        self._engines = engines
        self._slots = slots

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        ready = GaugeMetricFamily("quantize_model_ready", "1 if the model answers", labels=["model"])
        queue = GaugeMetricFamily("quantize_queue_length", "Requests that wait for a slot", labels=["model"])
        active = GaugeMetricFamily("quantize_active_requests", "Answers under way", labels=["model"])
        memory = GaugeMetricFamily("quantize_memory_rss_bytes", "Resident memory", labels=["process"])
        info = InfoMetricFamily("quantize_model", "What a model runs in", labels=["model"])
        memory.add_metric(["gateway"], resident_bytes())
        for name, engine in self._engines.items():
            ready.add_metric([name], float(engine.status.ready))
            queue.add_metric([name], self._slots[name].waiting)
            active.add_metric([name], self._slots[name].active)
            memory.add_metric([name], engine.memory_bytes())
            device = str(engine.status.details.get("device", ""))
            info.add_metric([name], {"runtime": engine.runtime, "device": device})
        used = GaugeMetricFamily("quantize_ram_used_bytes", "RAM in use, of the container where it has a limit")
        total = GaugeMetricFamily("quantize_ram_bytes", "RAM, or the container's limit")
        size, available = ram()
        used.add_metric([], size - available)
        total.add_metric([], size)
        return (ready, queue, active, memory, info, used, total, *_vram())


def _vram() -> Iterable[Metric]:
    """Of each card, by the driver: what all processes have of it, the context of each among it."""
    used = GaugeMetricFamily(
        "quantize_vram_used_bytes", "Memory of a GPU in use, by any process", labels=["gpu", "name"]
    )
    total = GaugeMetricFamily("quantize_vram_bytes", "Memory of a GPU", labels=["gpu", "name"])
    for index, gpu in enumerate(nvidia_gpus()):
        if gpu.vram_bytes:
            used.add_metric([str(index), gpu.name], gpu.used_bytes)
            total.add_metric([str(index), gpu.name], gpu.vram_bytes)
    return (used, total)


def on_gpus(engines: Iterable[Engine]) -> dict[str, Any]:
    """What all models take of GPUs, by their own accounts once they are loaded; {"gpu": None} where none is on one."""
    told = [engine.status.details.get("memory") or {} for engine in engines]
    told = [item for item in told if item.get("gpu")]
    if not told:
        return {"gpu": None}
    sums = {name: sum(item.get(name, 0) for item in told) for name in ("vram_allocated", "vram_reserved")}
    return {"gpu": ", ".join(dict.fromkeys(item["gpu"] for item in told)), **sums}


def memory_line(moment: str, gpu: Mapping[str, Any]) -> str:
    """`[After model load] GPU: NAME - VRAM: a GB (allocated) / r GB (reserved) | RAM: u GB/t GB (p%)`

    GB of 10^9 bytes. gpu: a model's own account of its card; {"gpu": None} where it has none.
    """
    total, available = ram()
    used = total - available
    card = "none"
    if gpu.get("gpu"):
        allocated, reserved = (gpu.get(name, 0) / GB for name in ("vram_allocated", "vram_reserved"))
        card = f"{gpu['gpu']} - VRAM: {allocated:.2f} GB (allocated) / {reserved:.2f} GB (reserved)"
    percent = 100 * used / total if total else 0
    return f"[{moment}] GPU: {card} | RAM: {used / GB:.2f} GB/{total / GB:.2f} GB ({percent:.0f}%)"


def nothing_on(device: str) -> dict[str, Any]:
    """What a model takes of a device before it is loaded, as it will say itself: nothing, of which card."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return {"gpu": None}
    gpus = nvidia_gpus() if kind == "cuda" else ()
    return {"gpu": gpus[int(number)].name if number and int(number) < len(gpus) else device}


class Watcher:
    """Hears what engines say of themselves; writes it into the log and counts deaths."""

    def __init__(self, log: Log, metrics: Metrics) -> None:
        self._log = log
        self._metrics = metrics

    def about(self, name: str) -> Callable[[str, dict[str, Any]], None]:
        """A listener for the engine of this name."""

        def tell(event: str, facts: dict[str, Any]) -> None:
            if event in ("generation_started", "generation_ended"):
                moment = "Before generation" if event.endswith("started") else "After generation"
                self._log.info(memory_line(moment, facts["memory"]), model=name, trace_id=facts["trace_id"])
            elif event == "engine_starting":
                self._log.info(event, model=name, **facts)
                self._log.info(memory_line("Before model load", nothing_on(facts["device"])), model=name)
            elif event == "engine_ready":
                self._say_ready(name, facts)
            elif event in ("engine_died", "engine_failed", "upstream_away"):
                if event == "engine_died":
                    self._metrics.deaths.labels(name).inc()
                self._log.error(event, model=name, **facts)
            else:
                self._log.info(event, model=name, **facts)

        return tell

    def _say_ready(self, name: str, facts: dict[str, Any]) -> None:
        kept = ("runtime", "device", "devices", "context", "slots", "load_seconds")
        self._log.info("engine_ready", model=name, **{key: facts[key] for key in kept if key in facts})
        self._log.info(memory_line("After model load", facts["memory"]), model=name)
        for warning in facts.get("warnings", ()):
            self._log.warning("engine_warning", model=name, warning=warning)
