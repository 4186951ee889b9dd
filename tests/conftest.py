# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a daemon per test module, and one that a test may do anything to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import table
from crashes.table import Event, Outcome
from daemons import RunningDaemon, start
from exactness_table import Compared, Row
from exactness_table import markdown as exactness_markdown

pytest.register_assert_rewrite("tiny_engines")  # test modules import it before they name it as a plugin

OUTCOMES = pytest.StashKey[dict[Event, Outcome]]()
EXACTNESS = pytest.StashKey[dict[tuple[Row, str], Compared]]()


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
    parser.addoption("--life-steps", type=int, default=13_000, help="steps of the stateful test of a daemon's life")
    parser.addoption("--crash-table", type=Path, metavar="PATH", help="write the table of crash tests as Markdown")
    parser.addoption("--all-cuts", action="store_true", help="compare every model with every layout of trainers")
    parser.addoption("--endurance-versions", type=int, default=160, help="versions of the endurance run")


@pytest.fixture(scope="session")
def outcomes(pytestconfig: pytest.Config) -> dict[Event, Outcome]:
    """What came of the deaths, for the table that is printed at the end."""
    return pytestconfig.stash.setdefault(OUTCOMES, {})


@pytest.fixture(scope="session")
def exactness(pytestconfig: pytest.Config) -> dict[tuple[Row, str], Compared]:
    """What was compared with vLLM's own loading, for the table that is printed at the end."""
    return pytestconfig.stash.setdefault(EXACTNESS, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables of deaths and of exactness, where there are any."""
    compared = config.stash.get(EXACTNESS, {})
    if compared:
        terminalreporter.section("exactness table: bytes + scales, over all ranks")
        terminalreporter.write(exactness_markdown(compared))
    found = config.stash.get(OUTCOMES, {})
    path = config.getoption("crash_table")
    if found and path is not None:
        path.write_text(table.markdown(found))
    if found:
        terminalreporter.section(f"crash table: {len(found)} deaths")
        terminalreporter.write(table.markdown(found))
