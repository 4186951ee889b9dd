# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's place among all workers of its engine, by vLLM's process groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_pcp_group, get_pp_group, get_tp_group

from stagingd_vllm.outcomes import Group as Voters
from stagingd_vllm.versions import EngineNotSupported


class Group(Protocol):
    """The part of vLLM's process groups that tells a worker's place."""

    rank_in_group: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's rank among all workers of one engine, and their number.

    A data-parallel replica is an engine of its own: it takes requests, and changes versions, by itself.
    """

    engine: str
    rank: int
    ranks: int

    @classmethod
    def within(cls, engine: str, replica: int, replicas: int, groups: tuple[Group, ...]) -> Place:
        """The place by groups, the slowest varying first, of one of several data-parallel replicas.

        The first replica of a model that vLLM runs as separate engines cannot be told from an engine without any
        replicas: it keeps the bare name.
        """
        rank, ranks = 0, 1
        for group in groups:
            rank, ranks = rank * group.world_size + group.rank_in_group, ranks * group.world_size
        return cls(f"{engine}-dp{replica}" if replica or replicas > 1 else engine, rank, ranks)

    @classmethod
    def of_worker(cls, engine: str, parallel: ParallelConfig) -> Place:
        """The place of the worker that this process is.

        Expert parallelism spreads experts over the same workers, so it adds no ranks.

        Raises:
            EngineNotSupported: the groups are not those of the configured sizes, or experts move between workers.
        """
        if getattr(parallel, "enable_eplb", False):
            raise EngineNotSupported(
                "the engine moves experts between its workers while it runs (enable_eplb)",
                remedy="start it without: which experts a worker holds has to stay as it is",
            )
        groups = (get_pp_group(), get_pcp_group(), get_tp_group())
        place = cls.within(engine, parallel.data_parallel_index, parallel.data_parallel_size, groups)
        if place.ranks != parallel.world_size:
            raise EngineNotSupported(
                f"the engine has {parallel.world_size} workers per replica, and its pipeline and tensor groups "
                f"count {place.ranks}",
                remedy="use tensor, pipeline, expert and data parallelism alone",
            )
        return place


def groups_of(parallel: ParallelConfig) -> Sequence[Voters]:
    """The groups of this worker whose product is the engine; none for an engine of one worker."""
    return () if parallel.world_size == 1 else (get_tp_group(), get_pcp_group(), get_pp_group())
