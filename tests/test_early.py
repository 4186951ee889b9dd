# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a version while it lands: nothing is read before it is there, and nothing counts before it is sealed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from daemons import RunningDaemon
from devices import LazyDevice
from live_model import SCHEMES, Parallel, tensors
from private_stage import PrivateLease, PrivateStage, by_columns, by_rows, private_stage
from stagingd_client import LocalShard, Stage
from stagingd_client.flush import Flusher
from stagingd_client.gpu_flush import DeviceFlusher
from stagingd_client.landings import Landings, Numbers
from stagingd_vllm import Reader, recipe
from stagingd_vllm.layouts import homes
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.shadow import GIB, Shadow
from test_device_flush import DEADLINE_S, SMALL_SCRATCH, Staging, bits, finish, quantization_of, staging
from test_prequantized import FITTING, memory, told
from test_stage import in_parallel

from stagingd import owners
from stagingd.boxes import whole
from stagingd.catalog import OwnedBox
from stagingd.errors import DeadlineExceeded, LeaseLost
from stagingd.formats import Quantization, StageFormat
from stagingd.moments import cells_of
from stagingd.progress import Needs
from stagingd.slots import SlotState

CPU = torch.device("cpu")
GARBAGE = 0x5A

# What a device's flush tells


class Watched(Landings):
    """Looks, whenever something is told to have landed, whether it is what the host's flush has written to slot 0."""

    def __init__(self, rank: Staging) -> None:
        super().__init__(rank.made, 0)
        self.rank = rank
        self.times = 0

    def land(self, numbers: Numbers) -> None:
        super().land(numbers)
        self.times += 1
        landed = self.rank.catalog.owned_by(0)[: self._told]
        host, device = self.rank.tensors(0), self.rank.tensors(1)
        for owned in landed:
            name, part = self.rank.catalog.tensors[owned.tensor].name, owned.box.slices
            assert bits(host[name][part]).equal(bits(device[name][part])), f"{name} has not landed"
            for cells in self._cells(owned):
                assert self.rank.made.moments(0).amax[cells] == pytest.approx(
                    self.rank.made.moments(1).amax[cells], nan_ok=True
                ), f"moments of {name} have not landed"

    def _cells(self, owned: OwnedBox) -> Iterator[slice]:
        tensor = self.rank.catalog.tensors[owned.tensor]
        for grid in self.rank.catalog.grids if tensor.has_moments else ():
            first = self.rank.catalog.first_cell(owned, grid)
            yield slice(first, first + cells_of(grid, tensor.shape, owned.box).volume)


def many_shards(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 256), (256,), (130, 384), (3, 140, 128), (256, 300), (7,), (200, 256)]
    return {f"w{number}": torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}


@pytest.mark.parametrize("form", [None, *StageFormat])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("integers", [False, True], ids=["", "with integers"])
def test_what_a_device_tells_to_have_landed_is_there_with_its_moments(
    form: StageFormat | None, seed: int, integers: bool
) -> None:
    shards = many_shards(seed) | ({"counts": torch.arange(30)} if integers else {})
    quantization = quantization_of(shards, form, together=False) if form is not None else None
    with staging(shards, quantization=quantization) as rank:
        host = Flusher(rank.made, rank.owned)
        host.flush(0, rank.puts())
        host.quantize(0, rank.puts())
        landings, device = Watched(rank), LazyDevice(random.Random(seed))
        flusher = DeviceFlusher(rank.made, rank.owned, device, landings, SMALL_SCRATCH)
        landings.begin(1, 1)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        if form is not None:
            flusher.finish_measuring(time.monotonic() + DEADLINE_S)
            flusher.quantize(1, rank.puts())
        finish(flusher)
        assert rank.made.progress(1)._lines[1, 1] == len(rank.catalog.owned_by(0))
        assert landings.times > 3, "it was told at the end"


@pytest.mark.parametrize("first", [True, False], ids=["integers first", "integers last"])
def test_what_lands_last_keeps_nothing_else_from_being_told(first: bool) -> None:
    counts = {"counts": torch.arange(30)}
    shards = counts | many_shards(0) if first else many_shards(0) | counts
    with staging(shards) as rank:
        device = LazyDevice(random.Random(0))
        landings = Landings(rank.made, 0)
        flusher = DeviceFlusher(rank.made, rank.owned, device, landings, SMALL_SCRATCH)
        landings.begin(1, 1)
        flusher.flush(1, rank.puts(), [device.current().mark()])
        flusher.wait_until_copied(time.monotonic() + DEADLINE_S)
        assert landings._told == len(rank.catalog.owned_by(0)) - 1
        finish(flusher)
        assert landings._told == len(rank.catalog.owned_by(0))


def test_scratch_memory_is_that_of_the_rank_in_however_many_parts_a_tensor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    for size in (2**30, 2**18):
        monkeypatch.setattr(owners, "LANDING_BYTES", size)
        with staging({"w": torch.randn(8192, 4096, dtype=torch.bfloat16)}) as rank:
            device = LazyDevice(random.Random(0))
            flusher = DeviceFlusher(rank.made, rank.owned, device, Landings(rank.made, 0), 2**40)
            limits.append((len(rank.catalog.owned), flusher._limit))
    (one, first), (several, second) = limits
    assert one == 1 < several
    assert first == second == 2**23


# What a shadow waits for


@dataclass
class LandingLease(PrivateLease):
    """A version that lands when it is waited for, and not before; ``lost_at`` tells at which wait it is aborted."""

    stage: PrivateStage
    boxes: Sequence[tuple[OwnedBox, torch.Tensor]]
    lost_at: int | None = None
    waits: int = 0
    landed: set[int] = field(default_factory=set)

    @property
    def early(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def of(
        cls, stage: PrivateStage, version: int, full: dict[str, torch.Tensor], lost_at: int | None = None
    ) -> LandingLease:
        """Of whole tensors; their slot holds garbage."""
        whole_lease = stage.lease(version)
        whole_lease.slot[: stage.catalog.progress_offset] = GARBAGE
        catalog = stage.catalog
        boxes = [(owned, full[catalog.tensors[owned.tensor].name][owned.box.slices]) for owned in catalog.owned]
        return cls(version, whole_lease.slot, whole_lease.stored, stage, boxes, lost_at)

    def _wait(self) -> None:
        self.waits += 1
        if self.waits == self.lost_at:
            raise LeaseLost("the version was aborted", remedy="lease again")

    def await_moments(self) -> None:
        """Those of what trainers quantize: what is held as it is may land later."""
        self._wait()
        for owned, values in self.boxes:
            if self._is_quantized(owned):
                self._flusher.write(self.version % 2, owned, values)

    def await_boxes(self, needs: Needs) -> None:
        self._wait()
        numbers = {
            number
            for rank, count in enumerate(needs.boxes)
            for number in [n for n, (owned, _) in enumerate(self.boxes) if owned.rank == rank][:count]
        }
        some = [self.boxes[number] for number in sorted(numbers - self.landed)]
        for owned, values in some:
            if not self._is_quantized(owned):
                self._flusher.write(self.version % 2, owned, values)
        self._flusher.quantize_boxes(self.version % 2, [one for one in some if self._is_quantized(one[0])])
        self.landed |= numbers

    @property
    def _flusher(self) -> Flusher:
        return Flusher(self.stage.made, {})

    def _is_quantized(self, owned: OwnedBox) -> bool:
        return self.stage.catalog.tensors[owned.tensor].quantized_from is not None


@contextmanager
def a_stage(scheme: str, ranks: int, *, trainers_quantize: bool) -> Iterator[PrivateStage]:
    full = tensors(0)
    quantization = told(Parallel(scheme, rank, ranks) for rank in range(ranks)) if trainers_quantize else None
    cuts = {
        name: by_columns(tensor.shape, 2) if name in ("q", "o") else by_rows(tensor.shape, 2)
        for name, tensor in full.items()
    }
    with private_stage(full, cuts, quantization=quantization) as stage:
        yield stage


CASES = [(scheme, ranks, False) for scheme, ranks in itertools.product(SCHEMES, (1, 2))] + [
    (scheme, ranks, True) for scheme, ranks in FITTING if ranks < 4
]


@pytest.mark.parametrize(("scheme", "ranks", "trainers_quantize"), CASES)
@pytest.mark.parametrize("finely", [False, True], ids=["", "finely"])
def test_a_shadow_reads_nothing_before_it_has_waited_for_it(
    scheme: str, ranks: int, trainers_quantize: bool, finely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``finely``: boxes are cut as large ones are, and reads of what has no scale with them."""
    if finely:
        monkeypatch.setattr(owners, "LANDING_BYTES", 2**12)
        monkeypatch.setattr(recipe, "WHOLE_BYTES", 0)
    rank = ranks - 1
    with (
        a_stage(scheme, ranks, trainers_quantize=trainers_quantize) as stage,
        a_stage(scheme, ranks, trainers_quantize=trainers_quantize) as whole_stage,
    ):
        early, updated = Parallel(scheme, rank, ranks), Parallel(scheme, rank, ranks)
        shadow = Shadow(early.plan, homes(early.model), stage.catalog, ScaleRule(), CPU, GIB)
        for version in (1, 2):
            shadow.write(LandingLease.of(stage, version, tensors(version)))
            shadow.copy_to_live()
            written = whole_stage.write(version, tensors(version))
            Receiver(updated.model, updated.plan, whole_stage).apply(written)
            assert memory(early.model) == memory(updated.model)


@pytest.mark.parametrize(
    ("scheme", "ranks", "trainers_quantize"), [("fp8_per_block", 2, False), ("fp8_per_tensor", 1, True)]
)
def test_an_abort_at_any_point_leaves_the_live_weights_untouched(
    scheme: str, ranks: int, trainers_quantize: bool
) -> None:
    with a_stage(scheme, ranks, trainers_quantize=trainers_quantize) as stage:
        worker = Parallel(scheme, 0, ranks)
        shadow = Shadow(worker.plan, homes(worker.model), stage.catalog, ScaleRule(), CPU, GIB)
        shadow.write(LandingLease.of(stage, 1, tensors(1)))
        shadow.copy_to_live()
        before, waits = memory(worker.model), 0
        for lost_at in itertools.count(1):
            lease = LandingLease.of(stage, 2, tensors(2), lost_at)
            try:
                shadow.write(lease)
            except LeaseLost:
                assert memory(worker.model) == before
                waits += 1
            else:
                break
        assert waits > 3, "it was waited for at the beginning and no more"
        shadow.copy_to_live()
        other = Parallel(scheme, 0, ranks)
        Receiver(other.model, other.plan, stage).apply(stage.lease(2))
        assert memory(worker.model) == memory(other.model) != before


# What a daemon grants

RANKS = 2
SHAPES = {"a": (40, 16), "b": (16, 24), "c": (30, 8)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def put(stage: Stage, version: int, names: Sequence[str] = tuple(SHAPES)) -> None:
    if stage._current is None:
        stage.begin(version)
    for name in names:
        box = by_rows(SHAPES[name], RANKS)[stage.rank]
        stage.put(name, LocalShard(weights(version)[name][box.slices].float(), SHAPES[name], box.offsets))


@dataclass
class Staged:
    """Two trainer ranks in this process, and a reader of an engine of one rank."""

    trainers: list[Stage]
    reader: Reader
    daemon: RunningDaemon
    name: str

    def needs(self, *names: str) -> Needs:
        return Needs.of(self.reader.catalog, names)

    def slots(self) -> list[tuple[str, int | None]]:
        return [(slot.state, slot.version) for slot in self.daemon.stage(self.name).slots]


@pytest.fixture
def staged(daemon: RunningDaemon, stage_name: str) -> Iterator[Staged]:
    with ExitStack() as opened:
        stages = [
            opened.enter_context(Stage.open(stage_name, rank=rank, ranks=RANKS, socket=daemon.socket, timeout_s=20.0))
            for rank in range(RANKS)
        ]
        boxes = [{name: by_rows(shape, RANKS)[rank] for name, shape in SHAPES.items()} for rank in range(RANKS)]
        held = [
            {name: LocalShard(torch.zeros(box.lengths), SHAPES[name], box.offsets) for name, box in some.items()}
            for some in boxes
        ]
        assert in_parallel(*(lambda s=s: s.declare(held[s.rank]) for s in stages)) == [None] * RANKS
        reader = opened.enter_context(Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket))
        yield Staged(stages, reader, daemon, stage_name)


def begun(staged: Staged, version: int) -> None:
    for stage in staged.trainers:
        stage.begin(version)
        stage._current._slot.result(20)  # type: ignore[union-attr]


def test_a_version_is_read_as_it_lands_and_counts_once_it_is_sealed(staged: Staged) -> None:
    first, second = staged.trainers
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    assert lease.early
    assert staged.slots()[0] == (SlotState.FILLING, 1)
    put(first, 1)
    put(second, 1, ["a", "b"])
    second.fence()
    publication = first.commit()
    lease.await_boxes(staged.needs("a", "b"))
    assert lease.read("a").equal(weights(1)["a"])
    assert lease.read("b").equal(weights(1)["b"])
    assert not staged.reader._segment.progress(0).has(1, staged.needs("c"))
    put(second, 1, ["c"])
    second.commit()
    lease.await_boxes(staged.needs("c"))
    assert lease.read("c").equal(weights(1)["c"])
    lease.release()
    publication.wait()
    assert staged.slots()[0] == (SlotState.FRONT, 1)


def test_a_complete_version_is_preferred_where_it_will_do(staged: Staged) -> None:
    for stage in staged.trainers:
        put(stage, 1)
    for publication in [stage.commit() for stage in staged.trainers]:
        publication.wait()
    begun(staged, 2)
    with staged.reader.lease(early=True) as lease:
        assert (lease.version, lease.early) == (1, False)
    with staged.reader.lease(newer_than=1, early=True) as lease:
        assert (lease.version, lease.early) == (2, True)
        for stage in staged.trainers:
            put(stage, 2)
            stage.commit()


def test_who_does_not_ask_for_it_waits_for_the_seal(staged: Staged) -> None:
    begun(staged, 1)
    with pytest.raises(DeadlineExceeded, match="the first version"):
        staged.reader.lease(timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match="version 1"):
        staged.reader.lease(version=1, timeout_s=0.05)


def test_a_rank_that_would_write_in_place_does_not_join_an_early_lease(
    staged: Staged, daemon: RunningDaemon, stage_name: str
) -> None:
    with ExitStack() as opened:
        beside, in_place = (
            opened.enter_context(Reader.attach(stage_name, engine="two", rank=rank, ranks=2, socket=daemon.socket))
            for rank in range(2)
        )
        begun(staged, 1)
        lease = beside.lease(early=True)
        with pytest.raises(DeadlineExceeded, match=r"version 1 to be committed.*trainer rank 0, trainer rank 1"):
            in_place.lease(timeout_s=0.05)
        for stage in staged.trainers:
            put(stage, 1)
        for publication in [stage.commit() for stage in staged.trainers]:
            publication.wait()
        with in_place.lease(version=1) as joined:
            assert not joined.early
            assert joined.read("a").equal(weights(1)["a"])
        lease.release()


def test_an_abort_is_noticed_by_who_waits_for_boxes_and_the_release_is_refused(staged: Staged) -> None:
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    put(staged.trainers[0], 1)
    staged.trainers[0].abort("it has had enough")
    with pytest.raises(LeaseLost, match="version 1 was aborted while it was being read"):
        lease.await_boxes(staged.needs("a"))
    with pytest.raises(LeaseLost, match="version 1 was aborted: rank 0 gave it up: it has had enough"):
        lease.release()
    staged.trainers[1].abort()
    for stage in staged.trainers:
        put(stage, 2)
    for publication in [stage.commit() for stage in staged.trainers]:
        publication.wait()
    with staged.reader.lease() as lease:
        assert lease.read("a").equal(weights(2)["a"])


def test_a_version_that_is_refused_for_its_values_takes_the_early_lease_away(staged: Staged) -> None:
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    put(staged.trainers[1], 1)
    box = by_rows(SHAPES["a"], RANKS)[0]
    poisoned = torch.full(box.lengths, torch.nan)
    staged.trainers[0].put("a", LocalShard(poisoned, SHAPES["a"], box.offsets))
    put(staged.trainers[0], 1, ["b", "c"])
    for stage in staged.trainers:
        stage.commit()
    with pytest.raises(LeaseLost, match="version 1 was aborted: version 1 holds NaN or infinite values: a"):
        lease.release()
    for stage in staged.trainers:
        with pytest.raises(Exception, match="NaN or infinite"):
            stage._last.wait()  # type: ignore[union-attr]


def test_whoever_has_read_early_and_waits_for_the_seal_is_told_who_is_missing(staged: Staged) -> None:
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    put(staged.trainers[0], 1)
    staged.trainers[0].commit()
    lease.await_boxes(Needs((3, 0)))
    lease._until -= 59.5  # half a second is left of it
    with pytest.raises(DeadlineExceeded, match=r"version 1 to be committed.*trainer rank 1"):
        lease.release()
    put(staged.trainers[1], 1)
    staged.trainers[1].commit().wait()
    assert staged.slots()[0] == (SlotState.SEALED, 1)


def test_a_rank_that_wants_no_more_of_it_takes_nothing_from_the_others(
    staged: Staged, daemon: RunningDaemon, stage_name: str
) -> None:
    with ExitStack() as opened:
        reading, leaving = (
            opened.enter_context(Reader.attach(stage_name, engine="two", rank=rank, ranks=2, socket=daemon.socket))
            for rank in range(2)
        )
        begun(staged, 1)
        lease = reading.lease(early=True)
        with pytest.raises(ValueError, match="not wanted"), leaving.lease(early=True):
            raise ValueError("not wanted")
        for stage in staged.trainers:
            put(stage, 1)
        for publication in [stage.commit() for stage in staged.trainers]:
            publication.wait()
        with leaving.lease() as again:  # and it may come back
            assert again.read("a").equal(weights(1)["a"])
        lease.release()
        assert staged.daemon.stage(staged.name).leases == ()


def test_whoever_leaves_waits_neither_for_boxes_nor_for_the_seal(staged: Staged) -> None:
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    staged.reader.leave()
    with pytest.raises(LeaseLost, match="its reader leaves"):
        lease.await_boxes(staged.needs("a"))
    with pytest.raises(LeaseLost, match="its reader leaves"):
        lease.release()
    assert staged.daemon.stage(staged.name).leases == ()


def test_an_error_while_reading_early_waits_for_nobody(staged: Staged) -> None:
    begun(staged, 1)
    with pytest.raises(ValueError, match="of its own"), staged.reader.lease(early=True):
        raise ValueError("of its own")
    assert staged.daemon.stage(staged.name).leases == ()


def test_a_restarted_daemon_lets_an_early_reader_go_on(staged: Staged) -> None:
    begun(staged, 1)
    lease = staged.reader.lease(early=True)
    put(staged.trainers[0], 1)
    staged.trainers[0].fence()
    staged.daemon.kill()
    staged.daemon.restart()
    put(staged.trainers[1], 1)
    for stage in staged.trainers:
        stage.commit()
    lease.await_boxes(staged.needs("a", "b", "c"))
    assert lease.read("c").equal(weights(1)["c"])
    lease.release()
    assert staged.slots()[0] == (SlotState.FRONT, 1)


def test_trainers_that_quantize_tell_when_scales_are_final_and_then_what_lands(
    daemon: RunningDaemon, stage_name: str
) -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("w",),))
    tensor = torch.randn(64, 32)
    with (
        Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, quantization=quantization) as stage,
    ):
        stage.declare({"w": tensor, "norm": torch.ones(32)})
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            stage.begin(1)
            stage.put("w", tensor)
            stage.put("norm", torch.ones(32))
            stage._current._slot.result(20)  # type: ignore[union-attr]
            lease = reader.lease(early=True)
            needs = Needs.of(reader.catalog, ["w"])
            told_before = reader._segment.progress(0)
            assert not told_before.is_measured(1)
            stage.commit()
            lease.await_moments()
            lease.await_boxes(needs)
            assert lease.read("w").shape == whole((64, 32)).lengths
            lease.release()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [None, StageFormat.FP8_PER_CHANNEL])
def test_whatever_is_told_to_have_landed_can_be_read_at_once(
    own_daemon: RunningDaemon, stage_name: str, device: str, form: StageFormat | None
) -> None:
    """A reader takes each tensor the moment it is told of, while the others are still on their way."""
    shapes = {f"w{number}": (1 + 127 * (number % 3 + 1), 1024) for number in range(40)} | {"norm": (1024,)}
    groups = tuple((name,) for name in shapes if name != "norm")
    quantization = None if form is None else Quantization(format=form, device="cpu", groups=groups)

    def made(version: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(version)
        return {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}

    with Stage.open(stage_name, rank=0, ranks=1, socket=own_daemon.socket, quantization=quantization) as stage:
        tensors = made(0)
        stage.declare(tensors)
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=own_daemon.socket) as reader:
            for version in (1, 2, 3):
                for name, values in made(version).items():
                    tensors[name].copy_(values)
                stage.begin(version)
                stage._current._slot.result(20)  # type: ignore[union-attr]
                lease = reader.lease(newer_than=version - 1, early=True)
                for name, tensor in tensors.items():
                    stage.put(name, tensor)
                publication = stage.commit()
                early = dict[str, torch.Tensor]()
                for name in shapes:
                    lease.await_boxes(Needs.of(reader.catalog, [name]))
                    early[name] = lease.read(name).clone()
                lease.release()
                publication.wait()
                with reader.lease(version=version) as sealed:
                    for name, values in early.items():
                        assert torch.equal(values.view(torch.uint8), sealed.read(name).view(torch.uint8)), name
                        if form is None:
                            assert torch.equal(values, tensors[name].bfloat16().cpu()), name
