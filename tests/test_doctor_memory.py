# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""`stagingd doctor`: what is found of memory, on small machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import GIB, machine, memory, mounts, process, shared_pages

from stagingd import memory as daemon_memory
from stagingd.doctor.finding import Finding, Level
from stagingd.doctor.locking import judge_locking
from stagingd.doctor.pages import judge_huge_pages, judge_swap, read_pages
from stagingd.doctor.room import Room, SharedMemory, judge_group_limit, judge_room, read_room
from stagingd.doctor.subject import Place, Subject, read_subject
from stagingd.doctor.wanted import Wanted, largest_version, size_text
from stagingd.machine.cgroups import GroupLimit, tightest_limit
from stagingd.machine.files import Files, numbers
from stagingd.machine.mounts import read_mounts

IPC_LOCK = 1 << 14
WANTED = Wanted.of(16.0, None)
POD = {"var/run/secrets/kubernetes.io/serviceaccount/token": "t"}
DOCKER = {".dockerenv": ""}
APART = {"pid": "pid:[4026533000]", "uts": "uts:[4026533001]", "ipc": "ipc:[4026533002]"}


def subject(root: Path, *trees: dict[str, str], serving: int | None = None) -> Subject:
    return read_subject(machine(root, *trees), serving)


def commands(finding: Finding) -> str:
    return "\n".join(remedy.do for remedy in finding.remedies)


def locking(found: Subject, *, lock_memory: bool = True) -> Finding:
    return judge_locking(found, WANTED, lock_memory=lock_memory)


def test_two_versions_and_their_moments_are_reckoned_with() -> None:
    assert WANTED.version_bytes == 16 * GIB
    assert 2.006 * 16 * GIB < WANTED.stage_bytes < 2.02 * 16 * GIB
    assert Wanted.of(None, 1000).stage_bytes == 1000
    assert not Wanted.of(None, None).given


@given(st.integers(0, 2**45))
def test_the_largest_version_fits_twice_and_a_larger_one_does_not(room: int) -> None:
    largest = largest_version(room)
    assert Wanted.of(None, room).version_bytes == largest
    assert 2.014 * largest <= room < 2.014 * (largest + 1) + 1


@given(st.sets(st.integers(0, 300)))
def test_lists_of_processors_are_read_as_the_kernel_writes_them(cpus: set[int]) -> None:
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    listed = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    assert set(numbers(listed)) == cpus


def test_a_locking_limit_below_two_versions_is_an_error_with_both_figures(tmp_path: Path) -> None:
    found = locking(subject(tmp_path, process(locked_limit="65536", locked_hard="65536")))
    assert found.level is Level.ERROR
    assert "64 KiB" in found.found
    assert size_text(WANTED.stage_bytes) in found.found
    assert "prlimit --memlock=unlimited" in commands(found)
    assert "STAGINGD_LOCK_MEMORY=false" in commands(found)


def test_a_soft_limit_below_a_sufficient_hard_one_is_raised_in_the_shell(tmp_path: Path) -> None:
    found = locking(subject(tmp_path, process(locked_limit="65536", locked_hard="unlimited")))
    assert found.level is Level.ERROR
    assert "ulimit -S -l unlimited" in commands(found)
    assert "limits.d" not in commands(found)


@pytest.mark.parametrize("limit", ["unlimited", str(WANTED.stage_bytes)])
def test_a_sufficient_locking_limit_is_no_finding(tmp_path: Path, limit: str) -> None:
    assert locking(subject(tmp_path, process(locked_limit=limit, locked_hard=limit))).level is Level.OK


def test_what_a_daemon_has_locked_already_counts_against_its_limit(tmp_path: Path) -> None:
    limit, locked = str(WANTED.stage_bytes + 2**20), 2**11
    found = locking(subject(tmp_path, process(4711, locked_limit=limit, locked_kib=locked), serving=4711))
    assert found.level is Level.ERROR
    assert "the daemon (pid 4711)" in found.found
    assert "having locked 2 MiB" in found.found


def test_the_limit_does_not_count_for_who_may_lock_anything_or_locks_nothing(tmp_path: Path) -> None:
    assert locking(subject(tmp_path / "a", process(capabilities=IPC_LOCK))).level is Level.OK
    assert locking(subject(tmp_path / "b", process(capabilities=~IPC_LOCK & (2**40 - 1)))).level is Level.ERROR
    assert locking(subject(tmp_path / "c", process()), lock_memory=False).level is Level.OK


def test_this_process_is_read_as_the_daemon_reads_itself() -> None:
    own = read_subject(Files(), None)
    assert own.locks_anything == daemon_memory.may_lock_anything()
    assert set(own.cpus) == os.sched_getaffinity(0)
    assert own.pid_namespace == os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize(
    ("trees", "place", "remedy"),
    [
        ((process(),), Place.SHELL, "/etc/security/limits.d/stagingd.conf"),
        ((process(cgroup="0::/system.slice/stagingd.service"),), Place.UNIT, "[Service]\nLimitMEMLOCK=infinity"),
        ((process(cgroup="0::/user.slice/user@1.service"),), Place.SHELL, "prlimit"),
        ((process(cgroup="0::/", namespaces=APART), DOCKER), Place.CONTAINER, "--ulimit memlock=-1:-1"),
        ((process(cgroup="4:memory:/docker/0a1b\n0::/"),), Place.CONTAINER, "--ulimit memlock=-1:-1"),
        ((process(cgroup="0::/", namespaces=APART), DOCKER, POD), Place.POD, "IPC_LOCK"),
        ((process(cgroup="0::/kubepods.slice/a"),), Place.POD, "IPC_LOCK"),
        ((process(), DOCKER), Place.SHELL, "prlimit"),  # a virtual machine made from a container's image
    ],
)
def test_a_limit_is_raised_where_the_process_was_started(
    tmp_path: Path, trees: tuple[dict[str, str], ...], place: Place, remedy: str
) -> None:
    found = subject(tmp_path, *trees)
    assert found.place is place
    assert remedy in commands(locking(found))


def test_a_unit_is_named_in_its_remedy(tmp_path: Path) -> None:
    found = locking(subject(tmp_path, process(cgroup="0::/system.slice/stagingd@0.service")))
    assert "systemctl restart stagingd@0.service" in commands(found)


def rooms(tmp_path: Path, room: Room) -> tuple[Finding, Finding]:
    in_memory, shared = judge_room(room, subject(tmp_path, process()), WANTED)
    return in_memory, shared


def test_memory_without_room_for_two_versions_is_an_error_that_says_what_would_fit(tmp_path: Path) -> None:
    plenty = SharedMemory(total=64 * GIB, free=64 * GIB)
    files = machine(tmp_path / "full", memory(available=20 * GIB))
    full, _ = rooms(tmp_path, Room(available=read_room(files).available, shared_memory=plenty))
    assert full.level is Level.ERROR
    assert "20.000 GiB available" in full.found
    assert size_text(largest_version(20 * GIB)) in full.found
    enough, _ = rooms(tmp_path, Room(available=WANTED.stage_bytes, shared_memory=plenty))
    assert enough.level is Level.OK


def test_half_the_bytes_are_offered_only_where_they_would_fit(tmp_path: Path) -> None:
    half, _ = rooms(tmp_path, Room(available=WANTED.stage_bytes // 2 + 1, shared_memory=None))
    less, _ = rooms(tmp_path, Room(available=WANTED.stage_bytes // 2 - 1, shared_memory=None))
    assert "quantization=" in commands(half)
    assert "quantization=" not in commands(less)


def test_a_containers_64_mib_of_shared_memory_are_recognized(tmp_path: Path) -> None:
    _, found = rooms(tmp_path, Room(available=None, shared_memory=SharedMemory(total=2**26, free=2**26)))
    assert found.level is Level.ERROR
    assert "64 MiB free of 64 MiB, the usual size in a container" in found.found
    assert "--ipc=host" in commands(found)
    assert "--shm-size=33g" in commands(found)


def test_shared_memory_of_a_host_is_enlarged_to_what_is_used_and_wanted(tmp_path: Path) -> None:
    _, found = rooms(tmp_path, Room(available=None, shared_memory=SharedMemory(total=40 * GIB, free=10 * GIB)))
    assert found.level is Level.ERROR
    assert "mount -o remount,size=63g /dev/shm" in commands(found)


def test_a_machine_without_shared_memory_is_an_error(tmp_path: Path) -> None:
    assert read_room(machine(tmp_path / "none", memory())).shared_memory is None
    assert rooms(tmp_path, Room(available=None, shared_memory=None))[1].level is Level.ERROR


def test_the_shared_memory_of_this_machine_is_what_the_system_says() -> None:
    said, found = os.statvfs("/dev/shm"), read_room(Files()).shared_memory
    assert found is not None
    assert found.total == said.f_blocks * said.f_frsize


def limited(root: Path, cgroup: str, mount: str, limits: dict[str, str]) -> GroupLimit | None:
    files = machine(root, process(cgroup=cgroup), mounts(mount), limits)
    return tightest_limit(files, read_mounts(files), read_subject(files, None).groups)


V2 = "36 25 0:31 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"


def group(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 1\nshmem 9\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": str(used), f"{folder}/memory.stat": stat}


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path: Path) -> None:
    outer = group("sys/fs/cgroup/job", str(10 * GIB), 8 * GIB, cached=GIB)
    inner = group("sys/fs/cgroup/job/step", str(9 * GIB), GIB)
    other = group("sys/fs/cgroup/other", str(GIB), GIB)
    found = limited(tmp_path, "0::/job/step", V2, outer | inner | other)
    assert found is not None
    assert found.file == "/sys/fs/cgroup/job/memory.max"
    assert found.room == 3 * GIB


def test_groups_without_a_limit_are_none(tmp_path: Path) -> None:
    assert limited(tmp_path / "2", "0::/job", V2, group("sys/fs/cgroup/job", "max", GIB)) is None
    files = {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "1"}
    tree = {f"sys/fs/cgroup/memory/job/{name}": text for name, text in files.items()}
    assert limited(tmp_path / "1", "9:memory:/job\n0::/", V1.format(root="/"), tree) is None


def test_a_container_sees_its_own_group_as_the_root_of_the_older_hierarchy(tmp_path: Path) -> None:
    files = {"limit_in_bytes": 8 * GIB, "usage_in_bytes": 6 * GIB, "stat": f"active_file 5\ntotal_active_file {GIB}"}
    tree = {f"sys/fs/cgroup/memory/memory.{name}": str(text) for name, text in files.items()}
    found = limited(tmp_path, "9:cpuset,memory:/docker/0a\n0::/", V1.format(root="/docker/0a"), tree)
    assert found is not None
    assert found.room == 3 * GIB
    assert found.file == "/sys/fs/cgroup/memory/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("trees", "remedy"),
    [
        ((process(),), "echo {bytes} > /sys/fs/cgroup/a/memory.max"),
        ((process(cgroup="0::/system.slice/stagingd.service"),), "systemctl set-property stagingd.service MemoryMax="),
        ((process(namespaces=APART), DOCKER), "--memory=35g"),
        ((process(namespaces=APART), POD), "resources: {{limits: {{memory: 35Gi}}}}"),
    ],
)
def test_a_memory_limit_is_raised_to_what_is_used_and_wanted(
    tmp_path: Path, trees: tuple[dict[str, str], ...], remedy: str
) -> None:
    limit = GroupLimit(file="/sys/fs/cgroup/a/memory.max", limit=8 * GIB, used=3 * GIB, reclaimable=GIB)
    found = judge_group_limit(limit, subject(tmp_path, *trees), WANTED)
    assert found.level is Level.ERROR
    assert remedy.format(bytes=35 * GIB) in commands(found)
    assert judge_group_limit(None, subject(tmp_path / "free", process()), WANTED).level is Level.OK


def huge(root: Path, option: str, chosen: str | None) -> Finding:
    mount = f"35 26 0:30 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=2097152k{option}"
    files = machine(root, memory(), mounts(mount), shared_pages(chosen) if chosen else {})
    return judge_huge_pages(read_pages(files, read_mounts(files)), WANTED)


@pytest.mark.parametrize(
    ("option", "chosen", "small"),
    [
        ("", "never", True),
        ("", "always", True),  # is for other shared memory than that of a mounted tmpfs
        (",huge=advise", "advise", True),  # the daemon does not advise
        (",huge=always", "never", False),
        (",huge=within_size", "never", False),
        (",huge=always", "deny", True),
        ("", "force", False),
        (",huge=always", None, True),
    ],
)
def test_huge_pages_are_a_matter_of_the_mount_unless_overruled(
    tmp_path: Path, option: str, chosen: str | None, small: bool
) -> None:
    assert huge(tmp_path, option, chosen).level is (Level.NOTE if small else Level.OK)


def test_small_pages_cost_what_was_measured(tmp_path: Path) -> None:
    found = huge(tmp_path, "", "never")
    assert "5.16 s to make instead of 0.64 s" in found.costs
    assert "mount -o remount,huge=always /dev/shm" in commands(found)


def test_of_two_file_systems_mounted_at_one_place_the_last_is_seen(tmp_path: Path) -> None:
    lines = [f"3{n} 26 0:3{n} / /dev/shm rw - tmpfs tmpfs rw{option}" for n, option in enumerate(("", ",huge=always"))]
    files = machine(tmp_path, memory(), mounts(*lines), shared_pages("never"))
    assert read_pages(files, read_mounts(files)).mount_option == "always"


def test_swap_matters_only_where_nothing_is_locked(tmp_path: Path) -> None:
    files = machine(tmp_path, memory(swap=8 * GIB), mounts())
    pages = read_pages(files, read_mounts(files))
    unlocked = judge_swap(pages, lock_memory=False)
    assert unlocked.level is Level.WARNING
    assert "8.000 GiB" in unlocked.found
    assert "STAGINGD_LOCK_MEMORY=true" in commands(unlocked)
    assert judge_swap(pages, lock_memory=True).level is Level.OK
    assert judge_swap(pages.model_copy(update={"swap": 0}), lock_memory=False).level is Level.OK
