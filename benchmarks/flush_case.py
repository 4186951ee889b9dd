# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A case of ``benchmarks.flush``: one model on so many ranks, and what is found out about it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from benchmarks.report import Row
from stagingd.formats import StageFormat

MIB = 2**20
FLUSHES_PER_STEP = 4
"""That a step should take, for its slowdown to be judged: microbatches are whole, so it may take more."""


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        label: for the report.
        model: a key of ``benchmarks.flush_model.SHAPES``.
        ranks: trainer ranks, one per device.
        device: "cuda" or "cpu".
        versions: timed versions.
        step_tokens: tokens of a microbatch.
        steps: timed steps of a round, with publishing and as many without; 0 for none.
        rounds: how often steps without and with publishing take turns.
        checkpoint: whether torch's asynchronous checkpoint staging is timed too.
        gather: whether gathering full tensors is timed too.
        stage_format: in which the trainers stage; None for bf16.
    """

    label: str
    model: str
    ranks: int
    device: str
    versions: int = 7
    step_tokens: int = 4096
    steps: int = 8
    rounds: int = 3
    checkpoint: bool = True
    gather: bool = True
    stage_format: StageFormat | None = None


@dataclass
class Found:
    """What one rank has measured; times in seconds, sizes in bytes.

    Attributes:
        staged_bytes: one version in bf16, of all ranks.
        held_bytes: its tensors as the stage holds them.
        pinned_alone: bytes a second of the pinned copy, on one device alone; 0 on other ranks.
        pinned_together: bytes a second of this rank's copy while all ranks copy.
        flush: per version, begin and end on the machine's one clock.
        published: per version, how long ``publish`` held the host.
        fenced: per version, how long ``fence`` held the host, before the next optimizer step.
        device_bytes: device memory that staging took, at its peak.
        segment_bytes: shared memory of the stage; 0 on other ranks.
        moments_bytes: of it, the moments of tensors and rows, in one slot.
        plain_steps, staged_steps: seconds per step, without and with publishing.
        gathered: per repetition, how long gathering full tensors and copying them held the host.
        checkpointed: per repetition, how long torch's checkpoint staging held the host, and when it was done.
        notes: what was left out, and why.
    """

    staged_bytes: int
    held_bytes: int = 0
    pinned_alone: float = 0.0
    pinned_together: float = 0.0
    flush: list[tuple[float, float]] = field(default_factory=list)
    published: list[float] = field(default_factory=list)
    fenced: list[float] = field(default_factory=list)
    device_bytes: int = 0
    segment_bytes: int = 0
    moments_bytes: int = 0
    plain_steps: list[float] = field(default_factory=list)
    staged_steps: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)
    gathered_bytes: int = 0
    checkpointed: list[tuple[float, float]] = field(default_factory=list)
    flush_of_step: float = 0.0
    notes: list[str] = field(default_factory=list)


def rows(case: Case, ranks: Sequence[Found]) -> list[Row]:
    """The figures of a case: of ranks that work together, the time of the last."""
    label = case.label
    spans = list(zip(*(rank.flush for rank in ranks), strict=True))
    seconds = [max(end for _, end in parts) - min(begin for begin, _ in parts) for parts in spans]
    staged = ranks[0].staged_bytes
    rate = ranks[0].held_bytes / statistics.median(seconds)
    together = sum(rank.pinned_together for rank in ranks)
    found = [
        Row(f"{label}: pinned copy, one device alone", ranks[0].pinned_alone / 1e9, "GB/s", "higher"),
        Row(f"{label}: pinned copy, all devices at once", together / 1e9, "GB/s", "higher"),
        Row(f"{label}: publish to sealed", statistics.median(seconds) * 1e3, "ms", "lower"),
        Row(f"{label}: publish to sealed, slowest version", max(seconds) * 1e3, "ms", "lower"),
        Row(f"{label}: device to slot, whole path", rate / 1e9, "GB/s", "higher"),
        Row(f"{label}: device to slot, of the pinned copy of all devices", rate / together, "ratio", "higher", 0.95),
        Row(f"{label}: host blocked by publish, p50", _slowest(ranks, "published") * 1e3, "ms", "lower", 5.0),
        Row(f"{label}: device memory", max(rank.device_bytes for rank in ranks) / MIB, "MiB", "lower", 256.0),
        Row(f"{label}: segment, of one version's bf16 bytes", ranks[0].segment_bytes / staged, "ratio", "lower"),
        Row(
            f"{label}: moments of tensors and rows, of the bf16 bytes",
            ranks[0].moments_bytes / staged,
            "ratio",
            "lower",
            0.001,
        ),
    ]
    if ranks[0].staged_steps:
        found += _step_rows(label, ranks)
    if ranks[0].gathered:
        found.append(Row(f"{label}: gather and copy, host blocked", _slowest(ranks, "gathered") * 1e3, "ms", "lower"))
    if ranks[0].checkpointed:
        blocked = max(statistics.median(held for held, _ in rank.checkpointed) for rank in ranks)
        done = max(statistics.median(end for _, end in rank.checkpointed) for rank in ranks)
        found.append(Row(f"{label}: torch checkpoint staging, host blocked", blocked * 1e3, "ms", "lower"))
        found.append(Row(f"{label}: torch checkpoint staging, done", done * 1e3, "ms", "lower"))
    if case.device == "cpu":  # the aims are for GPUs
        found = [replace(row, aim=None) for row in found]
    return found


def _slowest(ranks: Sequence[Found], what: str) -> float:
    return max(statistics.median(getattr(rank, what)) for rank in ranks)


def _step_rows(label: str, ranks: Sequence[Found]) -> list[Row]:
    plain, staged = _slowest(ranks, "plain_steps"), _slowest(ranks, "staged_steps")
    return [
        Row(f"{label}: step without publishing", plain * 1e3, "ms", "lower"),
        Row(f"{label}: step that publishes", staged * 1e3, "ms", "lower"),
        Row(f"{label}: flushes that a step takes", plain / ranks[0].flush_of_step, "ratio", "higher"),
        Row(f"{label}: slowdown of steps", (staged / plain - 1) * 100, "%", "lower"),
        Row(f"{label}: slowdown, if a step took four flushes",
            (staged - plain) / (FLUSHES_PER_STEP * ranks[0].flush_of_step) * 100, "%", "lower", 2.0),
        Row(f"{label}: host blocked by publish and fence in a step, p50",
            max(statistics.median(map(sum, zip(rank.published, rank.fenced, strict=False))) for rank in ranks) * 1e3,
            "ms", "lower", 5.0),
    ]  # fmt: skip
