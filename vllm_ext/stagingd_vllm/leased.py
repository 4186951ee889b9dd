# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A leased version, as those who write it to live weights see it: a ``Reader``'s lease is one."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch

from stagingd.moments import StoredMoments
from stagingd.progress import Needs


class LeasedVersion(Protocol):
    """A version that cannot change while it is read. Leaving its context releases it, and fails when it was lost.

    One that was leased early is still being filled: what is read has to be waited for before.
    """

    version: int

    @property
    def early(self) -> bool:
        """Whether it was still being filled when it was leased."""

    def await_moments(self) -> None:
        """Wait until all moments of what trainers quantize are there; of a stage whose trainers do."""

    def await_boxes(self, needs: Needs) -> None:
        """Wait until some boxes, and their moments, are there."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None, /
    ) -> None: ...

    @property
    def slot(self) -> torch.Tensor:
        """The bytes of its slot, uint8."""

    @property
    def stored(self) -> StoredMoments:
        """Its moments."""
