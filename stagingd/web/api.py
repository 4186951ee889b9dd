# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the page asks for, as JSON. Times are seconds on the machine's monotonic clock."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stagingd.engines import engine_states
from stagingd.health import VersionHealth, standard_deviation
from stagingd.metrics import newest_sealed
from stagingd.rates import pauses, rates
from stagingd.web.snapshot import Snapshot, StageSnapshot

Plain = dict[str, Any]

DIGITS: Final = 4
"""Of figures: what a chart shows."""

SHOWN_PAUSES: Final = 5
"""Pauses of a stage that are told."""

KEPT_VERSIONS: Final = 256
"""Versions whose health is kept as JSON: it is long, and asked for again by everybody who opens the page."""


def _as_json(content: Plain | list[str] | list[int]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def stages(snapshot: Snapshot) -> bytes:
    """The daemon, and every stage: what ``stagingd status`` tells, with rates, pauses and the engines' versions."""
    report = snapshot.report
    told = {
        "now_s": snapshot.at_s,
        "wall_minus_monotonic_s": snapshot.wall_minus_monotonic_s,
        "pid": report.pid,
        "uptime_s": report.uptime_s,
        "connections": report.connections,
        "refused_messages": report.refused_messages,
        "stages": [_stage(stage, snapshot.at_s) for stage in snapshot.stages.values()],
    }
    return _as_json(told)


def _stage(stage: StageSnapshot, now: float) -> Plain:
    engines = engine_states(stage.versions, stage.status.engines)
    return stage.status.model_dump() | {
        "newest": newest_sealed(stage),
        "rates": rates(stage.versions, now).model_dump(),
        "pauses": [pause.model_dump() for pause in pauses(stage.versions, SHOWN_PAUSES)],
        "engine_versions": {name: state.version for name, state in engines.items()},
        "lost_leases": stage.lost_leases,
        "layers": len(stage.layers),
    }


def versions(stage: StageSnapshot, snapshot: Snapshot, last: int) -> bytes:
    """The last versions with their spans: ``[what, who, rank, begin, end or null, bytes or null]``.

    Args:
        stage: which.
        snapshot: of which it is a part.
        last: how many.
    """
    told = (
        {
            "version": one.version,
            "attempt": one.attempt,
            "begun_s": one.begun_s,
            "sealed_s": one.sealed_s,
            "aborted_s": one.aborted_s,
            "reason": one.reason,
            "spans": [[s.what, s.who, s.rank, s.begin_s, s.end_s, s.bytes] for s in one.spans],
        }
        for one in (stage.versions[-last:] if last else ())
    )
    # Version by version: the encoder does not let go of the interpreter, which the event loop is to have meanwhile.
    head = _as_json({"now_s": snapshot.at_s, "ranks": stage.status.ranks})
    return head[:-1] + b',"versions":[' + b",".join(map(_as_json, told)) + b"]}"


def health(stage: StageSnapshot, _: Snapshot, since: int) -> bytes:
    """The health of versions of which something has become known after a revision, column by column.

    Args:
        stage: which.
        since: a revision; 0 for all.
    """
    parts = (
        b'{"layers":',
        _as_json(list(stage.layers)),
        b',"revision":%d,"kept":' % max((one.revision for one in stage.health), default=0),
        _as_json([one.version for one in stage.health]),
        b',"versions":[',
        b",".join(_version(one) for one in stage.health if one.revision > since),
        b"]}",
    )
    return b"".join(parts)


@lru_cache(KEPT_VERSIONS)
def _version(one: VersionHealth) -> bytes:
    moments, errors = one.moments, one.errors
    told: Plain = {"version": one.version, "reporters": len(one.reporters)}
    if moments is not None:
        told |= {
            "amax": _rounded(moments.amax),
            "mean": _rounded(moments.mean),
            "std": _rounded(standard_deviation(moments)),
            "nonfinite": moments.nonfinite.tolist(),
        }
    if errors is not None:
        values, clipped, flushed, squared_error, squared_values = errors.T
        with np.errstate(divide="ignore", invalid="ignore"):  # a layer without any is told of as null
            told |= {
                "clipped": _rounded(clipped / values),
                "flushed": _rounded(flushed / values),
                "error": _rounded(np.sqrt(squared_error / squared_values)),
            }
    return _as_json(told)


def _rounded(values: Iterable[float] | npt.NDArray[Any]) -> list[float | None]:
    """With so many digits; None where it is no number, which JSON does not know."""
    plain = np.asarray(values, np.float64).tolist()
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in plain]
