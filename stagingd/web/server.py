# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Serving snapshots over HTTP: metrics, health, readiness, and the status page.

Apart from the event loop, in threads of a bounded number. A request is a GET of at most ``REQUEST_BYTES``, and is given
``REQUEST_S`` seconds to come and as long to be answered. Nothing in it names a file. There is no password: whoever
reaches the address may read what is served, and nothing can be changed by it.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import socketserver
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import structlog

from stagingd.errors import StagingError
from stagingd.web.answers import Answerer, Response, plain
from stagingd.web.board import Board

REQUEST_S: Final = 5.0
"""How long a request may take to come, and an answer to be taken, in seconds."""

MOST_REQUESTS: Final = 16
"""Requests that are served at once; more are told to come again."""

REQUEST_BYTES: Final = 16 * 2**10
"""Bytes of a request with its headers. http.server alone would keep a hundred lines of 64 KiB."""

LONGEST_PATH: Final = 2048
"""Bytes of a request's path with its query."""

LOCAL_NAME: Final = "localhost"
"""What a browser calls this machine, or a loopback address of it. Any other name that leads here is one by which a
stranger's page wants to read."""

STOP_S: Final = 0.1
"""How often it is looked whether the daemon ends, in seconds."""

_PORT: Final = re.compile(r":\d*$")

log = structlog.get_logger()


class PortRefused(StagingError):
    """The address to serve at cannot be had."""

    code = "port_refused"


class Server:
    """Serves until it is closed.

    Args:
        host, port: where; port 0 takes one that is free.
        board: where snapshots come from.

    Attributes:
        port: the one that it listens at.

    Raises:
        PortRefused: somebody else has the port, or the address is not this machine's.
    """

    def __init__(self, host: str, port: int, board: Board) -> None:
        try:
            self._http = _Http(host, port, Answerer(board))
        except OSError as error:
            raise PortRefused(
                f"HTTP cannot be served at {host} port {port}: {error.strerror or error}",
                remedy="free the port, or set another by STAGINGD_HTTP_PORT and STAGINGD_HTTP_HOST; under systemd, "
                "the unit has no network unless it is told so: see systemd/http.conf",
            ) from error
        self._board = board
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(STOP_S,), name="stagingd-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Serve nobody any more."""
        self._board.close()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MOST_REQUESTS

    def __init__(self, host: str, port: int, answerer: Answerer) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.answerer = answerer
        self.local = _is_local(host)
        self._free = threading.BoundedSemaphore(MOST_REQUESTS)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # that of HTTPServer asks a name server for this machine's name

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as socketserver calls it
        if isinstance(sys.exception(), OSError):  # the client is gone, or was too slow
            log.debug("http_client_lost", peer=str(client_address))
        else:
            log.exception("http_failed", peer=str(client_address))


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == LOCAL_NAME


class _TooLong(Exception):
    """A client has sent more than a request may have."""


class _Deadline(io.RawIOBase):
    """What a client sends, all of it until a time, and so much of it; its slowness cannot be drawn out byte by byte."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection = connection
        self._until = until
        self._left = REQUEST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(max(0.001, self._until - time.monotonic()))
        received = self._connection.recv_into(buffer)
        self._left -= received
        if self._left < 0:
            raise _TooLong
        return received


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    server_version = "stagingd"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Deadline(self.connection, time.monotonic() + REQUEST_S))

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except _TooLong:
            self.close_connection = True
            self.requestline, self.request_version, self.command = "", self.protocol_version, ""
            self._send(plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the request is too long"))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """What http.server itself refuses: a line with the headers of every answer, where it would send a page."""
        self.close_connection = True
        if self.request_version == "HTTP/0.9":  # so it is called as long as it is not known: an answer without a head
            self.request_version = self.protocol_version
        self._send(plain(HTTPStatus(code), message or HTTPStatus(code).phrase))

    def do_GET(self) -> None:
        self._send(self._answer())

    def _refuse(self) -> None:
        self._send(plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is answered", Allow="GET"))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815 - names that http.server calls

    def _answer(self) -> Response:
        if len(self.path) > LONGEST_PATH:
            return plain(HTTPStatus.REQUEST_URI_TOO_LONG, "the path is too long")
        if self.server.local and not _is_local(self._named()):
            return plain(HTTPStatus.MISDIRECTED_REQUEST, "call this machine localhost, or by a loopback address")
        return self.server.answerer.answer(self.path, self.headers.get("Accept", ""))

    def _named(self) -> str:
        """How the client calls this machine, without the port."""
        named = _PORT.sub("", self.headers.get("Host", LOCAL_NAME).lower())
        return named[1:-1] if named.startswith("[") and named.endswith("]") else named

    def _send(self, response: Response) -> None:
        self.connection.settimeout(REQUEST_S)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as http.server calls it
        log.debug("http", what=format % args)
