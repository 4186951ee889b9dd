# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Looking at the moments of sealed versions in the background, so that the event loop never waits for it.

Nothing keeps a slot from being filled anew meanwhile. The daemon begins an attempt in the slot's progress before it
lets any trainer write: what was looked at counts only if the slot still holds the same attempt afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog

from stagingd.catalog import Catalog, OwnedBox
from stagingd.hosted import HostedStage
from stagingd.layers import Layers
from stagingd.moments import Grid, Moments, StoredMoments, elements_per_cell, merge_groups
from stagingd.progress import Progress

log = structlog.get_logger()


class LayerMoments:
    """Merges the moments of a slot into those of its layers: where they lie is the same for every version.

    Args:
        catalog: the stage's. The coarsest grid that it keeps is looked at: all of them tell of the same values.
        layers: its layers.
    """

    def __init__(self, catalog: Catalog, layers: Layers) -> None:
        grid = Grid.TENSOR if Grid.TENSOR in catalog.grids else catalog.grids[0]
        boxes = [owned for owned in catalog.owned if catalog.tensors[owned.tensor].has_moments]
        counts = [self._elements(catalog, grid, owned) for owned in boxes]
        sizes = [len(some) for some in counts]
        first = np.repeat([catalog.first_cell(owned, grid) for owned in boxes], sizes).astype(np.int64)
        within = np.arange(len(first)) - np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        of = [layers.of[catalog.tensors[owned.tensor].name] for owned in boxes]
        self._cells = first + within
        self._elements_of = np.concatenate(counts) if counts else np.zeros(0, np.int64)
        self._layer = np.repeat(of, sizes).astype(np.int64)
        self._layers = len(layers.names)

    @staticmethod
    def _elements(catalog: Catalog, grid: Grid, owned: OwnedBox) -> npt.NDArray[np.int64]:
        return elements_per_cell(grid, catalog.tensors[owned.tensor].shape, owned.box).ravel()

    def of(self, stored: StoredMoments) -> Moments:
        """The moments of the layers, in their order."""
        # M2 of great values is infinite, since it is stored as fp32; and what trainers store may be anything at all.
        with np.errstate(over="ignore", invalid="ignore"):
            nonfinite = stored.nonfinite[self._cells].astype(np.int64)  # copies: what follows is rewritten by nobody
            found = Moments(
                self._elements_of - nonfinite,
                stored.mean[self._cells].astype(np.float64),
                stored.m2[self._cells].astype(np.float64),
                stored.amax[self._cells],
                nonfinite,
            )
            return merge_groups(found, self._layer, self._layers)


@dataclass(frozen=True)
class Examined:
    """What came of it: ``moments`` are None where the version was gone before they were read."""

    places: LayerMoments
    moments: Moments | None


Submit = Callable[[Callable[[], Examined]], "Future[Examined]"]
"""Has something done in the background; ``Examiner.mind`` is to be called when it is done."""


@dataclass(frozen=True)
class _Looking:
    stage: HostedStage
    version: int
    attempt: int
    outcome: Future[Examined]


class Examiner:
    """Has the newest version of every stage looked at, one at a time; those that come too soon are passed over."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._places: dict[HostedStage, LayerMoments] = {}
        self._looking: dict[HostedStage, _Looking] = {}
        self._seen: dict[HostedStage, int] = {}

    def mind(self, stages: Iterable[HostedStage]) -> None:
        """Take what has been found, and have the next versions looked at. Returns at once."""
        for done in [one for one in self._looking.values() if one.outcome.done()]:
            del self._looking[done.stage]
            self._take(done)
        here = list(stages)
        for stage in here:
            if stage not in self._looking:
                self._look(stage)
        for known in (self._places, self._seen):
            for gone in known.keys() - here:
                known.pop(gone)

    def _take(self, done: _Looking) -> None:
        failure = done.outcome.exception()
        if failure is not None:  # staging goes on, and the page says that the version was not looked at
            log.error("not_examined", stage=done.stage.name, version=done.version, error=repr(failure))
            return
        found = done.outcome.result()
        self._places[done.stage] = found.places
        if found.moments is not None:
            done.stage.health.examined(done.version, done.attempt, found.moments)

    def _look(self, stage: HostedStage) -> None:
        slot = stage.buffer.newest
        if stage.segment is None or slot is None or slot.version is None or self._seen.get(stage) == slot.attempt:
            return
        self._seen[stage] = slot.attempt
        stored, progress = stage.segment.moments(slot.index), stage.segment.progress(slot.index)
        work = _Work(stage.segment.catalog, stage.layers, self._places.get(stage), stored, progress, slot.attempt)
        self._looking[stage] = _Looking(stage, slot.version, slot.attempt, self._submit(work.do))


@dataclass(frozen=True)
class _Work:
    """What the background is given: its views keep the memory mapped until it is done."""

    catalog: Catalog
    layers: Layers
    places: LayerMoments | None
    stored: StoredMoments
    progress: Progress
    attempt: int

    def do(self) -> Examined:
        places = self.places or LayerMoments(self.catalog, self.layers)
        moments = places.of(self.stored)
        return Examined(places, moments if self.progress.holds(self.attempt) else None)
