# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is answered to which path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qs, urlsplit

from stagingd.metrics import exposition
from stagingd.web import api, page
from stagingd.web.board import Board, LoopBusy
from stagingd.web.snapshot import Snapshot, StageSnapshot

ALWAYS: Final = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every answer."""

MOST_PARAMETERS: Final = 8
"""Parameters of a query."""

MOST_ANSWERS: Final = 32
"""Answers that are kept of one snapshot."""

LONGEST_NUMBER: Final = 20
"""Digits of one."""


@dataclass(frozen=True)
class Response:
    """An answer."""

    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str]


def plain(status: HTTPStatus, text: str, **headers: str) -> Response:
    """A line for people."""
    return Response(status, f"{text}\n".encode(), ALWAYS | {"Content-Type": "text/plain; charset=utf-8"} | headers)


@dataclass(frozen=True)
class _Request:
    """What is asked, of which snapshot."""

    query: Mapping[str, str]
    accept: str
    snapshot: Snapshot


PATHS: Final[dict[str, Callable[[_Request], Response]]] = {
    "/metrics": lambda asked: _metrics(asked.snapshot, asked.accept),
    "/healthz": lambda _: plain(HTTPStatus.OK, "alive"),
    "/readyz": lambda asked: _ready(asked.snapshot),
    "/api/stages": lambda asked: _json(api.stages(asked.snapshot)),
    "/api/versions": lambda asked: _of_stage(asked, "last", api.versions),
    "/api/health": lambda asked: _of_stage(asked, "since", api.health),
}
"""What is answered from a snapshot; beside it there is the page, which is always the same."""


class Answerer:
    """Answers paths from the board's snapshots. For several threads at once.

    Of one snapshot an answer is made once, and one answer at a time: however many ask, the event loop has to share the
    interpreter with one of them at most.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._making = threading.Lock()
        self._made: dict[tuple[str, str], Response] = {}
        self._made_of: Snapshot | None = None

    def answer(self, path: str, accept: str) -> Response:
        """The answer to a path with its query.

        Args:
            path: as it stands in the request.
            accept: the request's header of that name.
        """
        try:
            split = urlsplit(path)
            query = {name: values[0] for name, values in parse_qs(split.query, max_num_fields=MOST_PARAMETERS).items()}
        except ValueError:
            return plain(HTTPStatus.BAD_REQUEST, "the path cannot be read")
        if split.path == "/":
            return Response(HTTPStatus.OK, page.HTML, ALWAYS | page.HEADERS)
        found = PATHS.get(split.path)
        if found is None:
            return plain(HTTPStatus.NOT_FOUND, f"there are: /, {', '.join(PATHS)}")
        try:
            snapshot = self._board.current()
        except LoopBusy as busy:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, busy.what)
        with self._making:
            if self._made_of is not snapshot or len(self._made) >= MOST_ANSWERS:
                self._made, self._made_of = {}, snapshot
            key = (path, accept)
            if key not in self._made:
                self._made[key] = found(_Request(query, accept, snapshot))
            return self._made[key]


def _metrics(snapshot: Snapshot, accept: str) -> Response:
    body, content_type = exposition(snapshot, accept)
    return Response(HTTPStatus.OK, body, ALWAYS | {"Content-Type": content_type})


def _ready(snapshot: Snapshot) -> Response:
    if not snapshot.door_open:
        return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no new connections are taken: descriptors are short")
    return plain(HTTPStatus.OK, "ready")


def _of_stage(asked: _Request, number: str, of: Callable[[StageSnapshot, Snapshot, int], bytes]) -> Response:
    stage, given = asked.snapshot.stages.get(asked.query.get("stage", "")), asked.query.get(number, "0")
    if stage is None:
        return plain(HTTPStatus.NOT_FOUND, "there is no such stage")
    if not (given.isascii() and given.isdigit() and len(given) < LONGEST_NUMBER):
        return plain(HTTPStatus.BAD_REQUEST, f"{number} is a number")
    return _json(of(stage, asked.snapshot, int(given)))


def _json(body: bytes) -> Response:
    return Response(HTTPStatus.OK, body, ALWAYS | {"Content-Type": "application/json"})
