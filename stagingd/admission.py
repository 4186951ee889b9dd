# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Admission: which users may speak with the daemon, by the credentials that the kernel gives of each peer.

The sockets' permissions say the same; this holds where somebody has loosened them, or handed a socket on.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from stagingd.config import Settings
from stagingd.errors import PeerNotAdmitted
from stagingd.session import Peer


def check_admitted(peer: Peer, settings: Settings) -> None:
    """Refuse who is neither this user, nor root, nor in the group of the settings. Raises PeerNotAdmitted."""
    if peer.uid in (0, os.geteuid()):
        return
    if settings.group is not None and settings.group_id in {peer.gid, *_groups(peer)}:
        return
    allowed = f"uid {os.geteuid()}" + (f" and group {settings.group!r}" if settings.group else "")
    raise PeerNotAdmitted(
        f"uid {peer.uid} (gid {peer.gid}, pid {peer.pid}) may not use this daemon, which serves {allowed}",
        remedy="join that group, or start a daemon of your own",
        peer=f"uid {peer.uid}",
    )


def _groups(peer: Peer) -> list[int]:
    """A peer's supplementary groups: those of its process, or of its user where the process cannot be seen."""
    try:
        lines = Path(f"/proc/{peer.pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return _groups_of_user(peer)
    return [int(group) for line in lines if line.startswith("Groups:") for group in line.split()[1:]]


def _groups_of_user(peer: Peer) -> list[int]:
    try:
        return os.getgrouplist(pwd.getpwuid(peer.uid).pw_name, peer.gid)
    except KeyError:
        return []  # a user of a container, whom this machine does not know
