# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Every way in which trainers lay parameters out, on 2 to 64 ranks: the boxes that the ranks own, put together, are
the full tensors, bit for bit.

One process is each rank in turn, in groups that send nothing. The placements are torch's own: its FSDP2, tensor
parallel plans and ``distribute_tensor`` make the shards.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from stagingd_client.modules import Modules
from stagingd_client.placement import Held, LocalShard, held
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from stagingd.boxes import Shape, relative
from stagingd.catalog import Catalog, TensorDeclaration, build
from stagingd.errors import WrongShape
from stagingd.moments import Grid

Shards = Mapping[str, torch.Tensor | LocalShard]


@functools.cache
def full(name: str, shape: Shape) -> torch.Tensor:
    """The whole tensor of this name: the same on every rank, and another one for every name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@dataclass(frozen=True)
class Seat:
    """One rank's view of a mesh whose axes have names."""

    rank: int
    axes: Mapping[str, int]

    @functools.cached_property
    def _mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", tuple(self.axes.values()), mesh_dim_names=tuple(map(self._axis, self.axes)))

    def _axis(self, name: str) -> str:
        # Torch keeps what it has worked out per mesh, and takes meshes for the same whatever the rank: elsewhere
        # a process is one rank only. Here the names keep them apart.
        return f"{name}_of_rank_{self.rank}"

    def mesh(self, *names: str) -> DeviceMesh:
        """The mesh of these axes; all of them by default."""
        return self._mesh[tuple(map(self._axis, names))] if names else self._mesh

    def at(self, name: str) -> int:
        """This rank's place on an axis."""
        return self._mesh.get_local_rank(self._axis(name))


def linear(name: str, rows: int, columns: int) -> nn.Linear:
    """A linear layer whose weight is the full tensor ``name``.weight."""
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(full(f"{name}.weight", (rows, columns)))
    return layer


class Model(nn.Module):
    """Layers by name; nothing is ever computed with them."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Experts(nn.Module):
    """Grouped experts: E experts of hidden size F and model size D."""

    def __init__(self, experts: int, hidden: int, model: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(full("w1", (experts, hidden, model)))
        self.w2 = nn.Parameter(full("w2", (experts, model, hidden)))

    def spread(self, mesh: DeviceMesh, **placements: Placement) -> Experts:
        """Spread the parameters over a mesh of one axis."""
        for name, placement in placements.items():
            whole = self.get_parameter(name).detach()
            self.register_parameter(name, nn.Parameter(cut(whole, mesh, placement)))
        return self


def cut(whole: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    """This rank's part, cut here: the group cannot scatter."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def parameters(module: nn.Module) -> Shards:
    return dict(Modules(module).tensors())


def fsdp(seat: Seat) -> Shards:
    module = Model(even=linear("even", 128, 6), uneven=linear("uneven", 71, 3), few=linear("few", 3, 5))
    module.register_parameter("vector", nn.Parameter(full("vector", (67,))))
    module.register_buffer("bias", full("bias", (5,)))
    fully_shard(module, mesh=seat.mesh())
    return parameters(module)


def dense(seat: Seat) -> Shards:
    """A block under tensor parallelism, and fully sharded over the other axes."""
    norm = nn.LayerNorm(67)
    norm.weight, norm.bias = (nn.Parameter(full(f"norm.{name}", (67,))) for name in ("weight", "bias"))
    block = Model(column=linear("column", 128, 6), row=linear("row", 71, 64), norm=norm)
    plan = {"column": ColwiseParallel(), "row": RowwiseParallel(), "norm": SequenceParallel()}
    parallelize_module(block, seat.mesh("tp"), plan, src_data_rank=None)
    others = [axis for axis in seat.axes if axis != "tp"]
    if others:
        fully_shard(block, mesh=seat.mesh(*others))
    return parameters(block)


def experts_over_ranks(seat: Seat) -> Shards:
    module = Experts(64, 3, 5).spread(seat.mesh("ep"), w1=Shard(0), w2=Shard(0))
    fully_shard(module, mesh=seat.mesh(*(axis for axis in seat.axes if axis != "ep")))
    return parameters(module)


def few_experts_over_ranks(seat: Seat) -> Shards:
    """More ranks than experts: FSDP takes the second dim, which must then be even."""
    module = Experts(8, 16, 32).spread(seat.mesh("ep"), w1=Shard(0), w2=Shard(0))
    fully_shard(module, mesh=seat.mesh("efsdp"), shard_placement_fn=lambda _: Shard(1))
    return parameters(module)


def experts_under_tp(seat: Seat) -> Shards:
    module = Experts(7, 16, 8).spread(seat.mesh("tp"), w1=Shard(1), w2=Shard(2))
    fully_shard(module, mesh=seat.mesh("fsdp"))
    return parameters(module)


def stages_of_a_pipeline(seat: Seat) -> Shards:
    """Each stage has layers of its own, by the numbers that they have in the whole model."""
    numbers = range(2 * seat.at("pp"), 2 * seat.at("pp") + 2)
    module = Model(**{f"layer{number}": linear(f"layer{number}", 37, 4) for number in numbers})
    fully_shard(module, mesh=seat.mesh("fsdp"))
    return parameters(module)


def replicated(seat: Seat) -> Shards:
    wide = cut(full("wide", (1024, 1024)), seat.mesh(), *[Replicate()] * len(seat.axes))
    small = cut(full("small", (5,)), seat.mesh(), *[Replicate()] * len(seat.axes))
    return {"wide": wide, "small": small, "scalar": cut(full("scalar", ()), seat.mesh(), *[Replicate()])}


def plain(seat: Seat) -> Shards:
    return {"plain": full("plain", (1024, 1024)), "scalar": full("scalar", ())}


def explicit(seat: Seat) -> Shards:
    """Columns as another trainer might deal them out: views of its own tensor, unequal, some ranks without any."""
    whole, ranks = full("columns", (9, 131)), math.prod(seat.axes.values())
    start, stop = (index * index * 131 // ranks**2 for index in (seat.rank, seat.rank + 1))
    return {"columns": LocalShard(whole[:, start:stop], (9, 131), (0, start))}


@dataclass(frozen=True)
class Layout:
    """Shards on a mesh, and the placements that torch should have given them, so that no test is about another layout
    than it says."""

    shards: Callable[[Seat], Shards]
    axes: Mapping[str, int]
    placements: Mapping[str, tuple[Placement, ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return math.prod(self.axes.values())

    def __str__(self) -> str:
        return f"{self.shards.__name__}-{'x'.join(f'{axis}{size}' for axis, size in self.axes.items())}"


def strided(factor: int) -> Placement:
    return _StridedShard(0, split_factor=factor)


LAYOUTS = [
    *(Layout(fsdp, {"fsdp": n}, {"uneven.weight": (Shard(0),), "vector": (Shard(0),)}) for n in (2, 3, 8, 64)),
    Layout(fsdp, {"replica": 2, "fsdp": 4}, {"uneven.weight": (Replicate(), Shard(0))}),
    Layout(fsdp, {"replica": 8, "fsdp": 8}, {"uneven.weight": (Replicate(), Shard(0))}),
    Layout(dense, {"tp": 2}, {"column.weight": (Shard(0),), "row.weight": (Shard(1),), "norm.bias": (Replicate(),)}),
    *(
        Layout(
            dense,
            {"fsdp": fsdp, "tp": tp},
            {
                "column.weight": (strided(tp), Shard(0)),
                "row.weight": (Shard(0), Shard(1)),
                "norm.weight": (Shard(0), Replicate()),
            },
        )
        for fsdp, tp in ((4, 2), (2, 4), (8, 8), (16, 4))
    ),
    Layout(
        dense,
        {"replica": 2, "fsdp": 8, "tp": 4},
        {"column.weight": (Replicate(), strided(4), Shard(0)), "norm.bias": (Replicate(), Shard(0), Replicate())},
    ),
    *(
        Layout(experts_over_ranks, {"efsdp": efsdp, "ep": ep}, {"w2": (strided(ep), Shard(0))})
        for efsdp, ep in ((2, 4), (8, 8), (2, 32))
    ),
    Layout(experts_over_ranks, {"replica": 2, "efsdp": 2, "ep": 2}, {"w1": (Replicate(), strided(2), Shard(0))}),
    Layout(few_experts_over_ranks, {"efsdp": 2, "ep": 4}, {"w1": (Shard(1), Shard(0))}),
    Layout(few_experts_over_ranks, {"efsdp": 8, "ep": 8}, {"w2": (Shard(1), Shard(0))}),
    *(
        Layout(experts_under_tp, {"fsdp": fsdp, "tp": tp}, {"w1": (Shard(0), Shard(1)), "w2": (Shard(0), Shard(2))})
        for fsdp, tp in ((4, 2), (8, 8))
    ),
    Layout(stages_of_a_pipeline, {"pp": 2, "fsdp": 4}),
    Layout(stages_of_a_pipeline, {"pp": 16, "fsdp": 4}),
    Layout(replicated, {"replica": 2}, {"wide": (Replicate(),)}),
    Layout(replicated, {"replica": 8}, {"wide": (Replicate(),)}),
    *(Layout(shards, {"ranks": ranks}) for shards in (plain, explicit) for ranks in (2, 8, 64)),
]


@functools.cache
def held_by_each_rank(ranks: int) -> dict[str, list[dict[str, Held | None]]]:
    """What each rank of so many holds in every layout of that size: the ranks are gone through once for all."""
    found: dict[str, list[dict[str, Held | None]]] = {}
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            for layout in (layout for layout in LAYOUTS if layout.ranks == ranks):
                shards = layout.shards(Seat(rank, layout.axes))
                for name in layout.placements.keys() & shards.keys():
                    assert shards[name].placements == layout.placements[name]  # type: ignore[union-attr]
                parts = {name: held(name, shard) for name, shard in shards.items()}
                found.setdefault(str(layout), []).append(parts)
        finally:
            dist.destroy_process_group()
    return found


def catalog_of(parts: Iterable[Mapping[str, Held | None]]) -> Catalog:
    declarations = [
        [
            TensorDeclaration(name=name, dtype="float32", shape=part.global_shape, boxes=(part.box,))
            for name, part in rank.items()
            if part is not None
        ]
        for rank in parts
    ]
    return build("policy", declarations, (Grid.TENSOR,))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_the_ranks_own_put_together_is_the_full_tensor(layout: Layout) -> None:
    parts = held_by_each_rank(layout.ranks)[str(layout)]
    assert len(parts) == layout.ranks
    catalog = catalog_of(parts)
    assert {tensor.name for tensor in catalog.tensors} == {name for rank in parts for name in rank}
    assert layout.placements.keys() <= {tensor.name for tensor in catalog.tensors}
    for tensor in catalog.tensors:
        staged = torch.full(tensor.shape, math.nan)
        for owned in catalog.owned_of(tensor.name):
            part = parts[owned.rank][tensor.name]
            assert part is not None
            staged[owned.box.slices] = part.values[relative(owned.box, part.box).slices]
        assert torch.equal(staged, full(tensor.name, tensor.shape))


def as_rank(rank: int, ranks: int, act: Callable[[], object]) -> object:
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        return act()
    finally:
        dist.destroy_process_group()


def column(seat: Seat, rows: int) -> DTensor:
    """The weight of a layer that is cut by rows twice: by tensor parallelism, then by FSDP."""
    module = nn.Sequential(linear("0", rows, 4))
    parallelize_module(module, seat.mesh("tp"), {"0": ColwiseParallel()}, src_data_rank=None)
    fully_shard(module, mesh=seat.mesh("fsdp"))
    weight = module[0].weight
    assert isinstance(weight, DTensor)
    assert weight.placements == (strided(seat.axes["tp"]), Shard(0))
    return weight


@pytest.mark.parametrize(("fsdp", "tp"), [(2, 2), (3, 2), (4, 2), (4, 4)])
def test_strided_shards_are_refused_when_uneven_and_only_then(fsdp: int, tp: int) -> None:
    ranks = fsdp * tp
    for rank in range(ranks):
        seat = Seat(rank, {"fsdp": fsdp, "tp": tp})

        def check(seat: Seat = seat) -> None:
            for rows in range(1, 2 * ranks + 1):
                weight = column(seat, rows)
                if rows % ranks == 0:
                    part = held("w", weight)
                    assert part is not None
                    assert torch.equal(part.values, full("0.weight", (rows, 4))[part.box.slices])
                else:
                    with pytest.raises(WrongShape, match=rf"'w' has {rows} elements in dim 0.* over {ranks} ranks"):
                        held("w", weight)

        as_rank(rank, ranks, check)


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_that_are_not_yet_reduced_are_refused(axis: int) -> None:
    def check() -> None:
        seat = Seat(3, {"fsdp": 4, "tp": 2})
        placements: list[Placement] = [Shard(0), Shard(0)]
        placements[axis] = Partial()
        with pytest.raises(WrongShape, match=f"'w' is Partial on mesh axis {axis}"):
            held("w", DTensor.from_local(torch.zeros(2, 4), seat.mesh(), placements))

    as_rank(3, 8, check)
