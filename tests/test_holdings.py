# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where a shard that is put belongs: found once, and again for whatever differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from stagingd_client import LocalShard, holdings
from stagingd_client.holdings import Holdings
from stagingd_client.naming import SameNames
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from stagingd.boxes import Box
from stagingd.catalog import Catalog, build
from stagingd.errors import WrongShape
from stagingd.moments import ALL_GRIDS

SHAPE = (8, 4)


@pytest.fixture
def gloo() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def halves(tensor: torch.Tensor) -> list[LocalShard]:
    """One tensor's elements, as both halves of a larger one."""
    return [LocalShard(tensor, SHAPE, (row, 0)) for row in (0, 4)]


def made(tensor: torch.Tensor) -> tuple[Holdings, Catalog]:
    held = Holdings(0, SameNames(), {"w": halves(tensor), "plain": tensor})
    return held, build("policy", [held.declarations(torch.bfloat16, frozenset())], ALL_GRIDS)


def test_one_tensor_put_as_two_parts_and_as_a_whole_is_placed_as_each() -> None:
    tensor = torch.randn(4, 4)
    held, catalog = made(tensor)
    for _ in range(2):
        for first, shard in zip((0, 4), halves(tensor), strict=True):
            put = held.place(catalog, "w", shard)
            assert put is not None
            assert put.holding.box == Box((first, 0), (4, 4))
        put = held.place(catalog, "plain", tensor)
        assert put is not None
        assert put.holding.box == Box((0, 0), (4, 4))
    with pytest.raises(WrongShape):
        held.place(catalog, "w", tensor)


def test_what_is_put_asks_for_no_gradients_though_a_dtensors_local_tensor_does(gloo: DeviceMesh) -> None:
    tensor = DTensor.from_local(torch.randn(4, 4, requires_grad=True), gloo, [Shard(0)])
    held = Holdings(0, SameNames(), {"w": tensor})
    catalog = build("policy", [held.declarations(torch.bfloat16, frozenset())], ALL_GRIDS)
    for _ in range(2):
        put = held.place(catalog, "w", tensor)
        assert put is not None
        assert not put.shard.requires_grad
        assert put.shard.data_ptr() == tensor.to_local().data_ptr()


@pytest.mark.parametrize("part", [True, False])
def test_a_shard_that_is_put_again_is_not_looked_for_again(part: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(4, 4)
    held, catalog = made(tensor)

    def place(given: torch.Tensor) -> Box:
        put = (
            held.place(catalog, "w", LocalShard(given, SHAPE, (4, 0))) if part else held.place(catalog, "plain", given)
        )
        assert put is not None
        assert put.shard.data_ptr() == given.data_ptr()
        return put.holding.box

    first = place(tensor)
    monkeypatch.setattr(holdings, "held", None)
    assert place(tensor) == first
    with pytest.raises(TypeError):
        place(tensor.clone())
