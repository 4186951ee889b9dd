# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Registering the slots with CUDA, so that devices reach them at the link's full speed and wait for nobody.

The daemon keeps the segment in physical memory, but page-locking for DMA is per process: every trainer rank and
worker registers its own mapping. Large registrations fail on current drivers, so they are made in chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from stagingd.errors import StagingError

CHUNK_BYTES: Final = 32 * 2**30
"""One registration; those of 512 GiB and more fail."""

Register = Callable[[int, int], str | None]
"""Registers (address, bytes); returns the runtime's name for what went wrong, None when nothing did."""


class RegistrationRefused(StagingError):
    """The CUDA runtime does not register the stage's memory."""

    code = "registration_refused"


@dataclass(frozen=True)
class Span:
    """Host memory: an address and a number of bytes."""

    address: int
    bytes: int


def chunked(span: Span, chunk: int = CHUNK_BYTES) -> Iterator[Span]:
    """Cut a span into parts of a bounded size."""
    for start in range(0, span.bytes, chunk):
        yield Span(span.address + start, min(chunk, span.bytes - start))


def register(span: Span, call: Register, unregister: Callable[[int], object], chunk: int = CHUNK_BYTES) -> list[Span]:
    """Register a span in chunks: all of it, or nothing.

    Args:
        span: what to register.
        call: registers one part.
        unregister: takes one back, by its address.
        chunk: bytes of one part.

    Returns:
        The registered parts.

    Raises:
        RegistrationRefused: the runtime refuses one; those before it have been given back.
    """
    done: list[Span] = []
    for part in chunked(span, chunk):
        problem = call(part.address, part.bytes)
        if problem is not None:
            for one in done:
                unregister(one.address)
            raise RegistrationRefused(
                f"cudaHostRegister refused {part.bytes / 2**30:.2f} of {span.bytes / 2**30:.2f} GiB of the stage's "
                f"memory: {problem}",
                remedy="raise the locked-memory limit of this process (ulimit -l unlimited; LimitMEMLOCK= in a unit; "
                "--ulimit memlock=-1 for a container), and see that the host has memory left to lock",
            )
        done.append(part)
    return done


def released_with(owner: object, memory: object, release: Callable[[], None]) -> Callable[[], None]:
    """Have a registration end with its owner at the latest, and its memory stay mapped until then.

    Memory that is unmapped while it is registered leaves CUDA believing that whatever is mapped there next is still
    registered: copies from there fail as invalid, or bring the bytes of before.

    Args:
        owner: who needs the registration; it may be forgotten without having been closed.
        memory: what keeps the memory mapped.
        release: takes the registration back; it must not refer to the owner.

    Returns:
        What takes it back at once; a second call does nothing. When the process ends, the driver does it.
    """
    ending = weakref.finalize(owner, _release, release, memory)
    ending.atexit = False
    return ending


def _release(release: Callable[[], None], memory: object) -> None:
    del memory  # it was kept until now
    release()
