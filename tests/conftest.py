# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a daemon per test module, and one that a test may do anything to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import RunningDaemon, start


def _served(folder: Path) -> Iterator[RunningDaemon]:
    daemon = start(folder)
    yield daemon
    if daemon.process.poll() is None:
        assert daemon.stop() == 0, daemon.log
        assert not daemon.segments()
        assert not daemon.socket.exists()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon that the tests of a module share; at the end it has to stop cleanly."""
    yield from _served(tmp_path_factory.mktemp("daemon"))


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon of this test alone."""
    yield from _served(tmp_path / "run")


@pytest.fixture
def stage_name() -> str:
    """The name of a stage that no other test uses."""
    return f"stage-{uuid.uuid4().hex[:8]}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How deep the long tests go; the defaults are for CI."""
    parser.addoption(
        "--fuzz-messages",
        type=int,
        default=60_000,
        metavar="N",
        help="hostile messages for the decoders; a live daemon gets a tenth (a full run: 1000000)",
    )
    parser.addoption("--life-steps", type=int, default=20_000, help="steps of the stateful test of a daemon's life")
    parser.addoption("--endurance-versions", type=int, default=160, help="versions of the endurance run")
