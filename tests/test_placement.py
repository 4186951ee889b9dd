# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From DTensors to boxes: the boxes of all ranks, assembled, are the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from stagingd_client.modules import Modules
from stagingd_client.placement import Held, LocalShard, held
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stagingd.boxes import overlapping, uncovered
from stagingd.errors import BoxOutside, WrongShape


def each_rank(ranks: int) -> Iterator[int]:
    """This process as each rank in turn of a group that sends nothing."""
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            yield rank
        finally:
            dist.destroy_process_group()


def shard_of(full: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """This rank's part, cut here: the group cannot scatter."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


@pytest.mark.parametrize(
    ("sizes", "placements", "shape"),
    [
        ((4,), [Shard(0)], (16, 6)),
        ((4,), [Shard(0)], (7, 6)),  # the last rank holds one row
        ((4,), [Shard(0)], (5, 6)),  # the last rank holds nothing
        ((3,), [Shard(1)], (4, 10)),
        ((2, 3), [Shard(0), Shard(1)], (7, 10)),
        ((2, 2), [Replicate(), Shard(0)], (9, 4)),
        ((2, 2), [Shard(0), Replicate()], (9,)),
        ((4, 4), [Shard(0), Shard(0)], (35, 3)),
        ((8, 8), [Shard(0), Shard(1)], (100, 100)),
    ],
)
def test_the_boxes_of_all_ranks_are_the_tensor(
    sizes: tuple[int, ...], placements: list[Placement], shape: tuple[int, ...]
) -> None:
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    found: dict[object, Held] = {}
    for _ in each_rank(torch.Size(sizes).numel()):
        mesh = init_device_mesh("cpu", sizes)
        part = held("w", shard_of(full, mesh, placements))
        if part is not None:
            assert torch.equal(part.values, full[part.box.slices])
            assert part.global_shape == shape
            found[part.box] = part
    boxes = list(found)
    assert overlapping(boxes) is None  # type: ignore[arg-type]
    assert uncovered(shape, boxes) is None  # type: ignore[arg-type]


def test_a_partial_tensor_is_refused() -> None:
    for _ in each_rank(2):
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(WrongShape, match="Partial on mesh axis 0"):
            held("w", DTensor.from_local(torch.zeros(4), mesh, [Partial()]))


def test_an_uneven_strided_shard_is_refused_because_torch_reports_it_wrongly() -> None:
    for _ in each_rank(6):
        mesh = init_device_mesh("cpu", (3, 2))
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        tensor = DTensor.from_local(torch.zeros(1, 4), mesh, placements, shape=torch.Size((7, 4)), stride=(4, 1))
        with pytest.raises(WrongShape, match="does not divide evenly"):
            held("w", tensor)


def test_an_explicit_shard_is_where_it_says_it_is() -> None:
    part = held("w", LocalShard(torch.ones(2, 3), (10, 3), (4, 0)))
    assert part is not None
    assert str(part.box) == "[4:6, 0:3]"
    assert held("w", LocalShard(torch.ones(0, 3), (10, 3), (10, 0))) is None
    with pytest.raises(BoxOutside):
        held("w", LocalShard(torch.ones(2, 3), (10, 3), (9, 0)))


def test_names_are_those_of_the_state_dict_and_tied_parameters_come_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(4, 2)
            self.head = torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("kept", torch.zeros(1))
            self.register_buffer("transient", torch.zeros(1), persistent=False)

    found = Modules(Tied())
    assert {name for name, _ in found.tensors()} == {"embed.weight", "kept"}
    assert found.buffers == {"kept"}
    assert found.tied == {"head.weight": "embed.weight"}


def test_tied_names_are_found_across_the_parts_of_a_model_and_without_wrappers() -> None:
    first, last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)
    last.weight = first.weight
    parts = [torch.nn.ModuleDict({"embed": first, "again": first}), torch.nn.ModuleDict({"head": last})]
    parts[1] = torch.nn.ModuleDict({"last": checkpoint_wrapper(parts[1])})
    assert Modules(parts).tied == {
        "again.weight": "embed.weight",
        "again.bias": "embed.bias",
        "last.head.weight": "embed.weight",
    }
    assert Modules(first).tied == {}


def test_tied_parameters_stay_tied_when_they_are_sharded() -> None:
    for _ in each_rank(2):
        model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False))
        model[1].weight = model[0].weight  # type: ignore[assignment]
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        assert isinstance(model[0].weight, DTensor)
        assert Modules(model).tied == {"1.weight": "0.weight"}
