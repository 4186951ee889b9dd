# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Stages that hold weights quantized: live bytes and scales are those from a bf16 stage, or the stage is refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import pytest
import torch
from live_layers import experts, linear
from live_model import EXPERTS, SCHEMES, Parallel, tensors
from private_stage import PrivateStage, by_columns, by_rows, private_stage
from stagingd_vllm.computed import Loading
from stagingd_vllm.layouts import homes
from stagingd_vllm.plan import Computed, PlanEntry, PlanRefused, ReadPlan, Region, StagedTensor, staged_tensors
from stagingd_vllm.quantization_error import quantization_errors
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.recipe import make_recipe
from stagingd_vllm.scales import ScaleRule
from stagingd_vllm.schemes import FP8_PER_BLOCK, FP8_PER_TENSOR, TORCHAO_PER_ROW, Scheme
from stagingd_vllm.shadow import GIB, Shadow
from stagingd_vllm.stage_quantization import stage_quantization

from stagingd.boxes import Box, whole
from stagingd.errors import OutOfOrder
from stagingd.formats import Quantization, StageFormat

QUANTIZING = [scheme for scheme in SCHEMES if scheme != "plain"]
CUTS: dict[str, Callable[[tuple[int, ...]], list[Box]]] = {
    "whole": lambda shape: [whole(shape)],
    "rows of three": lambda shape: by_rows(shape, 3),
    "columns of two": lambda shape: by_columns(shape, 2),
}
DENSE = {"q", "k", "v", "o", "zero"}
GATED = {f"{number}.{part}" for number in range(EXPERTS) for part in ("gate", "up")}
DOWN = {f"{number}.down" for number in range(EXPERTS)}
FITTING = {
    ("fp8_per_tensor", 1): DENSE | GATED | DOWN,
    ("fp8_per_tensor", 4): DENSE | GATED | DOWN,
    ("fp8_per_channel", 1): DENSE | GATED | DOWN,
    ("fp8_per_channel", 4): DENSE | GATED | DOWN,
    ("fp8_per_block", 1): DENSE | DOWN,  # up begins at row 320 of its parameter
    ("fp8_per_block", 2): {"o", "zero"},  # the rest is cut at 96 or 160
    ("int8_per_channel_weight_only", 1): GATED | DOWN,
    ("int8_per_channel_weight_only", 4): GATED | DOWN,
}
"""By scheme and number of ranks, what an engine of them can copy of ``live_model``."""


def plan_of(worker: Parallel) -> ReadPlan:
    return replace(worker.plan, shapes={name: tuple(h.weight.shape) for name, h in homes(worker.model).items()})


def schemes_of(model: torch.nn.Module) -> dict[str, Scheme]:
    return {name: home.scheme for name, home in homes(model).items() if home.scheme is not None}


def bf16(full: Mapping[str, torch.Tensor]) -> dict[str, StagedTensor]:
    return {name: StagedTensor("bfloat16", tuple(tensor.shape)) for name, tensor in full.items()}


def told(workers: Iterable[Parallel]) -> Quantization:
    """What trainers are to quantize for the engine of these workers."""
    some = list(workers)
    return stage_quantization(list(map(plan_of, some)), schemes_of(some[0].model), bf16(tensors(0)), "cpu")


def groups(held: str, *named: Iterable[str], device: str = "cpu") -> Quantization:
    return Quantization(format=StageFormat(held), device=device, groups=tuple(map(tuple, named)))


def memory(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def names_of(quantization: Quantization) -> set[str]:
    return {name for group in quantization.groups for name in group}


def dtypes_of(stage: PrivateStage) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in stage.catalog.tensors}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("scheme", "ranks"), FITTING)
def test_copied_bytes_and_their_scales_are_those_from_a_bf16_stage(scheme: str, ranks: int, cut: str) -> None:
    workers = [(Parallel(scheme, rank, ranks), Parallel(scheme, rank, ranks)) for rank in range(ranks)]
    quantization, full = told(one for one, _ in workers), tensors(0)
    assert names_of(quantization) == FITTING[scheme, ranks]
    boxes = {name: CUTS[cut](tuple(tensor.shape)) for name, tensor in full.items()}
    with private_stage(full, boxes) as plain, private_stage(full, boxes, quantization=quantization) as held:
        assert {name for name, dtype in dtypes_of(held).items() if dtype != "bfloat16"} == FITTING[scheme, ranks]
        pairs = [(Receiver(a.model, a.plan, plain), Receiver(b.model, b.plan, held)) for a, b in workers]
        for version in (1, 2):
            leases = [stage.write(version, tensors(version)) for stage in (plain, held)]
            for (quantizing, copying), (one, other) in zip(pairs, workers, strict=True):
                quantizing.apply(leases[0])
                copying.apply(leases[1])
                assert memory(other.model) == memory(one.model)


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_a_shadow_is_filled_by_copies_too(scheme: str) -> None:
    one, other, full = Parallel(scheme, 0, 1), Parallel(scheme, 0, 1), tensors(1)
    with private_stage(full) as plain, private_stage(full, quantization=told([one])) as held:
        Receiver(one.model, one.plan, plain).apply(plain.write(1, full))
        lease = held.write(1, full)
        cpu = torch.device("cpu")
        shadow = Shadow(other.plan, homes(other.model), held.catalog, ScaleRule(), cpu, GIB)
        shadow.write(lease)
        shadow.copy_to_live()
    assert memory(other.model) == memory(one.model)


def test_what_is_staged_as_it_is_beside_is_quantized_by_the_worker() -> None:
    one, other, full = Parallel("fp8_per_tensor", 1, 2), Parallel("fp8_per_tensor", 1, 2), tensors(1)
    quantization = groups("fp8_per_tensor", ["o"], ["k", "v", "q"])
    with private_stage(full) as plain, private_stage(full, quantization=quantization) as held:
        Receiver(one.model, one.plan, plain).apply(plain.write(1, full))
        Receiver(other.model, other.plan, held).apply(held.write(1, full))
    assert memory(other.model) == memory(one.model)


def padded_experts(*parts: tuple[str, int, int]) -> tuple[torch.nn.Module, ReadPlan]:
    """Two experts' gate and up of 192 rows each, which live padded to 256: tensors with their first row and rows."""
    model = torch.nn.Module()
    model.experts = experts("fp8_per_block", 2, 256, 384)
    entries = [
        PlanEntry(
            name,
            "bfloat16",
            whole((2, count, 320)),
            Region("experts.w13_weight", first * 320, (2, count, 320), (384 * 320, 320, 1)),
        )
        for name, first, count in parts
    ]
    return model, ReadPlan(tuple(entries), 0, shapes={"experts.w13_weight": (2, 384, 320)})


def test_blocks_of_experts_are_copied_to_where_their_padding_puts_them() -> None:
    parts = ("gate", 0, 192), ("up", 192, 192)
    full = {name: torch.randn(2, count, 320).bfloat16() for name, _, count in parts}
    one, other = padded_experts(*parts), padded_experts(*parts)
    quantization = groups("fp8_per_block", ["gate"], ["up"])
    with private_stage(full) as plain, private_stage(full, quantization=quantization) as held:
        Receiver(*one, plain).apply(plain.write(1, full))
        Receiver(*other, held).apply(held.write(1, full))
    assert memory(other[0]) == memory(one[0])


def test_a_tensor_of_gate_and_up_that_padding_cuts_inside_a_block_is_refused() -> None:
    full = {"gate_up": torch.randn(2, 384, 320).bfloat16()}
    with private_stage(full, quantization=groups("fp8_per_block", ["gate_up"])) as stage:
        with pytest.raises(PlanRefused, match=r"gate_up .*experts\.w13_weight: the engine cuts it elsewhere"):
            Receiver(*padded_experts(("gate_up", 0, 384)), stage)


def refusal(scheme: str, quantization: Quantization, rule: str = "amax", rank: int = 0, ranks: int = 1) -> PlanRefused:
    worker, full = Parallel(scheme, rank, ranks), tensors(0)
    with (
        private_stage(full, quantization=quantization) as stage,
        pytest.raises(PlanRefused) as refused,
    ):
        Receiver(worker.model, worker.plan, stage, ScaleRule.parse(rule))
    return refused.value


REFUSED = [
    ("fp8_per_channel", groups("fp8_per_channel", ["embed"]), "embed", "embed.weight: this parameter is not quantized"),
    (
        "fp8_per_tensor",
        groups("fp8_per_channel", ["o"]),
        "o",
        r"o\.weight: this parameter is fp8_per_tensor\. Open the stage in fp8_per_tensor, or",
    ),
    ("fp8_per_block", groups("fp8_per_block", ["o"], device="cuda"), "o", "of device 'cuda', and .* is on 'cpu'"),
    ("fp8_per_tensor", groups("fp8_per_tensor", ["q"], ["k"], ["v"]), "q", "one scale for q, k, v, .* the stage one"),
    ("fp8_per_tensor", groups("fp8_per_tensor", ["q", "k"]), "q", "one scale for q, k, v, and the stage one for k, q"),
    ("fp8_per_tensor", groups("fp8_per_tensor", ["o", "zero"]), "o", "one scale for o, and the stage one for o, zero"),
    ("fp8_per_tensor", groups("fp8_per_tensor", ["1.gate"]), "1.gate", "one scale for 1.gate, 1.up, and the stage"),
    ("fp8_per_block", groups("fp8_per_block", ["2.up"]), "2.up", "elsewhere than at blocks of 128"),
    ("fp8_per_block", groups("fp8_per_block", ["2.gate"]), "2.gate", "cuts .*up, beside it, elsewhere than at blocks"),
]


@pytest.mark.parametrize(("scheme", "quantization", "tensor", "reason"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_tensor_and_what_would(
    scheme: str, quantization: Quantization, tensor: str, reason: str
) -> None:
    refused = refusal(scheme, quantization)
    assert refused.context["tensor"] == tensor
    assert f"open the stage with {tensor} as bfloat16" in refused.remedy
    assert re.search(reason, str(refused))


def test_a_cut_of_tensor_parallelism_inside_a_block_is_refused() -> None:
    refused = refusal("fp8_per_block", groups("fp8_per_block", ["0.down"]), rank=1, ranks=2)
    assert (refused.context["tensor"], refused.context["parameter"]) == ("0.down", "experts.w2_weight")


def test_bytes_that_are_made_by_amax_are_refused_by_another_scale_rule() -> None:
    refused = refusal("fp8_per_channel", groups("fp8_per_channel", ["o"]), rule="sigma:6")
    assert refused.context["tensor"] == "o"
    assert "made by amax, and the scale rule is sigma:6" in refused.what
    assert 'attach with scale_rule "amax"' in refused.remedy


def test_torchaos_weights_have_another_arithmetic_and_are_refused() -> None:
    worker, full = Parallel("fp8_per_channel", 0, 1), tensors(0)
    live = {
        name: replace(home, scheme=TORCHAO_PER_ROW if home.scheme else None)
        for name, home in homes(worker.model).items()
    }
    with private_stage(full, quantization=groups("fp8_per_channel", ["o"])) as stage:
        with pytest.raises(PlanRefused, match=r"o is staged in fp8_per_channel.*o\.weight.*torchao_per_row"):
            make_recipe(worker.plan, live, stage.catalog, ScaleRule())


def into(
    layer: torch.nn.Module, parameter: str, source: Box, shape: tuple[int, ...], stride: tuple[int, ...]
) -> tuple[torch.nn.Module, ReadPlan]:
    """A model of one layer, and the plan that brings it all of a tensor "w"."""
    model = torch.nn.Module()
    model.layer = layer
    entry = PlanEntry("w", "bfloat16", source, Region(f"layer.{parameter}", 0, shape, stride))
    return model, ReadPlan((entry,), 0)


def test_rows_that_become_columns_are_refused() -> None:
    full = {"w": torch.randn(64, 32).bfloat16()}
    model, plan = into(linear("fp8_per_channel", 32, 64), "weight", whole((64, 32)), (64, 32), (1, 64))
    with private_stage(full, quantization=groups("fp8_per_channel", ["w"])) as stage:
        with pytest.raises(PlanRefused, match=r"w is staged in fp8_per_channel.*its rows are columns there"):
            Receiver(model, plan, stage)


def test_a_tensor_of_all_experts_is_copied_where_its_scales_are_not_a_whole_tensors() -> None:
    full = {"w": torch.randn(3, 32, 64).bfloat16()}
    for held in ("fp8_per_channel", "fp8_per_block"):
        one, two = (
            into(experts(held, 3, 64, 32), "w2_weight", whole((3, 32, 64)), (3, 32, 64), (2048, 64, 1)) for _ in "ab"
        )
        with private_stage(full) as plain, private_stage(full, quantization=groups(held, ["w"])) as stage:
            Receiver(*one, plain).apply(plain.write(1, full))
            Receiver(*two, stage).apply(stage.write(1, full))
        assert memory(two[0]) == memory(one[0])


def test_what_only_the_models_own_loader_can_take_is_refused() -> None:
    worker, full = Parallel("fp8_per_channel", 0, 1), tensors(0)
    computed = Computed("o", 8, ("norm.weight",), "the loader computes")
    loading = Loading(lambda: worker.model, contextlib.nullcontext)
    with private_stage(full, quantization=groups("fp8_per_channel", ["o"])) as stage:
        plan = replace(worker.plan, entries=(), computed=(computed,))
        with pytest.raises(PlanRefused, match=r"own loader can take o, .* staged in fp8_per_channel") as refused:
            Receiver(worker.model, plan, stage, loading=loading)
    assert refused.value.context["tensor"] == "o"


def test_the_error_of_quantization_needs_the_values_before_it() -> None:
    worker, full = Parallel("fp8_per_channel", 0, 1), tensors(0)
    with private_stage(full, quantization=groups("fp8_per_channel", ["o"])) as stage:
        lease = stage.write(1, full)
        with pytest.raises(OutOfOrder, match="does not hold the values that were quantized") as refused:
            quantization_errors(worker.plan, homes(worker.model), stage.catalog, lease, {"amax": ScaleRule()})
    assert "without quantization" in refused.value.remedy


def test_plans_are_made_by_the_dtype_of_values_and_count_the_bytes_that_are_held() -> None:
    full = tensors(0)
    with private_stage(full, quantization=groups("fp8_per_channel", ["o"])) as stage:
        staged = staged_tensors(stage.catalog)
    assert staged["o"] == StagedTensor("bfloat16", tuple(full["o"].shape), "float8_e4m3fn")
    assert staged["q"] == StagedTensor("bfloat16", tuple(full["q"].shape))
    assert (staged["o"].bytes, staged["q"].bytes) == (full["o"].numel(), 2 * full["q"].numel())
    box = whole(staged["o"].shape)
    entry = PlanEntry("o", "bfloat16", box, Region("o.weight", 0, box.lengths, (1, 1)), held=staged["o"].held)
    assert entry.bytes == staged["o"].bytes


def test_groups_are_what_the_engine_fuses_under_one_scale() -> None:
    found = told([Parallel("fp8_per_tensor", 0, 1)])
    assert set(map(frozenset, found.groups)) == {
        frozenset({"q", "k", "v"}),
        *(frozenset({name}) for name in ("o", "zero", *DOWN)),
        *(frozenset({f"{number}.gate", f"{number}.up"}) for number in range(EXPERTS)),
    }
    assert told([Parallel("fp8_per_tensor", rank, 4) for rank in range(4)]) == found
    assert Quantization.model_validate_json(found.model_dump_json()) == found


def of_two(scheme: Scheme, *entries: PlanEntry, **staged: StagedTensor) -> Quantization:
    """For one plan whose parameters "a" and "b" are quantized, and "c" is not; all are 256 x 128."""
    plan = ReadPlan(entries, 0, shapes=dict.fromkeys("abc", (256, 128)))
    return stage_quantization([plan], {"a": scheme, "b": scheme}, staged)


def rows(tensor: str, parameter: str, first: int, count: int) -> PlanEntry:
    return PlanEntry(tensor, "bfloat16", whole((count, 128)), Region(parameter, first * 128, (count, 128), (128, 1)))


def test_with_a_tensor_that_does_not_fit_all_are_left_out_that_share_its_scale() -> None:
    half, all_of_it = StagedTensor("bfloat16", (128, 128)), StagedTensor("bfloat16", (256, 128))
    fused = rows("x", "a", 0, 128), rows("y", "a", 128, 128), rows("z", "b", 0, 256)
    assert of_two(FP8_PER_TENSOR, *fused, x=half, y=half, z=all_of_it).groups == (("x", "y"), ("z",))
    tied = of_two(FP8_PER_TENSOR, *fused, rows("y", "c", 0, 128), x=half, y=half, z=all_of_it)
    assert tied.groups == (("z",),)
    in_float32 = of_two(FP8_PER_TENSOR, *fused, x=StagedTensor("float32", (128, 128)), y=half, z=all_of_it)
    assert in_float32.groups == (("z",),)
    with pytest.raises(PlanRefused, match="nothing that this engine makes fp8_per_tensor fits"):
        of_two(FP8_PER_TENSOR, *fused[:2], rows("y", "b", 0, 128), x=half, y=half)


def test_of_blocks_all_of_a_parameter_is_left_out_where_one_tensor_is_off_them() -> None:
    some, rest, all_of_it = (StagedTensor("bfloat16", (count, 128)) for count in (192, 64, 256))
    entries = rows("x", "a", 0, 192), rows("y", "a", 192, 64), rows("z", "b", 0, 256)
    assert of_two(FP8_PER_BLOCK, *entries, x=some, y=rest, z=all_of_it).groups == (("z",),)


def test_an_engine_with_several_formats_or_none_is_refused() -> None:
    tensor = {"z": StagedTensor("bfloat16", (256, 128))}
    plan = ReadPlan((rows("z", "b", 0, 256),), 0, shapes={"b": (256, 128)})
    for schemes, reason in (
        ({"a": FP8_PER_BLOCK, "b": FP8_PER_TENSOR}, "a is fp8_per_block, b is fp8_per_tensor"),
        ({}, "no parameter is quantized"),
        ({"b": TORCHAO_PER_ROW}, "b is torchao_per_row, and no stage is in that format"),
    ):
        with pytest.raises(PlanRefused, match=reason):
            stage_quantization([plan], schemes, tensor)
