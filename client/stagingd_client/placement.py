# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""From a trainer's tensor to boxes: what part of the global tensor does this rank hold?"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from stagingd.boxes import Box, fits
from stagingd.errors import BoxOutside, WrongShape


@dataclass(frozen=True)
class LocalShard:
    """A plain tensor as part of a global one.

    Attributes:
        tensor: the elements, of any strides, on any device.
        global_shape: shape of the tensor that it is part of; its own by default.
        offset: where in the global tensor its first element is; the origin by default.
    """

    tensor: torch.Tensor
    global_shape: tuple[int, ...] | None = None
    offset: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Held:
    """What this rank holds of a tensor.

    Attributes:
        global_shape: that of the whole tensor.
        box: which part of it.
        values: its elements: in row-major order they are those of the box. The shape is the box's, or a
            finer one: rows in another order are a view with more dims, which costs nothing.
    """

    global_shape: tuple[int, ...]
    box: Box
    values: torch.Tensor


def held(name: str, shard: torch.Tensor | LocalShard) -> Held | None:
    """Find the box of a shard.

    Args:
        name: the tensor's name, for messages.
        shard: a DTensor, whose placements say what it is; a plain tensor, which is the whole; or a LocalShard.

    Returns:
        The box and the local elements, or None where this rank holds none of the tensor.

    Raises:
        WrongShape: the placements are such that the elements' place is not known.
        BoxOutside: the shard does not lie inside its global shape.
    """
    if isinstance(shard, LocalShard):
        return _explicit(name, shard)
    if isinstance(shard, DTensor):
        return _distributed(name, shard)
    return _explicit(name, LocalShard(shard))


def _explicit(name: str, shard: LocalShard) -> Held | None:
    values = shard.tensor.detach()
    shape = tuple(shard.global_shape if shard.global_shape is not None else values.shape)
    offset = tuple(shard.offset if shard.offset is not None else (0,) * len(shape))
    if len(shape) != values.dim() or len(offset) != len(shape):
        raise WrongShape(
            f"the shard of tensor {name!r} has {values.dim()} dims, its global shape {shape} {len(shape)} "
            f"and its offset {offset} {len(offset)}",
            remedy="give shard, global_shape and offset the same number of dims",
            tensor=name,
        )
    box = Box(offset, tuple(values.shape))
    if not fits(box, shape):
        raise BoxOutside(
            f"box {box} of tensor {name!r} does not lie in its global shape {shape}",
            remedy="check global_shape and offset",
            tensor=name,
            box=box,
        )
    return Held(shape, box, values) if box.volume else None


def _distributed(name: str, tensor: DTensor) -> Held | None:
    shape = tuple(tensor.shape)
    _check_placements(name, tensor)
    with torch.no_grad():
        values = tensor.to_local().detach()  # of a tensor that is no Parameter it may ask for gradients itself
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or not values.numel():
        return None
    box = _box(shape, tensor.device_mesh, tuple(coordinate), tensor.placements)
    if box.lengths != tuple(values.shape) or not fits(box, shape):
        raise WrongShape(
            f"torch places the local shard of tensor {name!r}, of shape {tuple(values.shape)}, at box {box}",
            remedy="pass the shard as a LocalShard with its true global_shape and offset",
            tensor=name,
            box=box,
        )
    return Held(shape, box, values)


@functools.lru_cache(maxsize=1 << 16)
def _box(
    shape: tuple[int, ...],
    mesh: DeviceMesh,
    coordinate: tuple[int, ...],  # noqa: ARG001 - meshes are equal on all ranks; this says which rank it is
    placements: tuple[Placement, ...],
) -> Box:
    """The box of this rank's local shard. Torch needs a quarter of a millisecond to say so, and it never changes."""
    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Box(tuple(offsets), tuple(lengths))


def _check_placements(name: str, tensor: DTensor) -> None:
    """Refuse the placements for which torch's answer is not the truth."""
    split: dict[int, int] = {}
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Partial):
            raise WrongShape(
                f"tensor {name!r} is Partial on mesh axis {axis}: no rank holds its values",
                remedy="reduce it before it is staged",
                tensor=name,
            )
        dim = getattr(placement, "dim", None)
        if dim is not None:
            split[dim] = split.get(dim, 1) * tensor.device_mesh.size(axis)
    for placement in tensor.placements:
        if isinstance(placement, _StridedShard) and tensor.shape[placement.dim] % split[placement.dim]:
            # torch 2.11 to 2.14 report wrong offsets for some of these; for even ones never.
            raise WrongShape(
                f"tensor {name!r} has {tensor.shape[placement.dim]} elements in dim {placement.dim}, sharded "
                f"with strides over {split[placement.dim]} ranks, which does not divide evenly",
                remedy="pad the dim, or pass LocalShards with their true global_shape and offset",
                tensor=name,
            )
