# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What is answered to which path."""

from __future__ import annotations

import json
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


class Answerer:
    """Answers paths from the board's snapshots. For several threads at once."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._paths: dict[str, Callable[[Mapping[str, str], str], Response]] = {
            "/": lambda _query, _accept: Response(HTTPStatus.OK, page.HTML, ALWAYS | page.HEADERS),
            "/metrics": self._metrics,
            "/healthz": lambda _query, _accept: self._alive(),
            "/readyz": lambda _query, _accept: self._ready(),
            "/api/stages": lambda _query, _accept: _as_json(api.stages(self._board.current())),
            "/api/versions": lambda query, _accept: self._of_stage(query, "last", api.versions),
            "/api/health": lambda query, _accept: self._of_stage(query, "since", api.health),
        }

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
        found = self._paths.get(split.path)
        if found is None:
            return plain(HTTPStatus.NOT_FOUND, f"there are: {', '.join(self._paths)}")
        try:
            return found(query, accept)
        except LoopBusy as busy:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, busy.what)

    def _metrics(self, _: Mapping[str, str], accept: str) -> Response:
        body, content_type = exposition(self._board.current(), accept)
        return Response(HTTPStatus.OK, body, ALWAYS | {"Content-Type": content_type})

    def _alive(self) -> Response:
        self._board.current()
        return plain(HTTPStatus.OK, "alive")

    def _ready(self) -> Response:
        if not self._board.current().door_open:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no new connections are taken: descriptors are short")
        return plain(HTTPStatus.OK, "ready")

    def _of_stage(
        self, query: Mapping[str, str], number: str, of: Callable[[StageSnapshot, Snapshot, int], api.Plain]
    ) -> Response:
        snapshot = self._board.current()
        stage, given = snapshot.stages.get(query.get("stage", "")), query.get(number, "0")
        if stage is None:
            return plain(HTTPStatus.NOT_FOUND, "there is no such stage")
        if not (given.isascii() and given.isdigit() and len(given) < LONGEST_NUMBER):
            return plain(HTTPStatus.BAD_REQUEST, f"{number} is a number")
        return _as_json(of(stage, snapshot, int(given)))


def _as_json(content: api.Plain) -> Response:
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return Response(HTTPStatus.OK, body, ALWAYS | {"Content-Type": "application/json"})
