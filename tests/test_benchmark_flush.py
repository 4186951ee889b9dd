# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The flush benchmark runs on CPU ranks, checks what it staged, and its arithmetic is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.flush_case import Case, Found, rows

ROOT = Path(__file__).parents[1]
ALWAYS = {
    "pinned copy, one device alone",
    "pinned copy, all devices at once",
    "publish to sealed",
    "publish to sealed, slowest version",
    "device to slot, whole path",
    "device to slot, of the pinned copy of all devices",
    "host blocked by publish, p50",
    "device memory",
    "segment, of one version's bf16 bytes",
    "moments of tensors and rows, of the bf16 bytes",
}
OF_STEPS = {
    "step without publishing",
    "step that publishes",
    "flushes that a step takes",
    "slowdown of steps",
    "slowdown, if a step took four flushes",
    "host blocked by publish and fence in a step, p50",
}


def test_two_cpu_ranks_flush_train_and_gather_a_debug_model(tmp_path: Path) -> None:
    options = [
        "--ranks",
        "2",
        "--versions",
        "1",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--tokens",
        "16",
        "--model",
        "debug",
        "--format",
        "fp8_per_block",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.flush", *options, "--results", str(tmp_path), "--machine", "A Test!"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "flush-a-test.json").read_text())
    assert json.loads(done.stdout) == written
    label = "debug, 2 CPU ranks, fp8_per_block"
    figures = {row["figure"] for row in written["rows"]}
    assert figures == {f"{label}: {figure}" for figure in ALWAYS | OF_STEPS | {"gather and copy, host blocked"}}
    assert "what was staged is right" in done.stderr


def found(begin: float, end: float, together: float) -> Found:
    return Found(
        staged_bytes=10_000_000_000,
        held_bytes=10_000_000_000,
        pinned_alone=50e9,
        pinned_together=together,
        flush=[(begin, end)],
        published=[0.002],
        device_bytes=2**20,
        segment_bytes=20_100_000_000,
        moments_bytes=5_000_000,
    )


def test_a_version_takes_from_the_first_rank_s_begin_to_the_last_one_s_end() -> None:
    case = Case("x", "8B", 2, "cuda")
    value = {row.figure: row.value for row in rows(case, [found(1.0, 1.19, 50e9), found(1.01, 1.2, 55e9)])}
    assert value["x: publish to sealed"] == pytest.approx(200)
    assert value["x: device to slot, whole path"] == pytest.approx(50)
    assert value["x: device to slot, of the pinned copy of all devices"] == pytest.approx(50 / 105)
    assert value["x: segment, of one version's bf16 bytes"] == pytest.approx(2.01)
    assert value["x: moments of tensors and rows, of the bf16 bytes"] == pytest.approx(0.0005)
