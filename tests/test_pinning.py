# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Registering memory in chunks, with a runtime that does as it is told."""

from __future__ import annotations

import mmap
import weakref
from dataclasses import dataclass, field

import pytest

from stagingd.pinning import RegistrationRefused, Span, register, released_with


@dataclass
class Runtime:
    """Registers so many bytes, then refuses."""

    limit: int
    registered: dict[int, int] = field(default_factory=dict)

    def register(self, address: int, size: int) -> str | None:
        if sum(self.registered.values()) + size > self.limit:
            return "cudaErrorMemoryAllocation"
        self.registered[address] = size
        return None

    def unregister(self, address: int) -> None:
        del self.registered[address]


def test_memory_is_registered_in_chunks_that_together_are_all_of_it() -> None:
    runtime = Runtime(limit=10_000)
    parts = register(Span(4096, 1000), runtime.register, runtime.unregister, chunk=300)
    assert parts == [Span(4096, 300), Span(4396, 300), Span(4696, 300), Span(4996, 100)]
    assert runtime.registered == {part.address: part.bytes for part in parts}


def test_what_is_refused_is_given_back_whole_and_the_error_says_what_to_change() -> None:
    runtime = Runtime(limit=700)
    says = r"cudaErrorMemoryAllocation.*ulimit -l unlimited.*LimitMEMLOCK.*memlock=-1"
    with pytest.raises(RegistrationRefused, match=says):
        register(Span(0, 1000), runtime.register, runtime.unregister, chunk=300)
    assert runtime.registered == {}


class Owner:
    """Needs a registration."""


def test_an_owner_that_is_forgotten_takes_its_registration_along_before_the_memory_is_unmapped() -> None:
    owner, mapping = Owner(), mmap.mmap(-1, 4096)
    mapped = weakref.ref(mapping)
    there: list[bool] = []
    released_with(owner, memoryview(mapping), lambda: there.append(mapped() is not None))
    del mapping
    assert mapped() is not None
    del owner
    assert there == [True]
    assert mapped() is None


def test_a_registration_is_taken_back_once() -> None:
    owner, taken = Owner(), list[str]()
    release = released_with(owner, None, lambda: taken.append("back"))
    release()
    release()
    del owner
    assert taken == ["back"]
