# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real processes are killed with SIGKILL at every named point of the protocol; the table of outcomes is printed.

In all of them: the newest committed version is read byte for byte, survivors get an error that names the dead one
within two seconds or go on, the next version goes through, and nothing is left of anybody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import away, daemon_dies, trainer_dies, worker_dies
from crashes.points import POINTS, Point, Role, Step, holes, of
from crashes.processes import Holdings, Place
from crashes.scene import check_deserted, warm_up
from crashes.table import Event, Outcome, markdown
from daemons import RunningDaemon

DIES = {Role.TRAINER: trainer_dies.dies, Role.WORKER: worker_dies.dies}
CLIENTS = [point for role in DIES for point in of(role)]
BESIDE_A_DAEMON = [point for point in CLIENTS if point.step is not Step.RECOVERY]
WHILE_IT_IS_AWAY = [point for point in CLIENTS if point.step is Step.RECOVERY]

DEFAULT_RETURN_S = 1.5
SHORT_RETURN_S = 0.2


def by_name(point: Point) -> str:
    return point.id


@pytest.fixture(scope="module")
def shared(daemon: RunningDaemon) -> RunningDaemon:
    """A daemon that serves all scenarios that it survives; here and there everything is made that stays."""
    warm_up(daemon.socket)
    return daemon


@pytest.fixture
def place(tmp_path: Path, shared: RunningDaemon) -> Iterator[Place]:
    """Where the daemons of one test serve; this process holds as much after it as before."""
    before = Holdings.of(os.getpid())
    with Place(tmp_path / "run") as place:
        yield place
    before.check_nothing_is_left()


def test_every_role_has_a_point_at_every_moment_of_every_step_or_takes_no_part() -> None:
    assert not holes()
    assert len({point.id for point in POINTS}) == len(POINTS)


def test_the_table_shows_points_that_were_not_run() -> None:
    point, outcome = POINTS[0], Outcome("no error", 7, 2, "sealed", 3)
    text = markdown({(point, ""): outcome})
    assert text.count("| no error") == 1
    assert text.count("| not run") == len(POINTS) + len(of(Role.DAEMON)) - 1


@pytest.mark.parametrize("point", BESIDE_A_DAEMON, ids=by_name)
def test_a_client_dies(point: Point, shared: RunningDaemon, stage_name: str, outcomes: dict[Event, Outcome]) -> None:
    before = Holdings.of(os.getpid(), shared.process.pid)
    outcomes[point, ""] = DIES[point.role](point, stage_name, shared.socket)
    check_deserted(shared.socket)
    assert not shared.segments()
    before.check_nothing_is_left()


@pytest.mark.parametrize("point", WHILE_IT_IS_AWAY, ids=by_name)
def test_a_client_dies_while_the_daemon_is_away(point: Point, place: Place, outcomes: dict[Event, Outcome]) -> None:
    outcomes[point, ""] = away.dies(point, place)


@pytest.mark.parametrize("point", of(Role.DAEMON), ids=by_name)
def test_the_daemon_dies_and_is_restarted(point: Point, place: Place, outcomes: dict[Event, Outcome]) -> None:
    outcomes[point, "restarted"] = daemon_dies.restarted(point, place)


@pytest.mark.parametrize("point", of(Role.DAEMON), ids=by_name)
def test_the_daemon_dies_and_is_not_restarted(point: Point, place: Place, outcomes: dict[Event, Outcome]) -> None:
    # To wait for nobody takes most of the time: as long as by default at one point of each step.
    first = next(other for other in of(Role.DAEMON) if other.step is point.step)
    place.return_s = DEFAULT_RETURN_S if point is first else SHORT_RETURN_S
    outcomes[point, "not restarted"] = daemon_dies.not_restarted(point, place)
