# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""NUMA nodes against GPUs: whose memory the slots are in, and which GPUs reach it without crossing sockets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.pci import PciGpu
from stagingd.doctor.subject import Place, Subject
from stagingd.machine.files import Files, numbers
from stagingd.record import Record

CHECK = "NUMA nodes"


class Node(Record):
    """One node: its number and its processors."""

    number: int
    cpus: tuple[int, ...]


def read_nodes(files: Files) -> list[Node]:
    """All nodes; none where the kernel knows of none."""
    folder = "sys/devices/system/node"
    found = [int(name[4:]) for name in files.names(folder) if re.fullmatch(r"node\d+", name)]
    return [Node(number=n, cpus=numbers(files.text(f"{folder}/node{n}/cpulist") or "")) for n in sorted(found)]


def judge_numa(nodes: Sequence[Node], gpus: Sequence[PciGpu], subject: Subject) -> list[Finding]:
    """Whether the daemon has its memory at the nodes that GPUs are at."""
    if len(nodes) < 2:
        return [ok(CHECK, "one")]
    told = [gpu for gpu in gpus if gpu.node is not None]
    if len(told) < len(gpus):
        return [_not_told([gpu for gpu in gpus if gpu.node is None], nodes)]
    near = memory_nodes(nodes, subject)
    far = [gpu for gpu in told if gpu.node not in near]
    at = sorted({gpu.node for gpu in told if gpu.node is not None})
    gpus_at = f", GPUs are at {_listed(at)}" if at else ", no GPU is at any"
    found = f"{subject.who} has memory of {_listed(near)}{gpus_at}"
    if far:
        return [_far(found, far, subject)]
    if len(near) < 2 or _interleaves(subject) or not at:
        return [ok(CHECK, found)]
    return [_unspread(found, at)]


def memory_nodes(nodes: Sequence[Node], subject: Subject) -> set[int]:
    """The nodes that a process gets memory of: those it may run on, unless its unit spreads its memory over all."""
    allowed = set(subject.memory_nodes) or {node.number for node in nodes}
    runs_on = {node.number for node in nodes if set(node.cpus) & set(subject.cpus)}
    return allowed if _interleaves(subject) else (runs_on & allowed) or allowed


def _interleaves(subject: Subject) -> bool:
    return subject.unit == "stagingd.service"


def _far(found: str, far: Sequence[PciGpu], subject: Subject) -> Finding:
    where = ", ".join(f"{gpu.address} (node {gpu.node})" for gpu in far)
    one_of_several = subject.unit is not None and subject.unit.startswith("stagingd@")
    return Finding(
        check=CHECK,
        level=Level.NOTE if one_of_several else Level.WARNING,
        found=f"{found}; elsewhere: {where}",
        costs="what these GPUs copy crosses the link between the processors' sockets, which they all share; the "
        "measured speed of copies tells how much it takes",
        remedies=(*_widened(far, subject), *_one_each(sorted({gpu.node for gpu in far if gpu.node is not None}))),
    )


def _unspread(found: str, at: Sequence[int]) -> Finding:
    return Finding(
        check=CHECK,
        level=Level.NOTE,
        found=f"{found}; unless told otherwise, pages come from the node that it runs on when it makes a stage",
        costs="GPUs at other nodes copy over the link between the sockets, and one node's memory carries all copies",
        remedies=(
            Remedy(where="where GPUs of several nodes use one stage", do="numactl --interleave=all stagingd serve"),
            Remedy(where="or as a service, whose unit does the same", do="systemctl enable --now stagingd"),
            *_one_each(at),
        ),
    )


def _widened(far: Sequence[PciGpu], subject: Subject) -> tuple[Remedy, ...]:
    if all(gpu.node in subject.memory_nodes for gpu in far):  # it may have their memory, and only runs elsewhere
        return (Remedy(where="where all GPUs use one stage", do="numactl --interleave=all stagingd serve"),)
    if subject.place is Place.CONTAINER:
        return (Remedy(where="docker run, podman run", do=f"--cpuset-mems={_with(far, subject)}"),)
    if subject.place is Place.UNIT:
        return (Remedy(where=f"systemctl edit {subject.unit}", do="[Service]\nAllowedMemoryNodes="),)
    if subject.place is Place.POD:
        return (Remedy(where="in the kubelet's configuration", do="memoryManagerPolicy: None"),)
    return (Remedy(where="from a shell outside of the cpuset that holds this one", do="stagingd serve"),)


def _with(far: Sequence[PciGpu], subject: Subject) -> str:
    nodes = {gpu.node for gpu in far if gpu.node is not None} | set(subject.memory_nodes)
    return ",".join(map(str, sorted(nodes)))


def _one_each(nodes: Sequence[int]) -> tuple[Remedy, ...]:
    """One daemon per node helps where all ranks of a stage, trainers and engines, have their GPUs at one node."""
    found = []
    for node in nodes:
        unit, where = f"stagingd@{node}", f"for a daemon at node {node}, where all GPUs of a stage are there"
        found += [
            Remedy(where=where, do=f"systemctl edit {unit}\n[Service]\nNUMAMask={node}\nCPUAffinity=numa"),
            Remedy(where="and then", do=f"systemctl enable --now {unit}"),
            Remedy(where="in its trainers and engines", do=f"STAGINGD_RUNTIME_DIR=/run/stagingd-{node}"),
        ]
    return tuple(found)


def _not_told(gpus: Sequence[PciGpu], nodes: Sequence[Node]) -> Finding:
    where = ", ".join(gpu.address for gpu in gpus)
    return Finding(
        check=CHECK,
        level=Level.NOTE,
        found=f"the machine has {len(nodes)} nodes, and its firmware does not say at which these GPUs are: {where}",
        costs="it is not known which GPUs copy over the link between the sockets; the measured speed of copies tells",
        remedies=(
            Remedy(where="to try a node", do="numactl --cpunodebind=N --membind=N stagingd doctor"),
            Remedy(where="in a virtual machine, at the host", do="give the guest the host's NUMA topology"),
        ),
    )


def _listed(nodes: Sequence[int] | set[int]) -> str:
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, sorted(nodes)))}"
