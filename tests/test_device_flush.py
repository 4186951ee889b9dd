# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Flushing from a device whose queues run as late as they may: the slot holds what the host's flush writes."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from devices import LazyDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from stagingd_client import LocalShard, gpu_flush
from stagingd_client.flush import Flusher
from stagingd_client.gpu_flush import DeviceFlusher
from stagingd_client.holdings import Holdings, Put
from stagingd_client.landings import Landings
from stagingd_client.naming import NamedShard, SameNames
from stagingd_client.placement import Held

from stagingd import segment
from stagingd.catalog import Catalog, OwnedBox, build
from stagingd.errors import DeadlineExceeded
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import ALL_GRIDS, Grid

DEADLINE_S = 60.0
SMALL_SCRATCH = 96 * 2**10


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, every NaN the same: torch itself casts them now to one and now to another."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.reshape(-1).view(torch.uint8)


@dataclass
class Staging:
    """A rank with a segment of its own, and nobody else."""

    made: segment.Segment
    holdings: Holdings
    shards: Mapping[str, torch.Tensor | LocalShard]

    @property
    def catalog(self) -> Catalog:
        return self.made.catalog

    @property
    def owned(self) -> dict[str, Sequence[OwnedBox]]:
        return {tensor.name: self.catalog.owned_of(tensor.name) for tensor in self.catalog.tensors}

    def puts(self) -> list[Put]:
        found = [self.holdings.place(self.catalog, name, shard) for name, shard in self.shards.items()]
        return [put for put in found if put is not None]

    def flusher(self, device: LazyDevice, scratch: int = SMALL_SCRATCH) -> DeviceFlusher:
        return DeviceFlusher(self.made, self.owned, device, Landings(self.made, 0), scratch)

    def tensors(self, slot: int) -> dict[str, torch.Tensor]:
        """What stands in a slot, copied."""
        memory = torch.frombuffer(bytearray(self.made.slot(slot)), dtype=torch.uint8)
        return {
            tensor.name: memory[tensor.offset : tensor.offset + tensor.bytes]
            .view(getattr(torch, tensor.dtype))
            .view(tensor.shape)
            for tensor in self.catalog.tensors
        }

    def moments(self, slot: int) -> list[np.ndarray]:
        stored = self.made.moments(slot)
        return [stored.mean.copy(), stored.m2.copy(), stored.amax.copy(), stored.nonfinite.copy()]

    def assert_slots_equal(self) -> None:
        """What the device wrote to slot 1 is what the host wrote to slot 0."""
        host, device = self.tensors(0), self.tensors(1)
        for name, tensor in host.items():
            assert bits(tensor).equal(bits(device[name])), name
        (mean, m2, amax, nonfinite), (mean_1, m2_1, amax_1, nonfinite_1) = self.moments(0), self.moments(1)
        np.testing.assert_array_equal(amax, amax_1)
        np.testing.assert_array_equal(nonfinite, nonfinite_1)
        np.testing.assert_allclose(mean_1, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(m2_1, m2, rtol=1e-5, atol=1e-6)


@contextmanager
def staging(
    shards: Mapping[str, torch.Tensor | LocalShard],
    grids: Sequence[Grid] = ALL_GRIDS,
    names: SameNames | None = None,
    keep: frozenset[str] = frozenset(),
    quantization: Quantization | None = None,
) -> Iterator[Staging]:
    holdings = Holdings(0, names or SameNames(), shards)
    catalog = build("policy", [holdings.declarations(torch.bfloat16, keep)], grids, quantization=quantization)
    made = segment.create(f"/stagingd-test-{uuid.uuid4().hex[:12]}", catalog, lock=False)
    for slot in (0, 1):
        torch.frombuffer(made.slot(slot), dtype=torch.uint8).fill_(0x5A)  # what a version before has left
        for field in (made.moments(slot).mean, made.moments(slot).nonfinite):
            field[:] = 77
    try:
        yield Staging(made, holdings, shards)
    finally:
        made.unlink()
        made.close()


def finish(flusher: DeviceFlusher) -> None:
    flusher.finish(time.monotonic() + DEADLINE_S)


class RotaryNames(SameNames):
    """Rows of tensors whose name begins with "rotary" are interleaved, as Llama's are in TorchTitan."""

    def shards(self, name: str, part: Held) -> tuple[NamedShard, ...]:
        if not name.startswith("rotary"):
            return super().shards(name, part)
        values = part.values.unflatten(0, (-1, 4, 2)).transpose(1, 2)
        return (NamedShard(name, Held(part.global_shape, part.box, values)),)


@st.composite
def any_shards(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    shapes = st.one_of(
        st.tuples(st.integers(1, 300), st.integers(1, 300)),
        st.tuples(st.integers(1, 4), st.integers(1, 140), st.integers(1, 140)),
        st.tuples(st.integers(1, 500)),
        st.just(()),
        st.just((128, 256)),
    )
    shards = {}
    for number in range(draw(st.integers(1, 4))):
        shape = draw(shapes)
        values = torch.randn(shape, generator=generator) * 3 + draw(st.sampled_from([0.0, 1.0, -50.0]))
        if draw(st.booleans()) and values.numel():
            values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf]))
        values = values.to(draw(dtypes))
        if len(shape) == 2 and draw(st.booleans()):
            values = values.t().contiguous().t()  # columns first
        shards[f"w{number}"] = values
    if draw(st.booleans()):
        shards["rotary"] = torch.randn(8 * draw(st.integers(1, 30)), draw(st.integers(1, 200)), generator=generator)
    if draw(st.booleans()):
        shards["counts"] = torch.arange(draw(st.integers(1, 50)))
    return shards


@settings(deadline=None, max_examples=40)
@given(
    shards=any_shards(),
    grids=st.sampled_from([ALL_GRIDS, (Grid.TENSOR,), (Grid.BLOCK, Grid.TENSOR), (Grid.ROW,)]),
    keep=st.sampled_from([frozenset(), frozenset({"w0"})]),
    scratch=st.sampled_from([80 * 2**10, 2**20]),
    seed=st.integers(0, 99),
)
def test_a_device_flush_writes_what_the_hosts_flush_writes(
    shards: dict[str, torch.Tensor], grids: Sequence[Grid], keep: frozenset[str], scratch: int, seed: int
) -> None:
    with staging(shards, grids, RotaryNames(), keep) as rank:
        Flusher(rank.made, rank.owned).flush(0, rank.puts())
        device = LazyDevice(random.Random(seed))
        flusher = rank.flusher(device, scratch)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        finish(flusher)
        rank.assert_slots_equal()


def quantization_of(shards: Mapping[str, torch.Tensor], form: StageFormat, together: bool) -> Quantization | None:
    """All matrices are quantized, all in one group or each in its own; where a scale is a tensor's, no stacks."""
    dims = (2,) if form is StageFormat.FP8_PER_TENSOR else (2, 3)
    names = tuple(name for name, shard in shards.items() if shard.dim() in dims)
    groups = (names,) if together else tuple((name,) for name in names)
    return Quantization(format=form, device="cpu", groups=groups) if names else None


@settings(deadline=None, max_examples=25)
@given(
    shards=any_shards(),
    form=st.sampled_from(list(StageFormat)),
    together=st.booleans(),
    scratch=st.sampled_from([80 * 2**10, 2**20]),
    seed=st.integers(0, 99),
)
def test_a_device_quantizes_as_the_host_does(
    shards: dict[str, torch.Tensor], form: StageFormat, together: bool, scratch: int, seed: int
) -> None:
    quantization = quantization_of(shards, form, together)
    with staging(shards, names=RotaryNames(), quantization=quantization) as rank:
        host, device = Flusher(rank.made, rank.owned), LazyDevice(random.Random(seed))
        host.flush(0, rank.puts())
        host.quantize(0, rank.puts())
        flusher = rank.flusher(device, scratch)
        flusher.prepare(rank.puts())
        for _ in range(2):
            flusher.flush(1, rank.puts(), [device.current().mark()])
            finish(flusher)
            rank.made.moments(1).amax[:] = rank.made.moments(0).amax  # as all ranks have stored them
            if quantization is not None:
                flusher.quantize(1, rank.puts())
                finish(flusher)
            rank.assert_slots_equal()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("order", [{"hurry": "trainer"}, {"linger": "trainer"}])
def test_what_is_quantized_has_the_values_from_before_the_fence(seed: int, order: dict[str, str]) -> None:
    quantization = quantization_of(weights(), StageFormat.FP8_PER_CHANNEL, together=False)
    shards = weights()
    with staging(shards, quantization=quantization) as rank:
        host = Flusher(rank.made, rank.owned)
        host.flush(0, rank.puts())
        host.quantize(0, rank.puts())
        device = LazyDevice(random.Random(seed), **order)
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        finish(flusher)
        read = flusher.quantize(1, rank.puts())
        device.trainer.after(read)
        device.trainer.run(lambda: [shard.zero_() for shard in shards.values()])
        device.finish()
        finish(flusher)
        rank.assert_slots_equal()


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{i}": torch.randn(200, 130 + 64 * i, generator=generator) for i in range(3)}


def test_moments_of_what_is_quantized_are_there_while_the_rest_still_crosses() -> None:
    shards = {"held": torch.randn(2000, 300), "quantized": torch.randn(200, 300)}
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("quantized",),))
    with staging(shards, quantization=quantization) as rank:
        host = Flusher(rank.made, rank.owned)
        host.flush(0, rank.puts())
        host.quantize(0, rank.puts())
        device = LazyDevice(random.Random(0))
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        flusher.finish_measuring(time.monotonic() + DEADLINE_S)
        assert device.copying.ready or device.casting.ready, "all of it was waited for"
        (owned,) = (box for box in rank.catalog.owned if rank.catalog.tensors[box.tensor].name == "quantized")
        cells = slice(owned.first_cell, owned.first_cell + 200)
        np.testing.assert_array_equal(rank.moments(1)[2][cells], rank.moments(0)[2][cells])
        flusher.quantize(1, rank.puts())
        finish(flusher)
        rank.assert_slots_equal()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("hurry", ["trainer", "copying", "casting"])
def test_values_changed_right_after_the_fence_are_staged_as_they_were(seed: int, hurry: str) -> None:
    shards = weights()
    with staging(shards) as rank:
        Flusher(rank.made, rank.owned).flush(0, rank.puts())
        device = LazyDevice(random.Random(seed), hurry=hurry)
        flusher = rank.flusher(device)
        read = flusher.flush(1, rank.puts(), [device.trainer.mark()])
        device.trainer.after(read)  # the fence
        for shard in shards.values():
            device.trainer.run(lambda shard=shard: shard.fill_(123.0))  # type: ignore[misc]
        finish(flusher)
        device.finish()
        rank.assert_slots_equal()
        assert all((shard == 123.0).all() for shard in shards.values())


def test_without_the_fence_the_same_check_finds_new_values() -> None:
    shards = weights()
    with staging(shards) as rank:
        Flusher(rank.made, rank.owned).flush(0, rank.puts())
        device = LazyDevice(random.Random(0), hurry="trainer")
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.trainer.mark()])
        for shard in shards.values():
            device.trainer.run(lambda shard=shard: shard.fill_(123.0))  # type: ignore[misc]
        finish(flusher)
        with pytest.raises(AssertionError):
            rank.assert_slots_equal()


@pytest.mark.parametrize("marked", [True, False])
def test_values_that_the_device_has_yet_to_compute_are_waited_for(marked: bool) -> None:
    shards = weights()
    new = weights(seed=1)
    with staging(shards) as rank:
        with_new_values = [Put(put.holding, new[put.holding.name]) for put in rank.puts()]
        Flusher(rank.made, rank.owned).flush(0, with_new_values)
        device = LazyDevice(random.Random(0), linger="trainer")
        for name, shard in shards.items():
            device.trainer.run(lambda name=name, shard=shard: shard.copy_(new[name]))  # type: ignore[misc]
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.trainer.mark()] if marked else [])
        finish(flusher)
        if marked:
            rank.assert_slots_equal()
        else:  # the check would have caught it
            with pytest.raises(AssertionError):
                rank.assert_slots_equal()


def test_a_plan_is_used_again_wherever_the_shards_are_by_then() -> None:
    with staging(weights()) as rank:
        device = LazyDevice(random.Random(3))
        flusher = rank.flusher(device)
        host = Flusher(rank.made, rank.owned)
        for version in range(4):
            rank.shards = weights(seed=version)
            host.flush(0, rank.puts())
            flusher.flush(1, rank.puts(), [device.current().mark()])
            finish(flusher)
            rank.assert_slots_equal()
            if version == 0:
                taken = device.memory_bytes
        assert device.memory_bytes <= taken + SMALL_SCRATCH  # other addresses may be aligned otherwise


def test_shards_that_are_put_in_several_lots_are_all_staged() -> None:
    with staging(weights()) as rank:
        puts = rank.puts()
        Flusher(rank.made, rank.owned).flush(0, puts)
        device = LazyDevice(random.Random(5))
        flusher = rank.flusher(device)
        flusher.flush(1, puts[:1], [device.current().mark()])
        flusher.flush(1, puts[1:], [device.current().mark()])
        finish(flusher)
        rank.assert_slots_equal()


def test_a_strided_part_of_a_larger_tensor_is_read_in_place() -> None:
    large = torch.randn(300, 700)
    shards = {"columns": LocalShard(large[:, 100:228], (300, 128), (0, 0)), "rows": LocalShard(large[::2])}
    with staging(shards) as rank:
        Flusher(rank.made, rank.owned).flush(0, rank.puts())
        device = LazyDevice(random.Random(5))
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        finish(flusher)
        rank.assert_slots_equal()


def test_what_there_is_no_room_to_set_aside_is_staged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flush, "ASIDE_BYTES", 100)
    with staging({"few": torch.arange(9), "many": torch.arange(999), "w": torch.randn(40, 40)}) as rank:
        Flusher(rank.made, rank.owned).flush(0, rank.puts())
        device = LazyDevice(random.Random(5))
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        finish(flusher)
        rank.assert_slots_equal()


def test_scratch_memory_is_bounded_whatever_the_shards() -> None:
    with staging({f"w{i}": torch.randn(512, 256) for i in range(20)}) as rank:
        device = LazyDevice(random.Random(0))
        flusher = rank.flusher(device)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        finish(flusher)
        assert device.memory_bytes < 3 * SMALL_SCRATCH  # two halves, their cells, and the tables
        assert rank.made.catalog.tensor_bytes > 20 * SMALL_SCRATCH


def test_a_device_that_never_comes_to_an_end_is_not_waited_for_for_ever() -> None:
    with staging(weights()) as rank:
        device = LazyDevice(random.Random(0))
        flusher = rank.flusher(device)
        never = LazyDevice(random.Random(0)).trainer
        never.operations.append(lambda: None)
        flusher.flush(1, rank.puts(), [never.mark()])
        with pytest.raises(DeadlineExceeded, match="copies"):
            flusher.finish(time.monotonic() + 0.01)
