# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Endurance: versions without end, deaths at random, and a daemon that neither forgets nor grows.

``pytest tests/test_endurance.py -s --endurance-versions 10000`` is the long run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from endurance import Outcome, running

GROWTH_BYTES = 4 * 2**20
"""What the daemon's own memory may vary by between the second quarter of a run and the last."""


@pytest.mark.timeout(24 * 3600)
def test_ten_thousand_versions_and_random_deaths_lose_nothing_and_leak_nothing(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    versions: int = request.config.getoption("--endurance-versions")
    with running(tmp_path / "run", seed=versions) as run:
        outcome = run.go(versions, kill_every=20)
        run.close()
        assert not run.daemon.segments()
        assert not run.daemon.socket.exists()
    report(versions, outcome)
    assert outcome.kills.total() >= versions // 40
    assert outcome.versions["sealed"] >= versions  # of two ranks each
    quarter = len(outcome.usage) // 4
    early, late = outcome.usage[quarter : 2 * quarter], outcome.usage[-quarter:]
    assert max(u.private_bytes for u in late) <= max(u.private_bytes for u in early) + GROWTH_BYTES
    for what in ("shared_bytes", "descriptors", "threads"):
        assert max(getattr(usage, what) for usage in late) <= max(getattr(usage, what) for usage in early), what


def report(versions: int, outcome: Outcome) -> None:
    """For the one who reads the log."""
    first, last = outcome.usage[len(outcome.usage) // 4], outcome.usage[-1]
    print(f"\n{versions} versions in {outcome.seconds:.0f} s; kills {dict(outcome.kills)}")
    print(f"trainer ranks: {dict(outcome.versions)}; reader ranks: {dict(outcome.reads)}")
    print(f"daemon after a quarter: {first}\ndaemon at the end:     {last}")
