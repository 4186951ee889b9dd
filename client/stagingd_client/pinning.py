# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Registering the slots with CUDA, so that copies to them run at the link's full speed and wait for nobody.

The daemon keeps the segment in physical memory, but page-locking for DMA is per process: every trainer rank
registers its own mapping. Large registrations fail on current drivers, so they are made in chunks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

CHUNK_BYTES: Final = 32 * 2**30
"""One registration; those of 512 GiB and more fail."""

Register = Callable[[int, int], str | None]
"""Registers (address, bytes); returns the runtime's name for what went wrong, None when nothing did."""


class SlowerPath(UserWarning):
    """Something still works, at a lower speed; the message says why, and what to do."""


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
        The registered parts; none, after a warning that says what to change, when the runtime refuses one.
    """
    done: list[Span] = []
    for part in chunked(span, chunk):
        problem = call(part.address, part.bytes)
        if problem is not None:
            for one in done:
                unregister(one.address)
            warnings.warn(SlowerPath(_hint(span, part, problem)), stacklevel=2)
            return []
        done.append(part)
    return done


def _hint(span: Span, part: Span, problem: str) -> str:
    return (
        f"cudaHostRegister refused {part.bytes / 2**30:.2f} of {span.bytes / 2**30:.2f} GiB of the stage's memory: "
        f"{problem}. Versions are flushed without it, at a fraction of the link's speed, and fence waits for the "
        "copies. Raise the locked-memory limit of this process (ulimit -l unlimited; LimitMEMLOCK= in a unit; "
        "--ulimit memlock=-1 for a container), and see that the host has memory left to lock"
    )
