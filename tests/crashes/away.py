# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A client is killed while the daemon is away, or as it comes back to its successor."""

from __future__ import annotations

from crashes import trainer_dies, worker_dies
from crashes.play import STAGE
from crashes.points import Moment, Point, Role
from crashes.processes import Actor, Place
from crashes.scene import check_deserted, observer
from crashes.table import Outcome


def dies(point: Point, place: Place) -> Outcome:
    """The daemon is killed while the doomed client pauses, and another one follows before the client dies or after."""
    first = place.daemon()
    observer(place.socket).close()

    def paused(doomed: Actor) -> float:
        assert doomed.said() == "paused"
        first.kill()
        first.ended()
        if point.moment is not Moment.BEFORE:
            place.daemon()
        doomed.tell("go on")
        died = doomed.died_at(point)
        if point.moment is Moment.BEFORE:
            place.daemon()
            observer(place.socket).close()
        return died

    dies_so = trainer_dies.dies if point.role is Role.TRAINER else worker_dies.dies
    outcome = dies_so(point, STAGE, place.socket, paused)
    check_deserted(place.socket)
    assert not place.segments()
    place.stop()
    return outcome
