# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The read plan: strided views become boxes, and what a loader does beyond copying is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from private_stage import PrivateLease, PrivateStage, private_stage
from stagingd_vllm.answers import Answer, answering, checked
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor, make_plan, plan_with_aliases
from stagingd_vllm.receiver import LayoutChanged, Receiver
from stagingd_vllm.tracing import trace_loader
from stagingd_vllm.views import View, align, box_of, row_major

from stagingd.boxes import Box, Shape, fits
from stagingd.errors import LeaseLost, StagingError

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def view_of(tensor: torch.Tensor) -> View:
    return View(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Shape, Box]:
    """A shape, and a box of it that has elements."""
    shape = draw(SHAPES)
    lengths = tuple(draw(st.integers(1, size)) for size in shape)
    offsets = tuple(draw(st.integers(0, size - length)) for size, length in zip(shape, lengths, strict=True))
    return shape, Box(offsets, lengths)


@given(boxes(), st.randoms(use_true_random=False), st.booleans())
def test_any_order_of_a_boxs_dims_is_that_box(case: tuple[Shape, Box], shuffler: Random, squeeze: bool) -> None:
    shape, box = case
    view = torch.arange(math.prod(shape)).view(shape)[box.slices]
    order = list(range(len(shape)))
    shuffler.shuffle(order)
    view = view.permute(order)
    found = box_of(view_of(view.squeeze() if squeeze else view.unsqueeze(0)), shape)
    assert found == box


@given(SHAPES, st.data())
def test_the_aligned_sides_of_a_copy_move_the_same_elements(shape: Shape, data: st.DataObject) -> None:
    """Whatever chain of views lies on either side, reading the box into the aligned region does the same copy."""
    source = torch.arange(math.prod(shape)).view(shape)
    view = chain(source, data)
    target = torch.full((view.numel() * 2 + 3,), -1)
    place = target[2 : 2 + view.numel()]
    order = data.draw(st.permutations(range(view.dim())))
    inverse = [order.index(dim) for dim in range(view.dim())]
    region = place.view([view.shape[dim] for dim in order]).permute(inverse)
    aligned = align(view_of(view), view_of(region), shape)
    if aligned is None:
        reject()
    box, where = aligned
    assert fits(box, shape)
    assert where.shape == box.lengths
    replayed = torch.full_like(target, -1)
    replayed.as_strided(where.shape, where.stride, where.offset).copy_(source[box.slices])
    region.copy_(view)
    assert torch.equal(replayed, target)


def chain(tensor: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """What loaders do to a tensor: narrow, transpose, flatten, unflatten, in any order."""
    for _ in range(data.draw(st.integers(0, 4))):
        if not tensor.dim():
            return tensor
        dim = data.draw(st.integers(0, tensor.dim() - 1))
        match data.draw(st.sampled_from(["narrow", "transpose", "flatten", "unflatten"])):
            case "narrow":
                start = data.draw(st.integers(0, tensor.shape[dim] - 1))
                tensor = tensor.narrow(dim, start, data.draw(st.integers(1, tensor.shape[dim] - start)))
            case "transpose":
                tensor = tensor.transpose(dim, 0)
            case "flatten" if tensor.is_contiguous():
                tensor = tensor.flatten()
            case "unflatten" if tensor.shape[dim] % 2 == 0:
                tensor = tensor.view(*tensor.shape[:dim], 2, -1, *tensor.shape[dim + 1 :])
    return tensor


@given(SHAPES, st.data())
def test_a_view_that_is_called_a_box_holds_exactly_the_boxs_elements(shape: Shape, data: st.DataObject) -> None:
    """Arbitrary strides: never a box too many, and none too few."""
    size = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    stride = tuple(data.draw(st.integers(0, 25)) for _ in size)
    offset = data.draw(st.integers(0, 8))
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    assume(last < math.prod(shape))
    elements = torch.arange(math.prod(shape)).as_strided(size, stride, offset).flatten().tolist()
    around = bounds(elements, shape)
    is_box = len(set(elements)) == len(elements) == around.volume
    assert box_of(View(offset, size, stride), shape) == (around if is_box else None)


def bounds(elements: list[int], shape: Shape) -> Box:
    """The smallest box with all these elements of a row-major tensor."""
    steps = row_major(shape)
    indices = [tuple(e // step % n for step, n in zip(steps, shape, strict=True)) for e in elements]
    offsets = tuple(map(min, zip(*indices, strict=True)))
    return Box(offsets, tuple(max(d) - min(d) + 1 for d in zip(*indices, strict=True)))


def test_a_slice_with_a_step_is_not_a_box() -> None:
    assert box_of(view_of(torch.empty(6, 4)[::2]), (6, 4)) is None


def test_a_repeated_row_is_not_a_box() -> None:
    assert box_of(view_of(torch.empty(1, 4).expand(3, 4)), (1, 4)) is None


def test_strides_of_a_contiguous_tensor_are_those_of_torch() -> None:
    assert row_major((3, 4, 5)) == torch.empty(3, 4, 5).stride()


HIDDEN, HEADS, KV_HEADS, HEAD, VOCAB, PADDED = 6, 4, 2, 3, 7, 8
STAGED = {
    "embed.weight": StagedTensor("float32", (VOCAB, HIDDEN)),
    "q.weight": StagedTensor("float32", (HEADS * HEAD, HIDDEN)),
    "k.weight": StagedTensor("float32", (KV_HEADS * HEAD, HIDDEN)),
    "v.weight": StagedTensor("float32", (KV_HEADS * HEAD, HIDDEN)),
    "o.weight": StagedTensor("float32", (HIDDEN, HEADS * HEAD)),
}
Loader = Callable[["ToyModel", str, torch.Tensor], None]


class ToyModel(torch.nn.Module):
    """One rank of two of a model that loads as vLLM's do: fused q|k|v, split columns, padded vocabulary."""

    def __init__(self, rank: int, device: str, change: Loader | None = None) -> None:
        super().__init__()
        self.rank, self.change = rank, change
        rows = (HEADS + 2 * KV_HEADS) * HEAD // 2
        self.embed = torch.nn.Parameter(torch.full((PADDED // 2, HIDDEN), -1.0, device=device))
        self.qkv = torch.nn.Parameter(torch.full((rows, HIDDEN), -1.0, device=device))
        self.o = torch.nn.Parameter(torch.full((HIDDEN, HEADS * HEAD // 2), -1.0, device=device))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if self.change is not None:
                self.change(self, name, tensor)
            if name == "embed.weight":
                self._load_vocabulary(tensor)
            elif name == "o.weight":
                width = self.o.shape[1]
                self.o.data.copy_(tensor.narrow(1, self.rank * width, width))
            elif name[0] in "qkv":
                self._load_heads(name[0], tensor)

    def _load_vocabulary(self, tensor: torch.Tensor) -> None:
        start = self.rank * self.embed.shape[0]
        rows = tensor.narrow(0, start, min(self.embed.shape[0], VOCAB - start))
        self.embed[: rows.shape[0]].data.copy_(rows)
        self.embed[rows.shape[0] :].data.fill_(0)

    def _load_heads(self, which: str, tensor: torch.Tensor) -> None:
        size = tensor.shape[0] // 2
        offset = {"q": 0, "k": HEADS * HEAD // 2, "v": (HEADS + KV_HEADS) * HEAD // 2}[which]
        self.qkv.data.narrow(0, offset, size).copy_(tensor.narrow(0, self.rank * size, size))


def plan_of(model: ToyModel, staged: dict[str, StagedTensor] = STAGED) -> ReadPlan:
    parameters = dict(model.named_parameters())
    writes = trace_loader(model.load_weights, staged, parameters)
    return make_plan(writes, staged, {name: tuple(p.shape) for name, p in parameters.items()}, {})


def a_version(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(t.shape, generator=generator) for name, t in STAGED.items()}


@pytest.fixture
def stage() -> Iterator[PrivateStage]:
    with private_stage(a_version(0)) as made:
        yield made


@pytest.mark.parametrize("rank", [0, 1])
def test_a_version_applied_by_the_plan_equals_one_loaded_by_the_loader(stage: PrivateStage, rank: int) -> None:
    loaded, live = ToyModel(rank, "cpu"), ToyModel(rank, "cpu")
    loaded.load_weights(a_version(1).items())
    live.load_weights(a_version(0).items())
    report = Receiver(live, plan_of(ToyModel(rank, "meta")), stage).apply(stage.write(1, a_version(1)))
    assert (report.version, report.entries) == (1, 5)
    for expected, found in zip(loaded.parameters(), live.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_the_plan_reads_each_ranks_own_part_only() -> None:
    plans = [plan_of(ToyModel(rank, "meta")) for rank in (0, 1)]
    assert sum(plan.bytes_per_update for plan in plans) == plans[0].staged_bytes
    assert plans[1].entries[0].source == Box((4, 0), (3, HIDDEN))
    assert str(plans[0]).startswith("5 reads of 5 tensors into 3 parameters: 528 of 1,032 bytes (51%)")


def on(tensor_name: str, act: Callable[[ToyModel, torch.Tensor], object]) -> Loader:
    """A loader that does something more with one tensor, before it loads it."""

    def change(model: ToyModel, name: str, tensor: torch.Tensor) -> None:
        if name == tensor_name:
            act(model, tensor)

    return change


REFUSED = {
    "arithmetic": (on("k.weight", lambda model, t: t * 2), "computes with staged tensor k.weight"),
    "a value": (on("k.weight", lambda model, t: t[0, 0].item()), "computes with staged tensor k.weight"),
    "concatenation": (on("k.weight", lambda model, t: torch.cat([t, t])), "computes with staged tensor k.weight"),
    "a cast": (on("k.weight", lambda model, t: t.to(torch.bfloat16)), "computes with staged tensor k.weight"),
    "a change of the source": (on("k.weight", lambda model, t: t.zero_()), "changes staged tensor k.weight"),
    "a reinterpretation": (
        on("k.weight", lambda model, t: model.qkv.data[:6].copy_(t.view(torch.int32))),
        "reinterprets or repeats k.weight",
    ),
    "a repeated row": (on("k.weight", lambda model, t: model.qkv.data.copy_(t[0])), "reinterprets or repeats k.weight"),
    "a step": (on("k.weight", lambda model, t: model.qkv.data[:3].copy_(t[::2])), "is not a box"),
    "a transformed parameter": (
        on("o.weight", lambda model, t: model.qkv.data.copy_(-model.qkv.data)),
        "writes parameter qkv from no staged tensor",
    ),
    "an addition": (on("o.weight", lambda model, t: model.qkv.data.add_(1)), "writes parameter qkv"),
    "memory elsewhere": (
        on("k.weight", lambda model, t: torch.empty(6, 6, device="meta").copy_(t)),
        "writes k.weight by aten.copy_.default to memory that is no parameter",
    ),
    "live memory": (on("k.weight", lambda model, t: torch.ones(3).fill_(2)), "to memory that is no parameter"),
    "two sources": (
        on("v.weight", lambda model, t: model.qkv.data[:3].copy_(t[:3])),
        r"\[0:3, 0:6\] of parameter qkv is written from q.weight and from v.weight",
    ),
    "a constant afterwards": (
        on("v.weight", lambda model, t: model.qkv.data[:3].fill_(1)),
        "with a constant after copying q.weight",
    ),
    "its own checks": (on("k.weight", lambda model, t: {"q": 1}["k"]), "own loader refuses k.weight: KeyError"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_loader_that_does_more_than_copy_is_refused(change: Loader, reason: str) -> None:
    with pytest.raises(PlanRefused, match=reason):
        plan_of(ToyModel(0, "meta", change))


def test_a_read_that_the_loader_makes_twice_is_planned_once() -> None:
    again = on("o.weight", lambda model, t: model.o.data.copy_(t.narrow(1, 0, model.o.shape[1])))
    assert len(plan_of(ToyModel(0, "meta", again)).entries) == 5


def test_a_tensor_that_is_not_staged_leaves_a_parameter_unfilled() -> None:
    staged = {name: tensor for name, tensor in STAGED.items() if name != "v.weight"}
    with pytest.raises(PlanRefused, match=r"no staged tensor fills \[9:12, 0:6\] of parameter qkv") as refused:
        plan_of(ToyModel(0, "meta"), staged)
    assert refused.value.context["parameter"] == "qkv"


def test_a_staged_tensor_that_no_parameter_takes_is_refused() -> None:
    with pytest.raises(PlanRefused, match="no parameter of this model takes staged tensor scale"):
        plan_of(ToyModel(0, "meta"), STAGED | {"scale": StagedTensor("float32", (1,))})


def test_the_second_name_of_a_tied_parameter_may_be_staged_and_is_not_read() -> None:
    model = ToyModel(0, "meta")
    staged = STAGED | {"lm_head.weight": StagedTensor("float32", (VOCAB, HIDDEN))}
    parameters = dict(model.named_parameters())
    writes = trace_loader(model.load_weights, staged, parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    plan = make_plan(writes, staged, shapes, {"language_model.lm_head.weight": "embed"})
    assert plan.unread == ("lm_head.weight",)


class ToyWithHead(ToyModel):
    """The same, with a head, apart from the embedding or tied to it."""

    def __init__(self, rank: int, device: str, *, tied: bool, change: Loader | None = None) -> None:
        super().__init__(rank, device, change)
        self.tied = tied
        if not tied:
            self.head = torch.nn.Parameter(torch.full((PADDED // 2, HIDDEN), -1.0, device=device))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        embed, rest = self.embed, []
        for name, tensor in weights:
            rest.append((name, tensor))
            if name == "lm_head.weight":
                if self.tied:
                    raise KeyError(name)
                self.embed = self.head
                self._load_vocabulary(tensor)
                self.embed = embed
        super().load_weights(rest)


ALIASES = {"lm_head.weight": "embed.weight"}


def plan_offering(
    aliases: dict[str, str], *, tied: bool, change: Loader | None = None, staged: dict[str, StagedTensor] = STAGED
) -> ReadPlan:
    def derive(names: Mapping[str, str]) -> ReadPlan:
        model = ToyWithHead(0, "meta", tied=tied, change=change)
        parameters = dict(model.named_parameters())
        writes = trace_loader(model.load_weights, staged, parameters, names)
        return make_plan(writes, staged, {name: tuple(p.shape) for name, p in parameters.items()}, {})

    return plan_with_aliases(derive, aliases)


def test_an_engine_that_keeps_tied_weights_apart_reads_the_tensor_for_both(stage: PrivateStage) -> None:
    loaded, live = ToyWithHead(0, "cpu", tied=False), ToyWithHead(0, "cpu", tied=False)
    version = a_version(1)
    loaded.load_weights([*version.items(), ("lm_head.weight", version["embed.weight"])])
    plan = plan_offering(ALIASES, tied=False)
    assert {entry.region.parameter for entry in plan.entries if entry.tensor == "embed.weight"} == {"embed", "head"}
    assert plan.staged_bytes == sum(tensor.bytes for tensor in STAGED.values())
    Receiver(live, plan, stage).apply(stage.write(1, version))
    for expected, found in zip(loaded.parameters(), live.parameters(), strict=True):
        assert torch.equal(expected, found)
    with pytest.raises(PlanRefused, match=r"no staged tensor fills \[0:4, 0:6\] of parameter head"):
        plan_offering({}, tied=False)


def test_an_engine_that_ties_its_weights_is_not_offered_the_other_name() -> None:
    assert plan_offering(ALIASES, tied=True) == plan_offering({}, tied=True)


def test_a_refusal_is_about_the_model_and_not_about_an_alias() -> None:
    doubled = on("k.weight", lambda model, t: t * 2)
    for tied in (True, False):
        with pytest.raises(PlanRefused, match=r"computes with staged tensor k\.weight"):
            plan_offering(ALIASES, tied=tied, change=doubled)
    with pytest.raises(PlanRefused, match="no parameter of this model takes staged tensor scale"):
        plan_offering(ALIASES, tied=False, staged=STAGED | {"scale": StagedTensor("float32", (1,))})


def test_a_parameter_that_moved_is_refused_before_anything_is_written(stage: PrivateStage) -> None:
    live = ToyModel(0, "cpu")
    receiver = Receiver(live, plan_of(ToyModel(0, "meta")), stage)
    live.o.data = live.o.data.clone()
    with pytest.raises(LayoutChanged, match=r"live parameter o was torch\.float32"):
        receiver.apply(stage.write(1, a_version(1)))
    assert torch.equal(live.qkv, torch.full_like(live.qkv, -1.0))


def test_a_live_parameter_too_small_for_the_plan_is_refused(stage: PrivateStage) -> None:
    plan = plan_of(ToyModel(0, "meta"))
    for size in (0, 1):
        live = ToyModel(0, "cpu")
        live.o.data = torch.empty(size, 1)
        with pytest.raises(LayoutChanged, match="live parameter o"):
            Receiver(live, plan, stage)


class LostLease(PrivateLease):
    """One whose time was up before all was read."""

    def __exit__(self, *_: object) -> None:
        raise LeaseLost("the lease is over", remedy="lease again")


def test_a_lease_that_was_lost_meanwhile_leaves_no_version(stage: PrivateStage) -> None:
    receiver = Receiver(ToyModel(0, "cpu"), plan_of(ToyModel(0, "meta")), stage)
    lease = stage.write(1, a_version(1))
    with pytest.raises(LeaseLost):
        receiver.apply(LostLease(lease.version, lease.slot, lease.stored))
    assert receiver.version is None
    assert receiver.apply(stage.write(2, a_version(2))).version == receiver.version == 2


def a_worker_that(refuses: StagingError | None) -> Answer:
    @answering
    def method(_worker: None) -> Answer:
        if refuses is not None:
            raise refuses
        return {"version": 3}

    return method(None)


def test_what_a_worker_refuses_is_raised_by_the_caller_as_the_same_type() -> None:
    refusal = PlanRefused("tensor x is odd", remedy="leave it", tensor="x", box=Box((0,), (2,)))
    with pytest.raises(PlanRefused, match=r"tensor x is odd\. Leave it\.") as raised:
        checked([a_worker_that(None), a_worker_that(refusal)])
    assert raised.value.context == {"tensor": "x", "box": "[0:2]"}


def test_answers_without_a_refusal_are_passed_on() -> None:
    assert checked([a_worker_that(None)]) == [{"version": 3}]
