# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Small files under /proc and /sys, read under a root: the machine's own, or a tree that a test has made."""

from __future__ import annotations

from pathlib import Path


class Files:
    """What can be read below a root. Paths are given without a leading slash."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def text(self, path: str) -> str | None:
        """A file's text without white space around it; None where there is none, or it may not be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None  # also what a driver answers to a read of its attribute

    def number(self, path: str) -> int | None:
        """A file that holds one integer; None where it holds none."""
        text = self.text(path)
        return int(text) if text is not None and text.removeprefix("-").isdecimal() else None

    def lines(self, path: str) -> list[str]:
        """A file's lines; none where it cannot be read."""
        return (self.text(path) or "").splitlines()

    def names(self, path: str) -> list[str]:
        """What is in a folder, sorted; nothing where it cannot be read."""
        try:
            return sorted(entry.name for entry in (self.root / path).iterdir())
        except OSError:
            return []

    def link(self, path: str) -> str | None:
        """What a symbolic link says."""
        try:
            return str((self.root / path).readlink())
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder that this process can see."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False


def numbers(listed: str) -> tuple[int, ...]:
    """The kernel's lists of processors and nodes: ``0-3,8`` is 0, 1, 2, 3 and 8."""
    found: list[int] = []
    for part in listed.replace(",", " ").split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
