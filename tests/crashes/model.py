# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A tiny model on two trainer ranks: every version has random bytes of its own, so that what is read can be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from stagingd_client import LocalShard, Publication, Stage
from stagingd_vllm.reader import Lease

from crashes.points import Moment
from stagingd.moments import Grid

Passage = Callable[[str, Moment], None]
"""Called when a tensor is not yet, half, or wholly read."""


def full(version: int) -> dict[str, torch.Tensor]:
    """All tensors as they are staged: one cut by rows, one by columns, and one that has no moments."""
    generator = torch.Generator().manual_seed(version)
    return {
        "rows": torch.randn(16, 8, generator=generator).bfloat16(),
        "columns": torch.randn(8, 16, generator=generator).bfloat16(),
        "counts": torch.randint(0, 1 << 40, (10,), generator=generator),
    }


def shards(version: int, rank: int, ranks: int = 2) -> dict[str, LocalShard]:
    """What a trainer rank holds."""
    return {name: _shard(tensor, rank, ranks, dim=int(name == "columns")) for name, tensor in full(version).items()}


def _shard(tensor: torch.Tensor, rank: int, ranks: int, dim: int) -> LocalShard:
    part = tensor.tensor_split(ranks, dim)[rank].contiguous()
    offset = [0] * tensor.ndim
    offset[dim] = rank * part.shape[dim]
    return LocalShard(part, tuple(tensor.shape), tuple(offset))


def fill(stage: Stage, version: int) -> None:
    """Begin a version and put all that the rank holds; it is copied in the background."""
    stage.begin(version)
    for name, shard in shards(version, stage.rank, stage.ranks).items():
        stage.put(name, shard)


def publish(version: int, *stages: Stage) -> None:
    """A whole version by all ranks."""
    publications: list[Publication] = []
    for stage in stages:
        fill(stage, version)
        publications.append(stage.commit())
    for publication in publications:
        publication.wait()


def read(lease: Lease, passage: Passage = lambda *_: None) -> dict[str, torch.Tensor]:
    """Copies of all tensors, read in two halves each."""
    return {name: _read(lease.read(name), name, passage) for name in full(0)}


def _read(view: torch.Tensor, name: str, passage: Passage) -> torch.Tensor:
    copy, half = torch.empty_like(view), len(view) // 2
    passage(name, Moment.BEFORE)
    copy[:half] = view[:half]
    passage(name, Moment.DURING)
    copy[half:] = view[half:]
    passage(name, Moment.AFTER)
    return copy


def differences(lease: Lease, passage: Passage = lambda *_: None) -> Iterator[str]:
    """Every tensor under a lease that is not, byte for byte, what was committed for its version."""
    committed = full(lease.version)
    for name, got in read(lease, passage).items():
        if not torch.equal(got.view(torch.uint8), committed[name].view(torch.uint8)):
            yield f"{name} of version {lease.version}"
        if (
            got.is_floating_point()
            and lease.moments(name, Grid.TENSOR).amax.item() != committed[name].abs().max().item()
        ):
            yield f"moments of {name} of version {lease.version}"


def check(lease: Lease, passage: Passage = lambda *_: None) -> int:
    """Assert that the bytes are those of the lease's version, and return it."""
    wrong = list(differences(lease, passage))
    assert not wrong
    return lease.version
