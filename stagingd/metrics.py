# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A snapshot as metrics for Prometheus. What is told of is what is there now: no series outlives its stage or engine.

Engines and ranks are labels only of those that are attached, of which the daemon admits a bounded number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from stagingd.engines import engine_states
from stagingd.history import What
from stagingd.moments import Moments
from stagingd.slots import SlotState
from stagingd.totals import BOUNDS_S, Durations
from stagingd.web.snapshot import Snapshot, StageSnapshot

Labelled = Iterable[tuple[tuple[str, ...], float]]
"""Of one metric, its series: the values of their labels, and their own."""

DURATIONS: Final[dict[What, str]] = {
    "fill": "From a trainer rank's begin to its commit.",
    "measure": "How long a trainer rank waited for the moments of the others.",
    "seal": "From the last commit of a version until it was sealed.",
    "read": "From an engine rank's lease to its release.",
    "swap": "For how long a prefetched version kept an engine's rank from generating, as its worker tells.",
    "update": "For how long a version read in place kept an engine's rank from generating, as its worker tells.",
}

BYTES: Final[dict[What, tuple[str, str]]] = {
    "fill": ("stagingd_filled_bytes", "Bytes that trainer ranks put into slots."),
    "swap": ("stagingd_swapped_bytes", "Bytes that engines' workers copied from memory beside the weights over them."),
    "update": ("stagingd_updated_bytes", "Bytes that engines' workers wrote to live weights from a slot."),
}


def exposition(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """All metrics, and their content type: Prometheus' text format, or OpenMetrics where ``accept`` asks for it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Of(snapshot))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Of(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        return families(self._snapshot)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """The daemon's metrics, and then those of every stage."""
    report, stages = snapshot.report, list(snapshot.stages.values())
    yield _gauge("stagingd_build_info", "The version of stagingd.", ("version",), [((version("stagingd"),), 1)])
    yield _gauge("stagingd_uptime_seconds", "Since the daemon began.", (), [((), report.uptime_s)])
    yield _gauge("stagingd_connections", "Connections that have said hello.", (), [((), report.connections)])
    yield _gauge("stagingd_accepting", "1 while new connections are taken.", (), [((), snapshot.door_open)])
    yield _counter(
        "stagingd_refused_messages",
        "Messages that were malformed or out of place.",
        (),
        [((), report.refused_messages)],
    )
    yield from itertools.chain(
        _states(stages), _versions(stages, snapshot), _readers(stages), _times(stages), _health(stages)
    )


def _gauge(name: str, text: str, labels: Sequence[str], series: Labelled) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), series)


def _counter(name: str, text: str, labels: Sequence[str], series: Labelled) -> Metric:
    """Prometheus adds ``_total`` to its name."""
    return _filled(CounterMetricFamily(name, text, labels=labels), series)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, series: Labelled) -> Metric:
    for labels, value in series:
        family.add_metric(labels, float(value))
    return family


def _each(stages: Iterable[StageSnapshot], value: Callable[[StageSnapshot], float | None]) -> Labelled:
    """One series of every stage that has a value."""
    for stage in stages:
        found = value(stage)
        if found is not None:
            yield (stage.status.stage,), found


def _states(stages: Sequence[StageSnapshot]) -> Iterator[Metric]:
    by = ("stage",)
    policies = (((one.status.stage, one.status.policy), 1.0) for one in stages)
    yield _gauge("stagingd_stage_info", "How a stage behaves.", ("stage", "policy"), policies)
    yield _gauge(
        "stagingd_segment_bytes", "Shared memory of a stage.", by, _each(stages, lambda s: s.status.segment_bytes)
    )
    yield _gauge("stagingd_tensors", "Tensors of a stage.", by, _each(stages, lambda s: s.status.tensors))
    yield _gauge("stagingd_trainer_ranks", "Trainer ranks of a stage.", by, _each(stages, lambda s: s.status.ranks))
    yield _gauge(
        "stagingd_trainer_ranks_attached", "Those that are there.", by, _each(stages, lambda s: len(s.status.trainers))
    )
    yield _gauge(
        "stagingd_engines_attached", "Engines that read a stage.", by, _each(stages, lambda s: len(s.status.engines))
    )
    slots = (
        ((one.status.stage, str(number), state.value), float(slot.state == state.value))
        for one in stages
        for number, slot in enumerate(one.status.slots)
        for state in SlotState
    )
    yield _gauge("stagingd_slot_state", "1 for the state that a slot is in.", ("stage", "slot", "state"), slots)
    yield _gauge("stagingd_waiting_requests", "Requests that wait.", by, _each(stages, lambda s: len(s.status.waiting)))
    waits = _each(stages, lambda s: max((w.waited_s for w in s.status.waiting), default=0.0))
    yield _gauge("stagingd_longest_wait_seconds", "For how long the first of them waits.", by, waits)


def newest_sealed(stage: StageSnapshot) -> int | None:
    """The newest version that an engine can read."""
    there = (SlotState.SEALED.value, SlotState.FRONT.value)
    return max((s.version for s in stage.status.slots if s.state in there and s.version is not None), default=None)


def _sealed_s(stage: StageSnapshot) -> float | None:
    return max((one.sealed_s for one in stage.versions if one.sealed_s is not None), default=None)


def _filling_since(stage: StageSnapshot) -> float | None:
    last = stage.versions[-1] if stage.versions else None
    return last.begun_s if last is not None and last.sealed_s is None and last.aborted_s is None else None


def _versions(stages: Sequence[StageSnapshot], snapshot: Snapshot) -> Iterator[Metric]:
    by, wall, now = ("stage",), snapshot.wall_minus_monotonic_s, snapshot.at_s
    yield _gauge(
        "stagingd_newest_sealed_version", "The newest version that can be read.", by, _each(stages, newest_sealed)
    )
    sealed = _each(stages, lambda s: None if (at := _sealed_s(s)) is None else at + wall)
    yield _gauge("stagingd_newest_sealed_timestamp_seconds", "When it was sealed, since 1970.", by, sealed)
    filling = _each(stages, lambda s: 0.0 if (at := _filling_since(s)) is None else now - at)
    yield _gauge("stagingd_filling_seconds", "For how long a version is being filled; 0 while none is.", by, filling)
    yield _counter(
        "stagingd_sealed_versions", "Versions that were sealed.", by, _each(stages, lambda s: s.status.sealed_versions)
    )
    yield _counter(
        "stagingd_aborted_versions",
        "Versions that were given up.",
        by,
        _each(stages, lambda s: s.status.aborted_versions),
    )
    waited = _each(stages, lambda s: s.status.begins_kept_waiting)
    yield _counter("stagingd_begins_kept_waiting", "Times that a trainer rank waited for a slot.", by, waited)


def _readers(stages: Sequence[StageSnapshot]) -> Iterator[Metric]:
    by = ("stage", "engine")
    states = [(one, engine_states(one.versions, one.status.engines)) for one in stages]
    versions = [((one.status.stage, name), state.version) for one, of in states for name, state in of.items()]
    yield _gauge(
        "stagingd_engine_version",
        "The version that an engine computes with, as its workers tell; else the newest that it has read.",
        by,
        (((*labels,), float(known)) for labels, known in versions if known is not None),
    )
    newest = {one.status.stage: newest_sealed(one) for one in stages}
    yield _gauge(
        "stagingd_engine_behind_versions",
        "By how much that is less than the newest sealed version.",
        by,
        (
            (labels, float(max(0, new - known)))
            for labels, known in versions
            if known is not None and (new := newest[labels[0]]) is not None
        ),
    )
    pauses = (
        ((one.status.stage, name, str(rank)), span.end_s - span.begin_s)
        for one, of in states
        for name, state in of.items()
        for rank, span in state.pauses.items()
        if span.end_s is not None
    )
    yield _gauge(
        "stagingd_last_pause_seconds",
        "For how long the last version kept an engine's rank from generating.",
        (*by, "rank"),
        pauses,
    )
    ages = (((one.status.stage, lease.engine), lease.age_s) for one in stages for lease in one.status.leases)
    yield _gauge("stagingd_lease_age_seconds", "For how long an engine holds a version.", by, ages)
    lost = _each(stages, lambda s: s.lost_leases)
    yield _counter("stagingd_lost_leases", "Leases that were taken away.", ("stage",), lost)


def _times(stages: Sequence[StageSnapshot]) -> Iterator[Metric]:
    for what, text in DURATIONS.items():
        family = HistogramMetricFamily(f"stagingd_{what}_seconds", text, labels=("stage",))
        for stage in stages:
            durations = stage.totals.get(what, Durations())
            bounds = [*map(str, BOUNDS_S), "+Inf"]
            buckets = list(zip(bounds, itertools.accumulate(durations.counts), strict=True))
            family.add_metric((stage.status.stage,), buckets, durations.seconds)
        yield family
    for what, (name, text) in BYTES.items():
        moved = [((one.status.stage,), float(one.totals.get(what, Durations()).bytes)) for one in stages]
        yield _counter(name, text, ("stage",), moved)


def _health(stages: Sequence[StageSnapshot]) -> Iterator[Metric]:
    yield _gauge(
        "stagingd_examined_version", "The version that amax is of.", ("stage",), _moments(stages, lambda v, _: v)
    )
    nonfinite = _moments(stages, lambda _, moments: int(moments.nonfinite.sum()))
    yield _gauge("stagingd_nonfinite_values", "NaN and infinite values of that version.", ("stage",), nonfinite)
    amax = _moments(stages, lambda _, moments: float(moments.amax.max(initial=0.0)))
    yield _gauge("stagingd_amax", "The greatest magnitude of its finite values.", ("stage",), amax)
    for name, text, number in (("clipped", "clips", 1), ("flushed", "flushes to zero", 2)):
        told = f"Share of values that quantization {text}, in the last version that workers told of."
        yield _gauge(f"stagingd_{name}_share", told, ("stage",), _errors(stages, partial(_share, number)))
    told = "Norm of the quantization error in proportion to that of the values, likewise."
    yield _gauge("stagingd_relative_error", told, ("stage",), _errors(stages, _relative))


def _moments(stages: Iterable[StageSnapshot], value: Callable[[int, Moments], float]) -> Labelled:
    """Of the newest version that was looked at."""
    for stage in stages:
        found = next(((v.version, v.moments) for v in reversed(stage.health) if v.moments is not None), None)
        if found is not None:
            yield (stage.status.stage,), value(*found)


def _errors(stages: Iterable[StageSnapshot], value: Callable[[Sequence[float]], float]) -> Labelled:
    """Of the newest version that workers have told of: the sums of ``LayerError`` over all layers."""
    for stage in stages:
        found = next((v.errors for v in reversed(stage.health) if v.errors is not None), None)
        if found is not None:
            yield (stage.status.stage,), value(found.sum(0).tolist())


def _share(number: int, sums: Sequence[float]) -> float:
    return sums[number] / max(sums[0], 1.0)


def _relative(sums: Sequence[float]) -> float:
    *_, squared_error, squared_values = sums
    return float((squared_error / squared_values) ** 0.5) if squared_values else 0.0
