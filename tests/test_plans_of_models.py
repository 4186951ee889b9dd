# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Read plans of real vLLM models, for every rank of many engines: they do what vLLM's own loaders do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from stagingd_vllm.plan import PlanRefused, ReadPlan, StagedTensor, make_plan
from stagingd_vllm.tracing import trace_loader
from stagingd_vllm.views import View, join_adjacent, row_major
from tiny_models import EXPERTS, LAYERS, MODELS, VOCAB
from witness import witness

from stagingd.boxes import Box, uncovered

pytest.importorskip("vllm")

PADDED = 128
"""Rows of the vocabulary in vLLM, over all tensor-parallel ranks."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an engine is spread over its workers."""

    tensor: int
    pipeline: int = 1
    expert: bool = False

    def __str__(self) -> str:
        sizes = f"tensor {self.tensor}", f"pipeline {self.pipeline}" * (self.pipeline > 1), "experts" * self.expert
        return " x ".join(size for size in sizes if size)

    def worker(self, rank: int) -> dict[str, Any]:
        sizes = {"tensor_parallel": self.tensor, "pipeline_parallel": self.pipeline, "expert_parallel": self.expert}
        return {**sizes, "rank": rank}


DENSE = [Engine(1), Engine(2), Engine(4), Engine(1, 2), Engine(2, 2)]
SPARSE = [Engine(2, 1, True), Engine(4, 1, True), Engine(2, 2, True)]
CASES = [(name, engine) for name, model in MODELS.items() for engine in DENSE + (SPARSE if model.sparse else [])]

NO_LAYER = f"model.layers.{LAYERS}.input_layernorm.weight"
NO_NAME = "model.layers.0.self_attn.bend.weight"
NO_EXPERT = f"model.layers.{LAYERS - 1}.mlp.experts.{EXPERTS}.up_proj.weight"
REFUSING = [Engine(2), Engine(1, 2), Engine(2, 1, True), Engine(2, 2, True)]
UNKNOWN = [NO_LAYER, NO_NAME, NO_EXPERT]

Ask = Callable[[str, Engine, int], dict[str, Any]]
Examine = Callable[[str, Engine], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What is found about one rank of an engine, by a process in which vLLM is imported once."""
    with witness("plan_witness.py", tmp_path_factory.mktemp("models")) as asked:

        def ask(model: str, engine: Engine, rank: int) -> dict[str, Any]:
            unknown = UNKNOWN if engine in REFUSING else []
            return dict(asked.ask({"model": model, "worker": engine.worker(rank), "unknown": unknown}))

        yield ask


@pytest.fixture(scope="module")
def examine(ask: Ask) -> Examine:
    """What is found about each rank of an engine, asked once."""

    @functools.cache
    def examine(model: str, engine: Engine) -> list[dict[str, Any]]:
        return [ask(model, engine, rank) for rank in range(engine.tensor * engine.pipeline)]

    return examine


@pytest.mark.parametrize(("model", "engine"), CASES, ids=str)
def test_a_plan_writes_what_the_models_own_loader_writes(examine: Examine, model: str, engine: Engine) -> None:
    for rank, outcome in enumerate(examine(model, engine)):
        assert outcome["wrong"] == [], rank
        assert outcome["computed"] == [], rank


@pytest.mark.parametrize(("model", "engine"), CASES, ids=str)
def test_only_the_padding_of_the_vocabulary_is_left_to_the_loader(examine: Examine, model: str, engine: Engine) -> None:
    for rank, outcome in enumerate(examine(model, engine)):
        rows = PADDED // engine.tensor
        own = VOCAB - rank % engine.tensor * rows
        expected = rows - max(0, min(rows, own))
        assert set(outcome["padding"]) <= {"model.embed_tokens.weight", "lm_head.weight"}, rank
        assert set(outcome["padding"].values()) <= {expected}, rank


@pytest.mark.parametrize(("model", "engine"), CASES, ids=str)
def test_the_ranks_of_an_engine_read_all_of_the_stage(examine: Examine, model: str, engine: Engine) -> None:
    boxes: dict[str, list[Box]] = {name: [] for name in MODELS[model].staged()}
    for outcome in examine(model, engine):
        for name, offsets, lengths in outcome["read"]:
            boxes[name].append(Box(tuple(offsets), tuple(lengths)))
        assert {name for name, *_ in outcome["read"]} | set(outcome["unread"]) == set(boxes)
    missing = {name: uncovered(tensor.shape, boxes[name]) for name, tensor in MODELS[model].staged().items()}
    assert {name: box for name, box in missing.items() if box is not None} == {}


@pytest.mark.parametrize(("model", "engine"), CASES, ids=str)
def test_reads_run_through_the_stage_once(examine: Examine, model: str, engine: Engine) -> None:
    order = list(MODELS[model].staged())
    for outcome in examine(model, engine):
        places = [(order.index(name), offsets) for name, offsets, _ in outcome["read"]]
        assert places == sorted(places)


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize(("model", "engine"), [case for case in CASES if case[1] in REFUSING], ids=str)
def test_a_tensor_of_no_rank_is_refused_by_name(examine: Examine, model: str, engine: Engine, unknown: str) -> None:
    """By the stage that has its layer, where there are several; by every rank, where there is no such layer."""
    said = [outcome["refusals"][unknown] for outcome in examine(model, engine)]
    assert all(unknown in answer for answer in said if answer is not None)
    own = {NO_LAYER: said, NO_NAME: said[: engine.tensor], NO_EXPERT: said[-engine.tensor :]}
    assert None not in own[unknown]


@pytest.mark.parametrize(("engine", "reads"), [(Engine(1), 2), (Engine(4), 3)], ids=str)
def test_fused_experts_are_few_reads_a_layer(examine: Examine, engine: Engine, reads: int) -> None:
    """Gate, up and down; and gate and up are one where nothing is cut away."""
    for outcome in examine("qwen3-moe, fused experts", engine):
        experts = [lengths for name, _, lengths in outcome["read"] if name.startswith("model.layers.0.mlp.experts")]
        assert [lengths[0] for lengths in experts] == [EXPERTS] * reads


def test_a_rank_that_an_engine_does_not_have_is_refused(ask: Ask) -> None:
    said = ask("llama", Engine(2, 2), 4)["refused"]
    assert "no rank 4 of tensor-parallel 2 x pipeline-parallel 2" in said


def test_a_bias_that_the_engine_keeps_in_float32_is_cast(examine: Examine) -> None:
    (outcome,) = examine("deepseek-v3, all in bfloat16", Engine(1))
    assert outcome["casts"] == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert examine("deepseek-v3", Engine(1))[0]["casts"] == []


STAGED = {name: StagedTensor("float32", (4, 6)) for name in ("q", "k", "v", "gate", "up", "scale")}
STAGED["scale"] = StagedTensor("float32", (1,))
Load = Callable[["Toy", str, torch.Tensor], None]


class Toy(torch.nn.Module):
    """A model with a fused and a stacked parameter, and one with a single element."""

    def __init__(self, device: str, load: Load) -> None:
        super().__init__()
        self.load = load
        self.late: dict[str, torch.Tensor] = {}
        for name, rows in {"qkv": 12, "mlp": 8}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full((rows, 6), -1.0, device=device)))
        self.scale = torch.nn.Parameter(torch.full((1,), -1.0, device=device))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.load(self, name, tensor)


def plainly(model: Toy, name: str, tensor: torch.Tensor) -> None:
    if name == "scale":
        model.scale.data.copy_(tensor)
        return
    parameter, row = {"q": ("qkv", 0), "k": ("qkv", 4), "v": ("qkv", 8), "gate": ("mlp", 0), "up": ("mlp", 4)}[name]
    getattr(model, parameter).data[row : row + 4].copy_(tensor)


def concatenating(model: Toy, name: str, tensor: torch.Tensor) -> None:
    """As Falcon's fused attention is put together: all parts are kept until the last has come."""
    if name not in "qkv":
        return plainly(model, name, tensor)
    model.late[name] = tensor
    if len(model.late) == 3:
        model.qkv.data.copy_(torch.cat([model.late[which].view(2, 2, 6) for which in "qkv"], dim=1).view(12, 6))
        model.late = {}
    return None


def transforming(model: Toy, name: str, tensor: torch.Tensor) -> None:
    """As Mamba2's decay is: loaded, and then replaced by a function of itself."""
    plainly(model, name, tensor)
    if name == "scale":
        model.scale.data.copy_(-torch.exp(model.scale.data.float()))


def taking_a_value(model: Toy, name: str, tensor: torch.Tensor) -> None:
    """As vLLM's default loader takes a tensor of one element."""
    if name == "scale":
        model.scale.data.fill_(tensor.item())
    else:
        plainly(model, name, tensor)


def by_way_of_a_buffer(model: Toy, name: str, tensor: torch.Tensor) -> None:
    if name == "gate":
        tensor = torch.empty_like(tensor).copy_(tensor)
    plainly(model, name, tensor)


def repeating(model: Toy, name: str, tensor: torch.Tensor) -> None:
    plainly(model, name, tensor[:1] if name == "k" else tensor)


def casting_twice(model: Toy, name: str, tensor: torch.Tensor) -> None:
    plainly(model, name, tensor.to(torch.bfloat16) if name == "up" else tensor)


def scaled_by_another(model: Toy, name: str, tensor: torch.Tensor) -> None:
    if name in "qkv":
        model.late[name] = tensor
        return
    plainly(model, name, tensor)
    if name == "scale":
        for other in "qkv":
            plainly(model, other, model.late.pop(other) * tensor)


COMPUTING = {
    concatenating: ({"q", "k", "v"}, {"qkv"}, "computes with staged tensor q: aten.cat"),
    transforming: ({"scale"}, {"scale"}, "writes parameter scale from no staged tensor"),
    taking_a_value: ({"scale"}, {"scale"}, "computes with staged tensor scale: aten._local_scalar_dense"),
    by_way_of_a_buffer: ({"gate", "up"}, {"mlp"}, "by aten.copy_.default to memory that is no parameter"),
    repeating: ({"q", "k", "v"}, {"qkv"}, "reinterprets or repeats k in qkv"),
    casting_twice: ({"gate", "up"}, {"mlp"}, "computes with staged tensor up: aten._to_copy"),
    scaled_by_another: ({"q", "k", "v", "scale"}, {"qkv", "scale"}, "computes with staged tensor q: aten.mul"),
}


def toy_plan(load: Load, *, allow_computed: bool = True) -> ReadPlan:
    model = Toy("meta", load)
    parameters = dict(model.named_parameters())
    writes = trace_loader(model.load_weights, STAGED, parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return make_plan(writes, STAGED, shapes, {}, allow_computed=allow_computed)


@pytest.mark.parametrize("load", COMPUTING, ids=lambda load: load.__name__)
def test_what_a_loader_computes_with_is_set_apart_with_all_that_it_ends_in(load: Load) -> None:
    tensors, parameters, reason = COMPUTING[load]
    plan = toy_plan(load)
    assert {tensor.tensor for tensor in plan.computed} == tensors
    assert {name for tensor in plan.computed for name in tensor.parameters} == parameters
    assert any(reason in tensor.reason for tensor in plan.computed)
    assert set(plan.tensors) == STAGED.keys() - tensors
    assert set(plan.parameters) == {"qkv", "mlp", "scale"} - parameters
    assert plan.bytes_per_update == plan.staged_bytes


@pytest.mark.parametrize("load", COMPUTING, ids=lambda load: load.__name__)
def test_reads_and_a_replay_of_what_is_set_apart_fill_the_model(load: Load) -> None:
    values = {name: torch.randn(tensor.shape) for name, tensor in STAGED.items()}
    whole, live = Toy("cpu", load), Toy("cpu", load)
    plan = toy_plan(load)
    with torch.no_grad():
        whole.load_weights(values.items())
        live.load_weights((tensor.tensor, values[tensor.tensor]) for tensor in plan.computed)
    for entry in plan.entries:
        place = entry.region.shape, entry.region.stride, entry.region.offset
        target = live.get_parameter(entry.region.parameter).detach()
        target.as_strided(*place).copy_(values[entry.tensor][entry.source.slices])
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, live.get_parameter(name)), name


@pytest.mark.parametrize("load", COMPUTING, ids=lambda load: load.__name__)
def test_a_caller_that_cannot_replay_is_refused_with_the_reason(load: Load) -> None:
    with pytest.raises(PlanRefused) as refused:
        toy_plan(load, allow_computed=False)
    assert refused.value.context["tensor"] in COMPUTING[load][0]


def following_a_value(model: Toy, name: str, tensor: torch.Tensor) -> None:
    """Where the gate goes depends on the first element of v."""
    model.late[name] = tensor
    if name == "gate" and model.late["v"][0, 0] > 0:
        model.mlp.data[4:].copy_(tensor)
    elif name == "up" and model.late["v"][0, 0] > 0:
        model.mlp.data[:4].copy_(tensor)
    else:
        plainly(model, name, tensor)


def keeping(model: Toy, name: str, tensor: torch.Tensor) -> None:
    """What is made of this tensor is kept where nobody sees it."""
    if name == "scale":
        model.late["scale"] = tensor * 2
        model.scale.data.fill_(1)
    else:
        plainly(model, name, tensor)


REFUSED = {following_a_value: r"depends on the values of v", keeping: r"staged tensor scale.*where that ends"}


@pytest.mark.parametrize("load", REFUSED, ids=lambda load: load.__name__)
def test_a_loader_that_cannot_be_followed_is_refused_by_name(load: Load) -> None:
    with pytest.raises(PlanRefused, match=REFUSED[load]):
        toy_plan(load)


def test_a_tensor_that_is_not_staged_leaves_a_computed_parameter_unfilled() -> None:
    staged = {name: tensor for name, tensor in STAGED.items() if name != "v"}
    model = Toy("meta", repeating)
    parameters = dict(model.named_parameters())
    writes = trace_loader(model.load_weights, staged, parameters)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with pytest.raises(PlanRefused, match=r"no staged tensor fills \[8:12, 0:6\] of parameter qkv"):
        make_plan(writes, staged, shapes, {}, allow_computed=True)


def test_boxes_that_continue_each_other_on_one_side_only_are_not_joined() -> None:
    first = (Box((0, 0), (2, 3)), View(0, (2, 3), (3, 1)))
    apart = (Box((2, 0), (2, 3)), View(8, (2, 3), (3, 1)))
    turned = (Box((2, 0), (2, 3)), View(6, (2, 3), (1, 2)))
    behind = (Box((3, 0), (2, 3)), View(6, (2, 3), (3, 1)))
    for other in (apart, turned, behind):
        assert join_adjacent([other, first]) == sorted([first, other])
    following = (Box((2, 0), (2, 3)), View(6, (2, 3), (3, 1)))
    assert join_adjacent([following, first]) == [(Box((0, 0), (4, 3)), View(0, (4, 3), (3, 1)))]


def test_joined_boxes_move_the_same_elements() -> None:
    """A tensor cut into all of its elements, in a parameter of another order, is one box again."""
    shape, order = (3, 4, 5), (4, 1, 12)
    singles = [
        (Box(index, (1, 1, 1)), View(sum(i * s for i, s in zip(index, order, strict=True)), (1, 1, 1), (1, 1, 1)))
        for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist()
    ]
    joined = join_adjacent([(Box(tuple(box.offsets), box.lengths), view) for box, view in reversed(singles)])
    assert joined == [(Box((0, 0, 0), shape), View(0, shape, order))]
    assert row_major(shape) != order
