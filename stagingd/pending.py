# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Questions that cannot be answered yet."""

from __future__ import annotations

from dataclasses import dataclass

from stagingd.errors import DeadlineExceeded
from stagingd.question import Question
from stagingd.session import Session
from stagingd.waiting import Waiting


@dataclass(eq=False)
class Pending:
    """A question that waits: who asked, until when. ``seen`` are the occasions of its stage when last asked."""

    session: Session
    request_id: bytes
    stage: str
    question: Question
    deadline: float
    since: float
    waiting: Waiting
    seen: tuple[int, int] | None


def overdue(pending: Pending, now: float) -> DeadlineExceeded:
    """The error of a question whose deadline has passed: what was awaited, and from whom."""
    waiting = pending.waiting
    return DeadlineExceeded(
        f"waited {now - pending.since:.1f} s for {waiting.what}; awaited: {', '.join(waiting.peers) or 'nobody'}",
        remedy="look at the peers named here (stagingd status), or allow more time",
        stage=pending.stage,
        peer=", ".join(waiting.peers),
    )
