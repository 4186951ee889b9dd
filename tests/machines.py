# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Small machines for `stagingd doctor`: trees of /proc and /sys in a folder, such as the kernel shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stagingd.machine.files import Files

HOST_NAMESPACES = {"pid": "pid:[4026531836]", "uts": "uts:[4026531838]", "ipc": "ipc:[4026531839]"}

GIB = 2**30


def machine(root: Path, *trees: Mapping[str, str]) -> Files:
    """Write files, later trees over earlier ones; a text that begins with ``->`` is a symbolic link."""
    for path, text in {name: text for tree in trees for name, text in tree.items()}.items():
        where = root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.unlink(missing_ok=True)
        where.symlink_to(text[2:]) if text.startswith("->") else where.write_text(text + "\n")
    return Files(root)


def process(
    pid: int | str = "self",
    *,
    locked_limit: str = "8388608",
    locked_hard: str = "8388608",
    files: str = "1048576",
    capabilities: int = 0,
    locked_kib: int = 0,
    nodes: str = "0-1",
    cpus: str = "0-7",
    cgroup: str = "0::/user.slice/user-1000.slice/session-3.scope",
    namespaces: Mapping[str, str] = HOST_NAMESPACES,
) -> dict[str, str]:
    """The folder of one process, as a user's shell has it."""
    status = {
        "Name": "python3",
        "CapEff": f"{capabilities:016x}",
        "VmLck": f"{locked_kib:8} kB",
        "Cpus_allowed_list": cpus,
        "Mems_allowed_list": nodes,
    }
    limits = [
        f"{'Limit':25} {'Soft Limit':20} {'Hard Limit':20} {'Units':10}",
        f"{'Max locked memory':25} {locked_limit:20} {locked_hard:20} {'bytes':10}",
        f"{'Max open files':25} {1024:<20} {files:20} {'files':10}",
    ]
    folder = f"proc/{pid}"
    return {
        f"{folder}/status": "\n".join(f"{name}:\t{value}" for name, value in status.items()),
        f"{folder}/limits": "\n".join(limits),
        f"{folder}/cgroup": cgroup,
        **{f"{folder}/ns/{kind}": f"->{name}" for kind, name in namespaces.items()},
    }


def memory(available: int = 512 * GIB, swap: int = 0) -> dict[str, str]:
    """/proc/meminfo of so many bytes."""
    return {"proc/meminfo": f"MemAvailable: {available // 1024} kB\nSwapTotal: {swap // 1024} kB\nHugePages_Total: 0"}


def mounts(*lines: str) -> dict[str, str]:
    """/proc/self/mountinfo; without lines, that of an ordinary host."""
    usual = (
        "24 30 0:22 / /proc rw,nosuid - proc proc rw",
        "35 26 0:30 / /dev/shm rw,nosuid,nodev - tmpfs tmpfs rw,size=263858052k",
        "36 25 0:31 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate",
    )
    return {"proc/self/mountinfo": "\n".join(lines or usual)}


def gpu(
    address: str,
    node: int = 0,
    *,
    now: tuple[str, str] = ("32.0 GT/s PCIe", "16"),
    best: tuple[str, str] = ("32.0 GT/s PCIe", "16"),
    port: tuple[str, str] = ("32.0 GT/s PCIe", "16"),
    port_address: str = "0000:00:01.0",
) -> dict[str, str]:
    """A GPU behind a port of its own: speed and width of its link now, and the best of the GPU and of the port."""
    below = f"sys/devices/pci0000:00/{port_address}"
    folder = f"{below}/{address}"
    return {
        f"sys/bus/pci/devices/{address}": f"->../../../devices/pci0000:00/{port_address}/{address}",
        f"{folder}/vendor": "0x10de",
        f"{folder}/class": "0x030200",
        f"{folder}/numa_node": str(node),
        f"{folder}/current_link_speed": now[0],
        f"{folder}/current_link_width": now[1],
        f"{folder}/max_link_speed": best[0],
        f"{folder}/max_link_width": best[1],
        f"{below}/max_link_speed": port[0],
        f"{below}/max_link_width": port[1],
    }


def nodes(*cpus: str) -> dict[str, str]:
    """NUMA nodes, with the lists of their processors."""
    return {f"sys/devices/system/node/node{number}/cpulist": listed for number, listed in enumerate(cpus)}


def shared_pages(chosen: str) -> dict[str, str]:
    """What is chosen for huge pages of shared memory."""
    values = ("always", "within_size", "advise", "never", "deny", "force")
    text = " ".join(f"[{value}]" if value == chosen else value for value in values)
    return {"sys/kernel/mm/transparent_hugepage/shmem_enabled": text}
