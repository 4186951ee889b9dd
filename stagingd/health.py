# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The numeric health of a stage's last versions, layer by layer.

Amax, mean, standard deviation and non-finite values come from the moments that trainers stored; what quantization
costs, from workers that tell it. Pure, and bounded whatever it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stagingd.errors import UnknownTensor
from stagingd.layers import Layers
from stagingd.moments import Moments
from stagingd.record import Name, Record

VERSIONS: Final = 64
"""Versions whose health is remembered."""

REPORTERS: Final = 1024
"""Workers whose errors are added up for one version: so many may read a stage at one time."""

Sum = Annotated[float, Field(ge=0, le=1e300, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class LayerError(Record):
    """What quantization costs in a layer, or in a worker's slice of it: what several workers tell adds up.

    Attributes:
        layer: its name, by ``Layers`` of the stage's catalog.
        values: how many values it has.
        clipped: how many of them lie beyond what their scale represents.
        flushed: how many become zero and were not.
        squared_error: the sum of (dequantized - staged)**2.
        squared_values: the sum of staged**2.
    """

    layer: Name
    values: Count
    clipped: Count
    flushed: Count
    squared_error: Sum
    squared_values: Sum


class LayerHealth(Record):
    """The numeric health of a layer in one version.

    Attributes:
        layer: its name.
        amax: the greatest magnitude of its finite values.
        mean, std: of its finite values; std is that of the population.
        nonfinite: how many of its values are NaN or infinite.
        clipped_share, flushed_share: of its values; None where no worker has told.
        relative_error: the norm of the quantization's error in proportion to that of the values; None likewise.
    """

    layer: str
    amax: float
    mean: float
    std: float
    nonfinite: int
    clipped_share: float | None
    flushed_share: float | None
    relative_error: float | None


@dataclass(frozen=True, eq=False)
class VersionHealth:
    """What is known of one version. Equal is only itself: it never changes, and what is made of it can be kept.

    Attributes:
        version, attempt: which; see ``stagingd.progress``.
        revision: rises whenever anything becomes known, in all versions of a stage together.
        moments: of the layers; None as long as they have not been looked at, or were gone before they could be.
        errors: per layer the sums of ``LayerError`` in their order, float64; None where no worker has told.
        reporters: engines' ranks that have told.
    """

    version: int
    attempt: int
    revision: int
    moments: Moments | None = None
    errors: npt.NDArray[np.float64] | None = None
    reporters: frozenset[tuple[str, int]] = frozenset()

    def layers(self, names: Sequence[str]) -> tuple[LayerHealth, ...]:
        """Layer by layer; empty as long as the moments are not known."""
        if self.moments is None:
            return ()
        found, errors = self.moments, self.errors
        std = standard_deviation(found)
        return tuple(
            LayerHealth(
                layer=name,
                amax=float(found.amax[at]),
                mean=float(found.mean[at]),
                std=float(std[at]),
                nonfinite=int(found.nonfinite[at]),
                **_shares(None if errors is None else errors[at].tolist()),
            )
            for at, name in enumerate(names)
        )


def standard_deviation(moments: Moments) -> npt.NDArray[np.float64]:
    """Of the population, cell by cell; NaN where a trainer has stored what cannot be: an M2 below 0."""
    with np.errstate(invalid="ignore"):
        deviation: npt.NDArray[np.float64] = np.sqrt(moments.variance)
    return deviation


def _shares(sums: Sequence[float] | None) -> dict[str, float | None]:
    if sums is None or not sums[0]:
        return {"clipped_share": None, "flushed_share": None, "relative_error": None}
    values, clipped, flushed, squared_error, squared_values = sums
    relative = (squared_error / squared_values) ** 0.5 if squared_values else 0.0
    return {"clipped_share": clipped / values, "flushed_share": flushed / values, "relative_error": relative}


class Health:
    """The health of the last versions of one stage.

    What is told of a version that is not remembered is forgotten.
    """

    def __init__(self) -> None:
        self._versions: dict[int, VersionHealth] = {}
        self._revision = 0

    @property
    def versions(self) -> tuple[VersionHealth, ...]:
        """Oldest first."""
        return tuple(self._versions.values())

    def sealed(self, version: int, attempt: int) -> None:
        """There is a new version, of which nothing is known."""
        self._put(VersionHealth(version, attempt, 0))
        while len(self._versions) > VERSIONS:
            del self._versions[next(iter(self._versions))]

    def examined(self, version: int, attempt: int, moments: Moments) -> None:
        """The moments of a version's layers were looked at."""
        known = self._versions.get(version)
        if known is not None and known.attempt == attempt:
            self._put(replace(known, moments=moments))

    def reported(self, layers: Layers, version: int, engine: str, rank: int, errors: Sequence[LayerError]) -> None:
        """A worker tells what quantization costs in its slice. What it told first of a version stands.

        Raises:
            UnknownTensor: the stage has no such layer; nothing was changed.
        """
        numbers = {name: number for number, name in enumerate(layers.names)}
        for error in errors:
            if error.layer not in numbers:
                raise UnknownTensor(
                    f"engine {engine!r} rank {rank} reports an error of layer {error.layer!r}, which the stage has not",
                    remedy="install the same version of stagingd on both sides",
                    tensor=error.layer,
                )
        known = self._versions.get(version)
        if not errors or known is None or (engine, rank) in known.reporters or len(known.reporters) >= REPORTERS:
            return
        sums = np.zeros((len(layers.names), 5)) if known.errors is None else known.errors.copy()
        for error in errors:
            sums[numbers[error.layer]] += (
                error.values,
                error.clipped,
                error.flushed,
                error.squared_error,
                error.squared_values,
            )
        self._put(replace(known, errors=sums, reporters=known.reporters | {(engine, rank)}))

    def _put(self, one: VersionHealth) -> None:
        self._revision += 1
        self._versions[one.version] = replace(one, revision=self._revision)
