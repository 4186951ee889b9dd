# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Permissions: does a daemon of this user get its folder, and do clients of the group get into it?"""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path
from typing import Final

from stagingd.config import Settings
from stagingd.doctor.finding import Finding, Level, Remedy, ok
from stagingd.doctor.subject import user_name
from stagingd.record import Record

FOLDER, GROUP = "runtime folder", "group"

_LONGEST_SOCKET: Final = 107
"""Bytes of a socket's path, see unix(7)."""


class Entry(Record):
    """A file or folder.

    Attributes:
        path: where.
        uid, gid, mode: whose it is, and what may be done with it; the mode as in stat(2).
        writable: whether this process may make files in it.
        size: in bytes.
        inode: its number.
    """

    path: str
    uid: int
    gid: int
    mode: int
    writable: bool
    size: int
    inode: int

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.path} belongs to uid {self.uid}, mode {stat.S_IMODE(self.mode):03o}"


class Access(Record):
    """What is allowed at the folder of the sockets.

    Attributes:
        uid, groups: who looks.
        user: their name.
        socket: the control socket's path.
        folder: the runtime folder; None where it does not exist, or cannot be seen.
        group: the name of the group that the folder is open to.
        above: the nearest folder above it that can be seen.
    """

    uid: int
    groups: tuple[int, ...]
    user: str
    socket: str
    folder: Entry | None
    group: str | None
    above: Entry


def read_access(settings: Settings) -> Access:
    """Read it, on this machine."""
    path = settings.runtime_dir.absolute()
    folder = read_entry(path, follow=True)
    return Access(
        uid=os.geteuid(),
        groups=tuple(sorted({os.getegid(), *os.getgroups()})),
        user=user_name(),
        socket=str(settings.control_socket),
        folder=folder,
        group=_open_to(folder) if folder else None,
        above=next(entry for above in path.parents if (entry := read_entry(above, follow=True)) is not None),
    )


def _open_to(folder: Entry) -> str | None:
    named = (entry.gr_name for entry in grp.getgrall() if entry.gr_gid == folder.gid)
    return next(named, None) if folder.mode & stat.S_IXGRP else None


def read_entry(path: Path, *, follow: bool) -> Entry | None:
    """A file or folder; None where there is none, or it cannot be seen.

    Args:
        path: which.
        follow: whether a symbolic link stands for what it points to.
    """
    try:
        found = path.stat(follow_symlinks=follow)
    except OSError:
        return None
    return Entry(
        path=str(path),
        uid=found.st_uid,
        gid=found.st_gid,
        mode=found.st_mode,
        writable=os.access(path, os.W_OK | os.X_OK),
        size=found.st_size,
        inode=found.st_ino,
    )


def judge_folder(access: Access, *, served: bool) -> Finding:
    """Whether a daemon of this user takes the folder of the sockets.

    Args:
        access: what is allowed.
        served: whether a daemon answers there: then it has taken it.
    """
    folder, path = access.folder, Path(access.socket).parent
    if len(os.fsencode(access.socket)) > _LONGEST_SOCKET:
        return _refused(access, f"the socket's path is longer than the {_LONGEST_SOCKET} bytes of one: {access.socket}")
    if folder is None and access.above.writable:
        return ok(FOLDER, f"{path} is made when the daemon starts")
    if folder is None:
        return _refused(access, f"there is no {path}, and {access.user} may not make it: {access.above.shown}")
    if served:
        return ok(FOLDER, f"{folder.shown}; its daemon answers")
    if not stat.S_ISDIR(folder.mode):
        return _refused(access, f"{folder.path} is not a folder")
    if folder.uid != access.uid:
        service = Remedy(where="as a service, of a user of its own", do="systemctl enable --now stagingd")
        return _refused(access, f"{folder.shown}, and {access.user} is uid {access.uid}", service)
    if folder.mode & stat.S_IWOTH:
        return _refused(access, f"{folder.shown}: everybody may write to it", _chmod("o-w", folder))
    if not folder.writable:
        return _refused(access, f"{folder.shown}: its owner may not write to it", _chmod("u+rwx", folder))
    return ok(FOLDER, folder.shown)


def judge_group(access: Access, group: tuple[str, int] | None, *, served: bool) -> Finding:
    """Whether members of the group get to the sockets.

    Args:
        access: what is allowed.
        group: the name and number of the group in the settings.
        served: whether a daemon answers.
    """
    folder = access.folder
    if served and folder is not None:
        members = f"group {folder.gid}" if folder.mode & stat.S_IXGRP else "no group"
        return ok(GROUP, f"the daemon's folder is open to its user (uid {folder.uid}) and {members}")
    if group is None:
        return ok(GROUP, f"STAGINGD_GROUP is not set: {access.user} and root are served")
    name, gid = group
    if access.uid != 0 and gid not in access.groups:
        return Finding(
            check=GROUP,
            level=Level.ERROR,
            found=f"{access.user} is not in group {name} (gid {gid}), so may not give files to it",
            costs="the daemon does not start",
            remedies=(Remedy(where="as root, then log in anew", do=f"usermod --append --groups {name} {access.user}"),),
        )
    if folder is not None and not folder.mode & stat.S_IXGRP:
        return Finding(
            check=GROUP,
            level=Level.WARNING,
            found=f"{folder.shown}: group {name} does not get in",
            costs="its members are refused",
            remedies=(_chmod("g+rx", folder),),
        )
    return ok(GROUP, f"clients of {access.user}, root and members of {name} (gid {gid}) are served")


def _refused(access: Access, found: str, *remedies: Remedy) -> Finding:
    elsewhere = Remedy(
        where="in another folder; clients need the setting too", do=f"STAGINGD_RUNTIME_DIR=/tmp/stagingd-{access.uid}"
    )
    return Finding(
        check=FOLDER,
        level=Level.ERROR,
        found=found,
        costs="the daemon does not start",
        remedies=(*remedies, elsewhere),
    )


def _chmod(how: str, entry: Entry) -> Remedy:
    return Remedy(where="as its owner", do=f"chmod {how} {entry.path}")
