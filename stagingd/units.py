# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The service's files: put where systemd looks, for the stagingd that puts them there.

Source: systemd.unit(5), sysusers.d(5) and tmpfiles.d(5) for the folders, systemd.exec(5) for what a unit sees.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from stagingd.errors import StagingError

PREFIXES: Final = ("/etc", "/usr/local/lib", "/usr/lib")
"""Where systemd looks for files that stay, the first before the others."""

PACKAGED_PROGRAM: Final = "ExecStart=/usr/bin/stagingd "
"""How the units name the program that they start."""

FOLDERS: Final = {"service": "systemd/system", "sysusers.d": "sysusers.d", "tmpfiles.d": "tmpfiles.d"}
"""Below a prefix: where units go, by their ending, and the others, by the folder that they lie in here."""

HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - named, not used
"""What the units do not see, by ProtectHome= and PrivateTmp=."""

_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9/._+@-]+")


class UnitsNotInstalled(StagingError):
    """The service's files cannot be put where systemd looks, or would start a program that the service cannot see."""

    code = "units_not_installed"


@dataclass(frozen=True)
class Placed:
    """A file of the service, and what became of it: ``written``, ``replaced`` or ``unchanged``."""

    path: Path
    outcome: str


def this_program() -> Path:
    """The ``stagingd`` of the environment that this process runs in."""
    return Path(sysconfig.get_path("scripts")) / "stagingd"


def install(program: Path, *, root: Path = Path("/"), prefix: Path = Path(PREFIXES[0])) -> list[Placed]:
    """Write units, sysusers.d and tmpfiles.d files. Files that are there already with the same content stay.

    Args:
        program: what the units start.
        root: what takes the place of ``/``, such as an image that is being made.
        prefix: one of ``PREFIXES``.

    Raises:
        UnitsNotInstalled: systemd does not look there, the service could not start the program, or a file may not
            be written; those before it have been.
    """
    if str(prefix) not in PREFIXES:
        raise UnitsNotInstalled(
            f"systemd does not look for units in {prefix}/{FOLDERS['service']}",
            remedy=f"use one of {', '.join(PREFIXES)}",
            path=str(prefix),
        )
    check_startable(program)
    below = root / prefix.relative_to("/")
    return [_place(below / name, content) for name, content in files(program)]


def check_startable(program: Path) -> None:
    """Refuse a program that the service could not start.

    Raises:
        UnitsNotInstalled: its path cannot stand in a unit, or it or its interpreter lies where the service does not
            look.
    """
    if not _PLAIN_PATH.fullmatch(str(program)):
        raise _unusable(program, "is no absolute path of letters, digits and ._+@-, which a unit takes as it is")
    interpreter = program.with_name("python").resolve()  # of a virtual environment: a link to some other place
    for what, place in {"": program, "is a link, and ": program.resolve(), "is run by one that ": interpreter}.items():
        for hidden in HIDDEN:
            if place.is_relative_to(hidden):
                raise _unusable(program, f"{what}lies in {hidden}, which the service does not see")


def _unusable(program: Path, why: str) -> UnitsNotInstalled:
    return UnitsNotInstalled(
        f"the program {program} {why}",
        remedy="install stagingd for the whole machine, such as into a virtual environment in /opt, and run its "
        "install-units; or name the program by --program",
        path=str(program),
    )


def files(program: Path) -> Iterator[tuple[Path, bytes]]:
    """The service's files: where each goes below a prefix, and its content with the program to start in it."""
    source = _source()
    for unit in sorted(source.iterdir(), key=lambda file: file.name):
        if unit.name.endswith(".service"):
            text = unit.read_text().replace(PACKAGED_PROGRAM, f"ExecStart={program} ")
            yield Path(FOLDERS["service"]) / unit.name, text.encode()
        elif unit.name in FOLDERS:
            for file in unit.iterdir():
                yield Path(FOLDERS[unit.name]) / file.name, file.read_bytes()


def _source() -> Traversable:
    """The folder ``systemd``: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = importlib.resources.files("stagingd")
    installed = package / "systemd"
    return installed if installed.is_dir() else Path(str(package)).parent / "systemd"


def _place(path: Path, content: bytes) -> Placed:
    try:
        before = path.read_bytes() if path.exists() else None
        if before == content:
            return Placed(path, "unchanged")
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, content)
    except OSError as error:
        raise UnitsNotInstalled(
            f"{path} cannot be written: {error.strerror}",
            remedy="run the command as root, or write into a folder of your own by --root",
            path=str(path),
        ) from error
    return Placed(path, "written" if before is None else "replaced")


def _replace(path: Path, content: bytes) -> None:
    """Never half written, and readable by everybody."""
    handle, making = tempfile.mkstemp(dir=path.parent, prefix=".stagingd-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        Path(making).replace(path)
    except BaseException:
        Path(making).unlink(missing_ok=True)
        raise
