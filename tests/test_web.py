# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the daemon serves over HTTP: to whom, how much of it, and that its event loop never waits for it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from daemons import DEADLINE_S, RunningDaemon, eventually, serving
from prometheus_client.parser import text_string_to_metric_families
from stagingd_client import Stage
from stagingd_vllm import Reader
from stagingd_vllm.reporter import Reporter
from structlog.testing import capture_logs

from stagingd import wire
from stagingd.health import LayerError
from stagingd.web import server as web
from stagingd.web.answers import MOST_ANSWERS, Answerer
from stagingd.web.board import Board, LoopBusy
from stagingd.web.server import MOST_REQUESTS, PortRefused, Server
from stagingd.web.snapshot import Snapshot

STAGE = "policy"
TENSORS = {"model.layers.0.w": torch.full((8, 4), 2.0), "model.layers.1.w": torch.linspace(-1, 1, 64).view(16, 4)}
PATHS = (
    "/",
    "/metrics",
    "/healthz",
    "/readyz",
    "/api/stages",
    f"/api/versions?stage={STAGE}&last=9",
    f"/api/health?stage={STAGE}",
)


def port_of(daemon: RunningDaemon) -> int:
    lines = map(json.loads, daemon.log.splitlines())
    return next(int(line["port"]) for line in lines if line["event"] == "serving_http")


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
        connection.request(method, path, headers={"Host": "localhost"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


def told(port: int, path: str) -> dict[str, object]:
    status, body, _ = get(port, path)
    assert status == 200, body
    found: dict[str, object] = json.loads(body)
    return found


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    for name, tensor in TENSORS.items():
        stage.put(name, tensor)
    stage.commit().wait()


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningDaemon, int]]:
    """A daemon with a stage that a trainer has filled three times, and an engine that has made two of them live."""
    with serving(tmp_path_factory.mktemp("web"), "--http-port", "0") as daemon:
        with Stage.open(STAGE, rank=0, ranks=1, socket=daemon.socket) as stage:
            stage.declare(TENSORS)
            with Reader.attach(STAGE, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
                reporter = Reporter(STAGE, "e", 0, daemon.socket)
                for version in (1, 2, 3):
                    publish(stage, version)
                    if version < 3:
                        reader.lease().release()
                        reporter.tell("swapped", version, 96, 0.0031)
                error = LayerError(
                    layer="model.layers.1.w", values=64, clipped=1, flushed=2, squared_error=1.0, squared_values=4.0
                )
                reporter.tell("examined", 2, 0, 0.1, (error,))
                reporter.close()
                stage.begin(4)
                stage.abort("the test says so")
                yield daemon, port_of(daemon)


# What is answered


@pytest.mark.parametrize("path", PATHS)
def test_everything_is_answered_and_nothing_of_it_is_kept_by_caches(
    working: tuple[RunningDaemon, int], path: str
) -> None:
    status, body, headers = get(working[1], path)
    assert status == 200, body
    assert body
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert "Python" not in headers["Server"]


def test_the_stages_are_told_with_rates_pauses_and_the_engines_versions(working: tuple[RunningDaemon, int]) -> None:
    found = told(working[1], "/api/stages")
    [stage] = found["stages"]
    assert (stage["stage"], stage["newest"], stage["engine_versions"]) == (STAGE, 3, {"e": 2})
    assert [(pause["engine"], pause["version"], pause["seconds"]) for pause in stage["pauses"]][:1] == [
        ("e", 2, pytest.approx(0.0031))
    ]
    assert stage["rates"]["versions_a_minute"] > 0


def test_the_last_versions_are_told_with_their_spans(working: tuple[RunningDaemon, int]) -> None:
    found = told(working[1], f"/api/versions?stage={STAGE}&last=2")
    third, fourth = found["versions"]
    assert (third["version"], fourth["version"]) == (3, 4)
    assert {span[0] for span in third["spans"]} == {"fill", "seal"}
    assert "the test says so" in fourth["reason"]
    assert told(working[1], f"/api/versions?stage={STAGE}&last=0")["versions"] == []


def test_health_is_told_by_layer_and_only_what_is_new(working: tuple[RunningDaemon, int]) -> None:
    path = f"/api/health?stage={STAGE}"
    found = eventually(
        lambda: one if "amax" in (one := told(working[1], path))["versions"][-1] else None, "version 3 to be looked at"
    )
    assert found["layers"] == list(TENSORS)
    assert found["kept"] == [1, 2, 3]
    last = found["versions"][-1]
    assert (last["amax"], last["mean"], last["nonfinite"]) == ([2.0, 1.0], [2.0, pytest.approx(0, abs=1e-4)], [0, 0])
    assert last["std"] == [0.0, pytest.approx(0.5862, rel=1e-2)]
    second = found["versions"][1]
    assert (second["clipped"], second["flushed"], second["error"]) == ([None, 0.01562], [None, 0.03125], [None, 0.5])
    assert told(working[1], f"{path}&since={found['revision']}")["versions"] == []


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404),
        ("/../../etc/passwd", 404),
        ("/api/health", 404),
        ("/api/health?stage=other", 404),
        (f"/api/health?stage={STAGE}&since=-1", 400),
        (f"/api/health?stage={STAGE}&since=%D9%A1", 400),
        (f"/api/health?stage={STAGE}&since=" + "9" * 40, 400),
        ("/?" + "&".join(f"a{n}=1" for n in range(20)), 400),
        ("http://[x", 400),
        ("/" + "x" * 5000, 414),
    ],
)
def test_what_is_not_there_is_refused(working: tuple[RunningDaemon, int], path: str, status: int) -> None:
    assert get(working[1], path)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_only_get_is_answered(working: tuple[RunningDaemon, int], method: str) -> None:
    status, _, headers = get(working[1], "/metrics", method)
    assert (status, headers["Allow"]) == (405, "GET")


def test_a_name_that_a_stranger_gave_this_machine_is_refused(working: tuple[RunningDaemon, int]) -> None:
    _, port = working
    assert get(port, "/api/stages", Host=f"localhost:{port}")[0] == 200
    assert get(port, "/api/stages", Host=f"[::1]:{port}")[0] == 200
    assert get(port, "/api/stages", Host="[::1]")[0] == 200
    for name in (f"example.com:{port}", "example.com", "127.0.0.1.example.com", "10.0.0.1", "[::2]", "[", ""):
        assert get(port, "/api/stages", Host=name)[0] == 421, name


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_every_loopback_address_can_be_served_at_and_goes_by_its_own_name(host: str) -> None:
    server = Server(host, 0, Board(lambda: None))
    try:
        with closing(http.client.HTTPConnection(host, server.port, timeout=DEADLINE_S)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
    finally:
        server.close()


def test_the_pages_policy_admits_its_own_style_and_script_and_nothing_else(working: tuple[RunningDaemon, int]) -> None:
    _, body, headers = get(working[1], "/")
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for name in ("style", "script"):
        [inside] = re.findall(rf"<{name}>(.*?)</{name}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", body), "the page needs no network"
    assert " style=" not in body
    assert " onclick=" not in body


def test_a_trainer_that_waits_for_a_slot_is_known_by_what_the_alert_looks_at(tmp_path: Path) -> None:
    def waits_for_a_slot(port: int) -> bool:
        """What the alert StagingdTrainersWait says, without its times."""
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(get(port, "/metrics")[1])
            for sample in family.samples
        }
        free = [found["stagingd_slot_state", slot, "free", STAGE] for slot in ("0", "1")]
        waits, filling = found["stagingd_longest_wait_seconds", STAGE], found["stagingd_filling_seconds", STAGE]
        return waits > 0 and filling == 0 and 1 not in free

    with serving(tmp_path, "--http-port", "0") as daemon, ThreadPoolExecutor(2) as pool, ExitStack() as undo:
        port = port_of(daemon)
        stage = undo.enter_context(Stage.open(STAGE, rank=0, ranks=1, socket=daemon.socket))
        stage.declare(TENSORS)
        publish(stage, 1)
        held, idle = (
            undo.enter_context(Reader.attach(STAGE, engine=name, rank=0, ranks=1, socket=daemon.socket))
            for name in ("held", "idle")
        )
        lease = held.lease()
        next_one = pool.submit(idle.lease, newer_than=1)
        eventually(lambda: daemon.stage(STAGE).waiting, "the idle engine to wait")
        assert not waits_for_a_slot(port)
        publish(stage, 2)
        next_one.result(DEADLINE_S).release()
        begun = pool.submit(stage.begin, 3)
        eventually(lambda: daemon.stage(STAGE).waiting, "the trainer to wait")
        eventually(lambda: waits_for_a_slot(port), "that to be told")
        lease.release()
        begun.result(DEADLINE_S)
        eventually(lambda: not waits_for_a_slot(port), "the end of it to be told")


# Who sends what is no request, is slow, or comes in crowds


def sent(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\0" * 100, 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"\xff\xfe / HTTP/1.0\r\n\r\n", 501),
        (b"TRACE / HTTP/1.0\r\n\r\n", 501),
        (b"GET /healthz HTTP/1.0\r\n" + b"X:\r\n" * 101 + b"\r\n", 431),
    ],
)
def test_what_is_no_request_is_refused_in_a_line(working: tuple[RunningDaemon, int], data: bytes, status: int) -> None:
    head, _, body = sent(working[1], data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 %d " % status), head
    assert b"X-Content-Type-Options: nosniff" in head
    assert b"<" not in body


def test_a_request_is_read_as_far_as_its_limit(working: tuple[RunningDaemon, int]) -> None:
    head = b"GET /healthz HTTP/1.0\r\nX: "
    fits = head + b"y" * (web.REQUEST_BYTES - len(head) - 4) + b"\r\n\r\n"
    assert sent(working[1], fits).startswith(b"HTTP/1.0 200 ")
    assert sent(working[1], fits.replace(b"y", b"yy", 1)).startswith(b"HTTP/1.0 431 ")


def test_who_asks_nothing_is_told_nothing(working: tuple[RunningDaemon, int]) -> None:
    assert sent(working[1], b"") == b""


def test_a_defect_is_logged_and_a_client_that_is_gone_is_not() -> None:
    server = Server("127.0.0.1", 0, Board(lambda: None))
    server._http.answerer.answer = lambda *_: 1 // 0  # type: ignore[method-assign, assignment]
    try:
        with capture_logs() as logged:
            with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as gone:
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
                gone.sendall(b"GET")
            eventually(lambda: logged, "the lost client to be seen")
            assert sent(server.port, b"GET / HTTP/1.0\r\n\r\n") == b""
            eventually(lambda: len(logged) > 1, "the defect to be logged")
    finally:
        server.close()
    assert [(entry["event"], entry["log_level"]) for entry in logged] == [
        ("http_client_lost", "debug"),
        ("http_failed", "error"),
    ]


def test_a_request_that_comes_byte_by_byte_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "REQUEST_S", 0.2)
    board = Board(lambda: None)
    server = Server("127.0.0.1", 0, board)
    try:
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as slow:
            started, cut = time.monotonic(), False
            while not cut and time.monotonic() < started + DEADLINE_S:
                try:
                    slow.sendall(b"X")
                    slow.settimeout(0.02)
                    cut = slow.recv(1) == b""
                except TimeoutError:
                    continue
                except ConnectionError:
                    cut = True
            assert cut
    finally:
        server.close()


def test_a_crowd_is_turned_away_and_then_it_is_served_again(working: tuple[RunningDaemon, int]) -> None:
    daemon, port = working
    threads = lambda: len(list(Path(f"/proc/{daemon.process.pid}/task").iterdir()))  # noqa: E731
    before = threads()
    silent = [socket.create_connection(("127.0.0.1", port), DEADLINE_S) for _ in range(MOST_REQUESTS)]
    eventually(lambda: threads() >= before + MOST_REQUESTS, "all of them to be listened to")
    with pytest.raises(ConnectionError):
        get(port, "/healthz")
    assert daemon.stage(STAGE).sealed_versions == 3  # the event loop does not notice
    for one in silent:
        one.close()
    eventually(lambda: threads() <= before, "the threads to end")
    assert get(port, "/healthz")[0] == 200


# The event loop


def test_a_daemon_whose_loop_hangs_is_neither_alive_nor_ready() -> None:
    server = Server("127.0.0.1", 0, Board(lambda: None, wait_s=0.01))
    try:
        for path in ("/healthz", "/readyz", "/metrics", "/api/stages"):
            assert get(server.port, path)[:2] == (503, "the event loop has not answered within 0.01 s\n")
        assert get(server.port, "/")[0] == 200
    finally:
        server.close()


def test_the_loop_is_woken_once_however_many_ask() -> None:
    woken: list[int] = []
    board = Board(lambda: woken.append(1))
    report = wire.StatusReport(pid=1, uptime_s=1.0, connections=0, refused_messages=0, stages=())
    found: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(board.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: board.wanted, "a snapshot to be wanted")
    snapshot = Snapshot(time.monotonic(), 0.0, report, {})
    board.put(snapshot)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert found == [snapshot] * 8
    assert woken == [1]
    assert not board.wanted
    assert board.current() is snapshot  # it is fresh
    assert woken == [1]


def test_who_waits_for_a_snapshot_is_told_when_the_daemon_ends() -> None:
    board = Board(lambda: None, wait_s=DEADLINE_S)
    refused: list[LoopBusy] = []

    def ask() -> None:
        try:
            board.current()
        except LoopBusy as busy:
            refused.append(busy)

    waiting = threading.Thread(target=ask)
    waiting.start()
    eventually(lambda: board.wanted, "a snapshot to be wanted")
    board.close()
    waiting.join(DEADLINE_S)
    assert [busy.what for busy in refused] == ["the daemon ends"]


def test_a_closed_door_is_not_ready() -> None:
    board = Board(lambda: None)
    server = Server("127.0.0.1", 0, board)
    report = wire.StatusReport(pid=1, uptime_s=1.0, connections=0, refused_messages=0, stages=())
    try:
        board.put(Snapshot(time.monotonic() + DEADLINE_S, 0.0, report, {}, door_open=False))
        assert get(server.port, "/healthz")[:2] == (200, "alive\n")
        assert get(server.port, "/readyz")[0] == 503
        board.put(Snapshot(time.monotonic() + DEADLINE_S, 0.0, report, {}, door_open=True))
        assert get(server.port, "/readyz")[:2] == (200, "ready\n")
    finally:
        server.close()


# Beginning and end


def test_a_port_that_is_taken_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "stagingd", "serve", "--runtime-dir", str(tmp_path), "--http-port", port]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert refused.returncode == 1
        assert f"HTTP cannot be served at 127.0.0.1 port {port}: Address already in use" in refused.stderr
        with pytest.raises(PortRefused):
            Server("127.0.0.1", int(port), Board(lambda: None))


def test_without_the_setting_nothing_listens(daemon: RunningDaemon) -> None:
    inodes = {
        Path(link).readlink().name for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir() if link.is_symlink()
    }
    listening = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    assert not [line for line in listening if f"socket:[{line[9]}]" in inodes]


def test_a_restarted_daemon_serves_the_same_port_and_examines_what_it_adopts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    with serving(tmp_path, "--http-port", str(port)) as daemon:
        with Stage.open(STAGE, rank=0, ranks=1, socket=daemon.socket) as stage:
            stage.declare(TENSORS)
            publish(stage, 1)
            assert get(port, "/readyz")[0] == 200
            daemon.restart()
            known = lambda: "amax" in told(port, f"/api/health?stage={STAGE}")["versions"][0]  # noqa: E731
            eventually(known, "version 1 to be looked at")
        assert daemon.stop() == 0, daemon.log


def test_of_one_snapshot_an_answer_is_made_once_and_few_are_kept() -> None:
    board = Board(lambda: None)
    report = wire.StatusReport(pid=1, uptime_s=1.0, connections=0, refused_messages=0, stages=())
    board.put(Snapshot(time.monotonic() + DEADLINE_S, 0.0, report, {}))
    answerer = Answerer(board)
    first = answerer.answer("/api/stages", "")
    assert answerer.answer("/api/stages", "") is first
    for number in range(2 * MOST_ANSWERS):
        answerer.answer(f"/api/stages?{number}", "")
    assert len(answerer._made) <= MOST_ANSWERS
    board.put(Snapshot(time.monotonic() + DEADLINE_S, 0.0, report.model_copy(update={"pid": 2}), {}))
    assert b'"pid":2' in answerer.answer("/api/stages", "").body
