# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor`: permissions, sockets and segments, with real folders, sockets and daemons."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest
from daemons import RunningDaemon, stop_where_it_stands
from machines import machine, mounts, process

from stagingd import wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.config import Settings
from stagingd.connection import Connection
from stagingd.doctor.access import Access, judge_folder, judge_group, read_access
from stagingd.doctor.answer import Answer, State, ask, judge_answer
from stagingd.doctor.finding import Finding, Level
from stagingd.doctor.process import judge_descriptors, judge_namespace
from stagingd.doctor.shared import Shared, judge_segments, judge_served, judge_shared, read_shared
from stagingd.doctor.subject import read_subject
from stagingd.machine.files import Files
from stagingd.machine.mounts import read_mounts

STRANGER = 65534


def commands(finding: Finding) -> str:
    return "\n".join(remedy.do for remedy in finding.remedies)


def access(folder: Path) -> Access:
    return read_access(Settings(runtime_dir=folder))


def folder_of(folder: Path, *, served: bool = False) -> Finding:
    return judge_folder(access(folder), served=served)


def test_a_folder_that_is_not_there_yet_is_made_by_the_daemon(tmp_path: Path) -> None:
    assert folder_of(tmp_path / "a" / "b").level is Level.OK
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    found = access(tmp_path / "a")
    closed = found.model_copy(update={"above": found.above.model_copy(update={"writable": False})})
    assert judge_folder(closed, served=False).level is Level.ERROR


def test_a_folder_that_everybody_may_write_to_is_an_error_until_it_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = folder_of(tmp_path)
    assert found.level is Level.ERROR
    assert "mode 777" in found.found
    assert f"chmod o-w {tmp_path}" in commands(found)
    tmp_path.chmod(0o700)
    assert folder_of(tmp_path).level is Level.OK


def test_a_folder_of_another_user_is_an_error_unless_its_daemon_answers(tmp_path: Path) -> None:
    found = access(tmp_path)
    assert found.folder is not None
    other = found.model_copy(update={"folder": found.folder.model_copy(update={"uid": found.uid + 1})})
    assert judge_folder(other, served=False).level is Level.ERROR
    assert judge_folder(other, served=True).level is Level.OK


def test_a_folder_that_its_owner_may_not_write_to_is_an_error(tmp_path: Path) -> None:
    found = access(tmp_path)
    assert found.folder is not None
    closed = found.model_copy(update={"folder": found.folder.model_copy(update={"writable": False})})
    judged = judge_folder(closed, served=False)
    assert judged.level is Level.ERROR
    assert f"chmod u+rwx {tmp_path}" in commands(judged)


def test_a_file_in_the_folders_place_and_a_path_too_long_for_a_socket_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in folder_of(tmp_path / "file").found
    assert "longer than the 107 bytes" in folder_of(tmp_path / ("x" * 100)).found


def test_a_group_is_refused_where_the_user_is_no_member_or_the_folder_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = access(tmp_path).model_copy(update={"uid": 1000, "user": "trainer", "groups": (1000,)})
    no_member = judge_group(found, ("weights", 4242), served=False)
    assert no_member.level is Level.ERROR
    assert "usermod --append --groups weights trainer" in commands(no_member)
    member = found.model_copy(update={"groups": (1000, 4242)})
    closed = judge_group(member, ("weights", 4242), served=False)
    assert closed.level is Level.WARNING
    assert f"chmod g+rx {tmp_path}" in commands(closed)
    tmp_path.chmod(0o750)
    assert judge_group(access(tmp_path), ("weights", 4242), served=False).level is Level.OK
    assert judge_group(found, None, served=False).level is Level.OK


def test_nothing_at_the_socket_and_a_socket_that_was_left_are_notes(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    absent = ask(path)
    assert absent.state is State.ABSENT
    assert judge_answer(absent, None).level is Level.NOTE
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    left = ask(path)
    assert left.state is State.LEFT
    assert judge_answer(left, None).level is Level.NOTE


def test_a_socket_of_another_user_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.fail("gives a socket to another user, which only root may: run it as root")
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        os.chown(path, STRANGER, STRANGER)
        found = ask(path)
    assert found.state is State.FOREIGN
    assert judge_answer(found, "weights").level is Level.ERROR
    assert "usermod --append --groups weights" in commands(judge_answer(found, "weights"))


def test_a_daemon_that_serves_is_known_by_its_pid_and_its_stages(daemon: RunningDaemon, stage_name: str) -> None:
    tensor = TensorDeclaration(name="w", dtype="int16", shape=(8,), boxes=(Box((0,), (8,)),))
    request = wire.Declare(
        stage=stage_name, rank=0, ranks=1, options=wire.StageOptions(), tensors=(tensor,), timeout_s=10.0
    )
    with Connection(daemon.socket, name="test") as connection:
        segment = connection.request(request, wire.Declared, timeout_s=10.0).segment
    found = ask(daemon.socket)
    assert (found.state, found.pid) == (State.SERVES, daemon.pid)
    assert [(stage.name, stage.segment) for stage in found.stages] == [(stage_name, segment)]
    assert judge_answer(found, None).level is Level.OK
    shared = read_shared(Files(), read_mounts(Files()), Settings())
    assert judge_served(shared, found).level is Level.OK
    elsewhere = shared.model_copy(update={"names": frozenset[str]()})
    missing = judge_served(elsewhere, found)
    assert missing.level is Level.ERROR
    assert segment in missing.found
    assert "--ipc=host" in commands(missing)


def test_a_daemon_that_hangs_is_an_error_that_names_its_pid(
    own_daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagingd.connection.ANSWER_S", 0.2)
    stop_where_it_stands(own_daemon.pid)
    found = ask(own_daemon.socket)
    assert (found.state, found.pid) == (State.SILENT, own_daemon.pid)
    judged = judge_answer(found, None)
    assert judged.level is Level.ERROR
    assert f"kill -CONT {own_daemon.pid}" in commands(judged)
    own_daemon.kill()


@pytest.mark.parametrize("state", [State.HIDDEN, State.FOREIGN, State.REFUSES, State.UNSEEN, State.SILENT])
def test_whoever_is_not_served_is_told_what_to_do(state: State) -> None:
    found = judge_answer(Answer(path="/run/s/control.sock", state=state, what="no"), None)
    assert found.level is Level.ERROR
    assert found.remedies


def shared_memory(root: Path, *, line: str = "35 26 0:30 / /dev/shm rw - tmpfs tmpfs rw") -> Shared:
    files = machine(root, mounts(line))
    return read_shared(files, read_mounts(files), Settings(segment_prefix="/stagingd-7-"))


def shm(root: Path, mode: int = 0o1777) -> Path:
    folder = root / "dev" / "shm"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(mode)
    return folder


def test_shared_memory_has_to_be_there_and_open_and_in_memory(tmp_path: Path) -> None:
    assert judge_shared(shared_memory(tmp_path)).level is Level.ERROR
    shm(tmp_path)
    assert judge_shared(shared_memory(tmp_path)).level is Level.OK
    on_disk = shared_memory(tmp_path, line="35 26 8:1 / /dev/shm rw - ext4 /dev/sda1 rw")
    assert judge_shared(on_disk).level is Level.ERROR
    folder = shared_memory(tmp_path).folder
    assert folder is not None
    closed = shared_memory(tmp_path).model_copy(update={"folder": folder.model_copy(update={"writable": False})})
    assert judge_shared(closed).level is Level.ERROR


def test_shared_memory_without_the_sticky_bit_is_a_warning(tmp_path: Path) -> None:
    shm(tmp_path, 0o777)
    found = judge_shared(shared_memory(tmp_path))
    assert found.level is Level.WARNING
    assert "chmod 1777 /dev/shm" in commands(found)


def segments(root: Path, locks: str = "", uid: int | None = None) -> Finding:
    files = machine(root, mounts(), {"proc/locks": locks} if locks else {})
    settings = Settings(segment_prefix="/stagingd-7-")
    return judge_segments(
        read_shared(files, read_mounts(files), settings), settings, os.geteuid() if uid is None else uid
    )


def test_segments_that_a_daemon_has_left_are_a_note_that_removes_nothing(tmp_path: Path) -> None:
    assert segments(tmp_path).level is Level.OK
    (shm(tmp_path) / "stagingd-7-policy").write_bytes(bytes(3 * 2**20))
    (shm(tmp_path) / "stagingd-8-policy").write_bytes(bytes(8))
    found = segments(tmp_path)
    assert found.level is Level.NOTE
    assert "3 MiB" in found.found
    assert "stagingd-8" not in found.found
    assert "rm " not in commands(found)


def test_segments_of_other_users_and_other_daemons_are_warnings(tmp_path: Path) -> None:
    path = shm(tmp_path) / "stagingd-7-policy"
    path.write_bytes(b"")
    foreign = segments(tmp_path, uid=os.geteuid() + 1)
    assert foreign.level is Level.WARNING
    assert "belong to another user" in foreign.found
    held = segments(tmp_path, f"1: FLOCK  ADVISORY  WRITE 42 00:1f:{path.stat().st_ino} 0 EOF")
    assert held.level is Level.WARNING
    assert "in use by a daemon" in held.found


def test_what_a_daemon_holds_on_this_machine_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "held"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files = Files()
        assert path.stat().st_ino in read_shared(files, read_mounts(files), Settings()).held


def test_clients_in_other_pid_namespaces_are_refused_unless_heartbeats_tell_of_them(tmp_path: Path) -> None:
    host = read_subject(machine(tmp_path / "host", process()), None)
    assert judge_namespace(host, None).level is Level.OK
    inside = read_subject(machine(tmp_path / "inside", process(namespaces={"pid": "pid:[4026532178]"})), None)
    found = judge_namespace(inside, None)
    assert found.level is Level.WARNING
    assert "pid:[4026532178]" in found.found
    assert "hostPID: true" in commands(found)
    assert judge_namespace(inside, 30.0).level is Level.OK
    untold = read_subject(machine(tmp_path / "untold", process(namespaces={})), None)
    assert judge_namespace(untold, None).level is Level.NOTE


def test_few_descriptors_are_a_warning_with_the_number_of_clients(tmp_path: Path) -> None:
    few = judge_descriptors(read_subject(machine(tmp_path / "few", process(files="1024")), None))
    assert few.level is Level.WARNING
    assert "128 clients" in few.found
    assert judge_descriptors(read_subject(machine(tmp_path / "b", process(files="65536")), None)).level is Level.OK
    assert judge_descriptors(read_subject(machine(tmp_path / "c", process(files="unlimited")), None)).level is Level.OK


def test_the_limits_of_a_daemon_that_cannot_be_seen_are_not_taken_for_its_own(tmp_path: Path) -> None:
    assert Answer(path="", state=State.SERVES, pid=None).out_of_sight
    assert not Answer(path="", state=State.SERVES, pid=7).out_of_sight
    assert not Answer(path="", state=State.ABSENT, pid=None).out_of_sight
    assert read_subject(machine(tmp_path, process()), 4711).serving is None
