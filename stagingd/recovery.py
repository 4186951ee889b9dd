# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Recovery: what a daemon that has ended left in shared memory is adopted, set aside, or left alone.

whole                             adopted: its versions and leases stand
damaged, or of another format     set aside under a name of its own, so that the stage can be declared anew
not made by stagingd, or not ours left alone
half made                         removed: nobody has ever seen it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from stagingd import segment, state
from stagingd.config import Settings
from stagingd.declaration import Terms
from stagingd.errors import SegmentForeign, SegmentTaken, SegmentUnreadable
from stagingd.record import STAGE_NAME
from stagingd.segment import SHARED_MEMORY, UNFINISHED, Segment
from stagingd.state import StageState

log = structlog.get_logger()

SET_ASIDE: Final = "~damaged"
"""End of the name of a segment that was set aside; no stage's name can hold it."""


@dataclass(frozen=True)
class Left:
    """A stage that a daemon has left."""

    segment: Segment
    terms: Terms
    state: StageState


def recover(settings: Settings) -> Iterator[Left]:
    """Go through the segments under the settings' prefix.

    Raises:
        NotEnoughMemory: a segment may not be locked; it stays as it is.
    """
    prefix = settings.segment_prefix.lstrip("/")
    found = [path for path in SHARED_MEMORY.iterdir() if path.name.startswith(prefix)]
    # Half made ones first: one may be whole, and killed before it lost that name. Once adopted it counts as in use.
    for path in sorted(found, key=lambda path: (not path.name.endswith(UNFINISHED), path.name)):
        if path.name.endswith(SET_ASIDE):
            log.warning(
                "set_aside_before", segment=str(path), bytes=path.lstat().st_size, remedy="look at it, remove it"
            )
        elif path.name.endswith(UNFINISHED):
            _remove_half_made(path)
        elif re.fullmatch(STAGE_NAME, path.name.removeprefix(prefix)):
            left = _adopt(path, path.name.removeprefix(prefix), settings)
            if left is not None:
                yield left


def _adopt(path: Path, stage: str, settings: Settings) -> Left | None:
    try:
        lock, mode, group = settings.lock_memory, settings.shared_mode, settings.group_id
        return _left(segment.adopt(f"/{path.name}", lock=lock, mode=mode, group=group), stage)
    except (SegmentForeign, SegmentTaken) as error:
        log.warning("segment_left_alone", segment=str(path), what=error.what, remedy=error.remedy)
    except SegmentUnreadable as error:
        _set_aside(path, error)
    return None


def _set_aside(path: Path, error: SegmentUnreadable) -> None:
    aside = path.with_name(path.name + SET_ASIDE)
    try:
        path.rename(aside)  # in place of one set aside before: the machine must not fill up with them
    except OSError as failure:  # somebody else has put something there
        what = f"{error.what}; it cannot be set aside as {aside}: {failure.strerror}"
        log.warning("segment_left_alone", segment=str(path), what=what, remedy="remove both")
    else:
        log.error("segment_set_aside", segment=str(aside), what=error.what, remedy="look at it, remove it")


def _left(found: Segment, stage: str) -> Left | None:
    try:
        if found.catalog.stage != stage:
            raise SegmentForeign(
                f"segment {found.name} holds stage {found.catalog.stage!r}", remedy="use another segment_prefix"
            )
        record = found.ledger.read()
        if record == b"":  # its daemon ended before the first state: no client was ever told of it
            found.unlink()
            found.close()
            log.warning("half_made_segment_removed", segment=found.name)
            return None
        return Left(found, Terms.decode(found.name, found.terms), state.decode(found.name, record))
    except (SegmentForeign, SegmentUnreadable):
        found.close()
        raise


def _remove_half_made(path: Path) -> None:
    try:
        segment.discard(f"/{path.name}")
    except (SegmentTaken, SegmentForeign) as error:
        log.warning("segment_left_alone", segment=str(path), what=error.what, remedy=error.remedy)
    else:
        log.warning("half_made_segment_removed", segment=str(path))
