# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""NUMA nodes against GPUs: whose memory the slots are in, and which GPUs reach it without crossing sockets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stagingd.doctor.files import Files, numbers
from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.pci import PciGpu
from stagingd.doctor.subject import Place, Subject
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
    """Whether the daemon may have memory at the nodes that GPUs are at."""
    if len(nodes) < 2:
        return [ok(CHECK, "one")]
    allowed = set(subject.memory_nodes) or {node.number for node in nodes}
    told = [gpu for gpu in gpus if gpu.node is not None]
    far = [gpu for gpu in told if gpu.node not in allowed]
    if far:
        return [_far(far, allowed, subject)]
    if len(told) < len(gpus):
        return [_not_told([gpu for gpu in gpus if gpu.node is None], nodes)]
    if not told:
        return [ok(CHECK, f"{_listed(allowed)}; no GPU is at any")]
    return [_all_reach(told, nodes, allowed, subject)]


def _far(far: Sequence[PciGpu], allowed: set[int], subject: Subject) -> Finding:
    where = ", ".join(f"{gpu.address} (node {gpu.node})" for gpu in far)
    return Finding(
        check=CHECK,
        level=Level.WARNING,
        found=f"{subject.who} may have memory of {_listed(allowed)} only; GPUs elsewhere: {where}",
        costs="what these GPUs copy crosses the link between the processors' sockets, which they all share; the "
        "measured speed of their copies says how much it takes",
        remedies=(*_widened(subject), *_one_each(sorted({gpu.node for gpu in far if gpu.node is not None}))),
    )


def _all_reach(gpus: Sequence[PciGpu], nodes: Sequence[Node], allowed: set[int], subject: Subject) -> Finding:
    at = sorted({gpu.node for gpu in gpus if gpu.node is not None})
    found = f"GPUs are at {_listed(at)}, and {subject.who} may have memory of {_listed(allowed)}"
    if set(at) == allowed and len(at) == 1:
        return ok(CHECK, found)
    if subject.place is Place.UNIT and subject.unit == "stagingd.service":
        return ok(CHECK, f"{found}; its unit spreads pages over all nodes")
    running = {node.number for node in nodes if set(node.cpus) & set(subject.cpus)}
    return Finding(
        check=CHECK,
        level=Level.NOTE,
        found=f"{found}; unless told otherwise, pages come from the node that it runs on, one of {_listed(running)}",
        costs="GPUs at other nodes copy over the link between the sockets, and one node's memory carries all copies",
        remedies=(
            Remedy(
                where="where GPUs of several nodes use one stage",
                do="numactl --interleave=all stagingd serve",
            ),
            Remedy(where="or as a service, whose unit does the same", do="systemctl enable --now stagingd"),
            *_one_each(at),
        ),
    )


def _widened(subject: Subject) -> tuple[Remedy, ...]:
    if subject.place is Place.CONTAINER:
        return (Remedy(where="docker run, podman run", do="without --cpuset-mems, or with all nodes in it"),)
    if subject.place is Place.UNIT:
        return (Remedy(where=f"systemctl edit {subject.unit}", do="[Service]\nAllowedMemoryNodes="),)
    if subject.place is Place.POD:
        return (Remedy(where="in the kubelet's configuration", do="memoryManagerPolicy: None"),)
    return (Remedy(where="from a shell outside of the cpuset that holds this one", do="stagingd serve"),)


def _one_each(nodes: Sequence[int]) -> tuple[Remedy, ...]:
    """One daemon per node helps where all ranks of a stage, trainers and engines, have their GPUs at one node."""
    found = []
    for node in nodes:
        unit, where = f"stagingd@{node}", f"where all GPUs of a stage are at node {node}: a daemon there"
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
