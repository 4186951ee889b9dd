# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""systemd: its own tools accept the units, the daemon lives within them, and the service manager is told."""

from __future__ import annotations

import grp
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon, start
from stagingd_client import Stage
from stagingd_vllm import Reader
from structlog.testing import capture_logs

from stagingd.supervisor import BadSetting, Supervisor

FOLDER = Path(__file__).parent.parent / "systemd"
NAMES = ("stagingd.service", "stagingd@.service")
PROGRAM = Path(sys.prefix) / "bin" / "stagingd"
DEADLINE_S = 60.0

CONFINE = """
import ctypes, os, resource, sys

class Compare(ctypes.Structure):
    _fields_ = [("argument", ctypes.c_uint), ("how", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

seccomp = ctypes.CDLL("libseccomp.so.2")
seccomp.seccomp_init.restype = ctypes.c_void_p
ALLOW, REFUSE, NO_FAMILY, DIFFERS, MASKED = 0x7FFF0000, 0x50001, 0x50061, 1, 7

def filtered(default, rules):
    context = ctypes.c_void_p(seccomp.seccomp_init(default))
    for action, name, compare in rules:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            given = ctypes.byref(compare) if compare else None
            assert seccomp.seccomp_rule_add_array(context, action, number, int(bool(compare)), given) == 0, name
    assert seccomp.seccomp_load(context) == 0

resource.setrlimit(resource.RLIMIT_DATA, (DATA, DATA))
os.umask(UMASK)
write_and_execute = Compare(2, MASKED, 6, 6)
execute = Compare(2, MASKED, 4, 4)
families = [(NO_FAMILY, "socket", Compare(0, DIFFERS, 1, 0))] if FAMILIES == ["AF_UNIX"] else []
filtered(ALLOW, [(REFUSE, "mmap", write_and_execute), (REFUSE, "mprotect", execute), *families])
filtered(REFUSE, [(ALLOW, name, None) for name in SYSTEM_CALLS])
os.execv(sys.orig_argv[0], [sys.orig_argv[0], *sys.argv[1:]])
"""
"""Becomes the daemon within what systemd 252 makes of SystemCallFilter=, MemoryDenyWriteExecute=,
RestrictAddressFamilies=, LimitDATA= and UMask=."""


def tool(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is not installed, so the files in systemd/ cannot be checked: install systemd"
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def settings(name: str) -> dict[str, list[str]]:
    """A unit's settings, each with all its values in their order: systemd adds some up."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def syscalls(words: list[str]) -> set[str]:
    """The system calls that the words of a SystemCallFilter= name, groups taken apart."""
    found: set[str] = set()
    for word in words:
        if word.startswith("@"):
            listed = run(tool("systemd-analyze"), "syscall-filter", word).stdout.splitlines()
            found |= syscalls(
                [line.strip() for line in listed[1:] if line.strip() and not line.strip().startswith("#")]
            )
        else:
            found.add(word)
    return found


@pytest.fixture(params=NAMES)
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def installed(unit: str, tmp_path: Path) -> Path:
    """The unit as it stands where the program is the one of this environment: systemd wants to find it."""
    text = (FOLDER / unit).read_text()
    assert "ExecStart=/usr/bin/stagingd serve " in text
    assert PROGRAM.is_file(), f"{PROGRAM} is missing: install this package first"
    (tmp_path / unit).write_text(text.replace("/usr/bin/stagingd", str(PROGRAM)))
    return tmp_path / unit


# The files, as systemd's own tools see them


def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    checked = run(tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", installed)
    complaints = [line for line in checked.stderr.splitlines() if "stagingd" in line]  # others' units are not ours
    assert (checked.returncode, complaints) == (0, [])


def test_exposure_is_at_most_one_and_a_half(installed: Path) -> None:
    looked = run(tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", "--threshold=15", installed)
    figure = re.search(r"exposure level for \S+: (\d+\.\d)", looked.stdout)
    assert figure is not None, looked.stderr
    assert float(figure[1]) <= 1.5, looked.stdout
    assert looked.returncode == 0, looked.stderr


def with_http(installed: Path) -> Path:
    """The unit with the drop-in beside it that gives it a network."""
    folder = installed.with_name(f"{installed.name}.d")
    folder.mkdir()
    (folder / "http.conf").write_text((FOLDER / "http.conf").read_text())
    return installed


def test_with_http_the_exposure_is_still_at_most_one_and_a_half(installed: Path) -> None:
    looked = run(
        tool("systemd-analyze"), "security", "--offline=yes", "--no-pager", "--threshold=15", with_http(installed)
    )
    assert "Service defines IP address allow list with only localhost entries" in looked.stdout  # the drop-in was read
    assert looked.returncode == 0, looked.stdout
    checked = run(tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", installed)
    assert [line for line in checked.stderr.splitlines() if "stagingd" in line] == []


def test_the_drop_in_opens_the_one_port_that_it_sets() -> None:
    given = settings("http.conf")
    [port] = [value.removeprefix("STAGINGD_HTTP_PORT=") for value in given["Environment"]]
    assert given["SocketBindDeny"] == ["any"]
    assert given["SocketBindAllow"] == [f"tcp:{port}"]
    assert given["PrivateNetwork"] == ["no"]


def test_the_template_differs_from_the_plain_unit_only_where_instances_do() -> None:
    plain, template = settings("stagingd.service"), settings("stagingd@.service")
    differing = {key for key in plain | template if plain.get(key) != template.get(key)}
    ours = {"Description", "ExecStart", "RuntimeDirectory", "NoExecPaths"}
    assert differing == ours | {"NUMAPolicy", "NUMAMask"}
    assert all("%i" in template[key][0] for key in ours)
    assert (plain["NUMAPolicy"], plain["NUMAMask"]) == (["interleave"], ["all"])


def test_the_program_knows_the_options_that_the_units_give_it(unit: str) -> None:
    [command] = settings(unit)["ExecStart"]
    shown = run(PROGRAM, *command.split()[1:], "--help")
    assert shown.returncode == 0, shown.stderr


def test_user_and_group_are_made_on_a_machine_without_them(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    made = run(tool("systemd-sysusers"), f"--root={tmp_path}", FOLDER / "sysusers.d" / "stagingd.conf")
    assert made.returncode == 0, made.stderr
    user = (tmp_path / "etc" / "passwd").read_text().split(":")
    group = (tmp_path / "etc" / "group").read_text().split(":")
    assert (user[0], group[0], user[3]) == ("stagingd", "stagingd", group[2])
    assert int(user[2]) < 1000, "logind takes the shared memory of users who are not system users away"


def test_cleaning_shared_memory_by_age_leaves_segments_alone(tmp_path: Path) -> None:
    shared_memory = tmp_path / "dev" / "shm"
    shared_memory.mkdir(parents=True)
    for name in ("stagingd-0-policy", "stagingd-999-policy", "somebody-else"):
        (shared_memory / name).touch()
    (tmp_path / "site.conf").write_text("d /dev/shm - - - 0\n")
    ours = FOLDER / "tmpfiles.d" / "stagingd.conf"
    cleaned = run(tool("systemd-tmpfiles"), f"--root={tmp_path}", "--clean", tmp_path / "site.conf", ours)
    assert cleaned.returncode == 0, cleaned.stderr
    assert {path.name for path in shared_memory.iterdir()} == {"stagingd-0-policy", "stagingd-999-policy"}


# What the daemon relies on


def expect(unit: str, **values: str | None) -> None:
    found = settings(unit)
    assert {key: found.get(key) for key in values} == {
        key: None if value is None else [value] for key, value in values.items()
    }


def test_no_version_is_lost_by_a_restart(unit: str) -> None:
    expect(unit, RemoveIPC="no", DynamicUser=None)  # the latter implies RemoveIPC=yes
    expect(unit, KillSignal="SIGTERM", RestartKillSignal="SIGUSR1", RuntimeDirectoryPreserve="restart")
    expect(unit, Restart="always", RestartSec="100ms", Type="notify")
    assert "STAGINGD_RETURN_S=30" in settings(unit)["Environment"]


def test_clients_and_daemon_see_the_same_shared_memory(unit: str) -> None:
    named = {key for key, values in settings(unit).items() if any("/dev" in value for value in values)}
    assert named == {"NoExecPaths"}
    expect(unit, RootDirectory=None, RootImage=None, TemporaryFileSystem=None, InaccessiblePaths=None)


def test_the_daemon_sees_processes_of_other_users_and_the_machines_memory(unit: str) -> None:
    expect(unit, ProtectProc="default", ProcSubset="all", PrivateUsers="no", PrivatePIDs=None)


def test_segments_are_locked_and_private_memory_is_bounded(unit: str) -> None:
    expect(unit, LimitMEMLOCK="infinity", LimitDATA="8G", MemoryMax=None, MemoryHigh=None)


def test_the_daemon_has_no_privileges_and_no_network(unit: str) -> None:
    expect(unit, User="stagingd", Group="stagingd", CapabilityBoundingSet="", AmbientCapabilities="")
    expect(unit, NoNewPrivileges="yes", RestrictAddressFamilies="AF_UNIX", PrivateNetwork="yes")


def test_only_the_sockets_folder_can_be_written_to_in_run(unit: str) -> None:
    [folder] = settings(unit)["RuntimeDirectory"]
    expect(unit, ProtectSystem="strict", ReadOnlyPaths="/run")
    assert f"/run/{folder}" in settings(unit)["NoExecPaths"][0].split()


@pytest.fixture(params=[(), ("http.conf",)], ids=["plain", "http"])
def confined(
    unit: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningDaemon]:
    """A daemon within its unit's filters and limits. (The mounts and namespaces need a running systemd.)"""
    given, added = settings(unit), [settings(name) for name in request.param]
    first, less, more = (words.split() for words in given["SystemCallFilter"])
    assert less[0].startswith("~")
    allowed = sorted((syscalls(first) - syscalls([less[0][1:], *less[1:]])) | syscalls(more))
    data = int(given["LimitDATA"][0].removesuffix("G")) * 2**30
    families = [family for one in (given, *added) for family in one["RestrictAddressFamilies"]]
    facts = f"SYSTEM_CALLS, DATA, UMASK, FAMILIES = {allowed!r}, {data}, 0o{given['UMask'][0]}, {families!r}"
    launcher = tmp_path / "confined"
    launcher.write_text(f"#!{sys.executable}\n{facts}\n{CONFINE}")
    launcher.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(launcher))  # it is what daemons.start starts
    options = ("--http-port", "0") if added else ()
    daemon = start(tmp_path / "run", "--lock-memory", "--group", grp.getgrgid(os.getgid()).gr_name, *options)
    yield daemon
    if daemon.process.poll() is None:
        daemon.stop()


def test_the_daemon_works_within_its_units_filters_and_limits(confined: RunningDaemon) -> None:
    status = Path(f"/proc/{confined.process.pid}/status").read_text()
    assert re.search(r"^Seccomp:\s2$", status, re.MULTILINE)
    with Stage.open("policy", rank=0, ranks=1, socket=confined.socket) as stage:
        stage.declare({"w": torch.zeros(8, 4)})
        stage.begin(1)
        stage.put("w", torch.ones(8, 4))
        stage.commit().wait()
        with Reader.attach("policy", engine="e", rank=0, ranks=1, socket=confined.socket) as reader:
            with reader.lease() as lease:
                assert torch.equal(lease.read("w"), torch.ones(8, 4, dtype=torch.bfloat16))
        if "--http-port" in confined.options:
            port = re.search(r'"port": (\d+)', confined.log)
            assert port is not None
            with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/metrics", timeout=DEADLINE_S) as metrics:
                assert b'stagingd_newest_sealed_version{stage="policy"} 1.0' in metrics.read()
    assert confined.stop() == 0, confined.log
    assert not confined.segments()


# The service manager


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.settimeout(DEADLINE_S)
        listening.bind("\0" + address[1:] if address.startswith("@") else address)
        yield listening


def heard(listening: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in listening.recv(4096).decode().split("\n"))


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "path" else f"@stagingd-test-{uuid.uuid4().hex}"


def test_the_service_manager_hears_that_the_daemon_is_ready_alive_and_stopping(address: str) -> None:
    with manager(address) as listening:
        supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
        supervisor.ready("serving 2 stages")
        assert heard(listening) == {"READY": "1", "STATUS": "serving 2 stages"}
        supervisor.alive()
        assert heard(listening) == {"WATCHDOG": "1"}
        supervisor.status("serving 3 stages")
        assert heard(listening) == {"STATUS": "serving 3 stages"}
        supervisor.stopping()
        assert heard(listening) == {"STOPPING": "1"}


def test_without_a_service_manager_nothing_happens() -> None:
    with capture_logs() as logged:
        supervisor = Supervisor.from_environment({"WATCHDOG_USEC": "not for us"})
        supervisor.ready("serving")
        supervisor.alive()
        supervisor.stopping()
    assert supervisor.watchdog_s is None
    assert not logged


def test_the_watchdog_is_fed_twice_in_its_period_by_the_process_that_it_watches(address: str) -> None:
    def period(**environment: str) -> float | None:
        return Supervisor.from_environment({"NOTIFY_SOCKET": address} | environment).watchdog_s

    assert period() is None
    assert period(WATCHDOG_USEC="3000000") == 1.5
    assert period(WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid())) == 1.5
    assert period(WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getppid())) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WATCHDOG_USEC", "soon"),
        ("WATCHDOG_USEC", "0"),
        ("WATCHDOG_USEC", "-1"),
        ("WATCHDOG_USEC", str(2**64 - 1)),
        ("WATCHDOG_USEC", "9" * 5000),
        ("WATCHDOG_PID", "me"),
        ("NOTIFY_SOCKET", "run/notify"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=name):
        Supervisor.from_environment({"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "3000000"} | {name: value})


def test_a_service_manager_that_does_not_listen_stops_nothing_and_is_logged_once(address: str) -> None:
    supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
    with capture_logs() as logged:
        supervisor.ready("serving")  # nobody has ever listened
        with manager(address):
            pass
        supervisor.alive()  # nobody listens any more
    assert [entry["event"] for entry in logged] == ["supervisor_unreachable"]
    assert logged[0]["socket"] == address


def test_a_service_manager_that_does_not_read_blocks_nothing(address: str) -> None:
    with manager(address) as listening:
        supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
        with capture_logs() as logged:
            while not logged:  # the socket's queue is finite
                supervisor.alive()
        assert "unavailable" in logged[0]["reason"]
        assert heard(listening) == {"WATCHDOG": "1"}


def test_what_the_service_manager_missed_it_is_told_with_the_next_message(address: str) -> None:
    supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
    supervisor.ready("serving")
    with manager(address) as listening:
        supervisor.alive()
        assert heard(listening) == {"READY": "1", "STATUS": "serving", "WATCHDOG": "1"}
        supervisor.alive()
        assert heard(listening) == {"WATCHDOG": "1"}


def test_a_status_is_one_short_line(address: str) -> None:
    with manager(address) as listening:
        supervisor = Supervisor.from_environment({"NOTIFY_SOCKET": address})
        supervisor.status("stage x\nMAINPID=1")
        assert heard(listening) == {"STATUS": "stage x MAINPID=1"}
        supervisor.status("\N{EARTH GLOBE EUROPE-AFRICA}" * 5000)
        assert len(listening.recv(1 << 20)) <= 4096
