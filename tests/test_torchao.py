# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Versions in weights that TorchAO has wrapped are, in every byte and scale, what TorchAO makes of the same weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_layers import Live, named
from private_stage import by_columns, by_rows, private_stage
from stagingd_vllm.layouts import Home, LayoutUnknown, homes
from stagingd_vllm.plan import PlanEntry, ReadPlan, Region
from stagingd_vllm.receiver import LayoutChanged, Receiver
from stagingd_vllm.schemes import TORCHAO_PER_ROW, TORCHAO_PER_TENSOR

from stagingd.boxes import whole

quantization = pytest.importorskip("torchao.quantization")
primitives = pytest.importorskip("torchao.quantization.quant_primitives")

SCHEMES = {"PerRow": TORCHAO_PER_ROW, "PerTensor": TORCHAO_PER_TENSOR}
FP8 = torch.float8_e4m3fn
GREATEST, NOT_A_NUMBER = 0x7E, 0x7F
"""Bytes of float8_e4m3fn: 448, and NaN but for its sign."""


@pytest.fixture(autouse=True)
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets TorchAO quantize on a device that does not compute in FP8."""
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda _: None)


@pytest.fixture(params=SCHEMES)
def granularity(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def wrapped(weight: torch.Tensor, granularity: str) -> Any:
    """A weight as vLLM has TorchAO make it after loading."""
    holder = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta"))
    holder[0].weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    made = getattr(quantization, granularity)()
    quantization.quantize_(holder, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=made))
    return holder[0].weight


def layer(parameter: torch.Tensor, method: str = "TorchAOLinearMethod") -> Live:
    """A layer whose weight is this parameter."""
    made = Live(named(method))
    made.register_parameter("weight", torch.nn.Parameter(parameter, requires_grad=False))
    return made


def model(parameter: torch.Tensor, method: str = "TorchAOLinearMethod") -> torch.nn.Module:
    return torch.nn.ModuleDict({"o": layer(parameter, method)})


def plan(weight: torch.Tensor) -> ReadPlan:
    """All of a weight into the one parameter."""
    shape = tuple(weight.shape)
    return ReadPlan((PlanEntry("w", "bfloat16", whole(shape), Region("o.weight", 0, shape, (shape[1], 1))),), 0)


def home(live: torch.nn.Module) -> Home:
    return homes(live)["o.weight"]


def written(weight: torch.Tensor, live: torch.nn.Module, ranks: int = 1, columns: bool = False) -> None:
    """Has a receiver write a weight that so many trainer ranks hold into a live model."""
    cut = (by_columns if columns else by_rows)(weight.shape, ranks)
    with private_stage({"w": weight}, {"w": cut}) as stage:
        Receiver(live, plan(weight), stage).apply(stage.write(1, {"w": weight}))


def of_all_magnitudes(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of zeros, and rows of magnitudes from those that only denormal numbers have to 2**60."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-150, 60, (rows, 1), generator=generator).double()
    exponent[torch.rand(rows, 1, generator=generator) < 0.5] = -5.0
    made = (torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1) * 2.0**exponent
    made[torch.rand(rows, generator=generator) < 0.1] = 0.0
    return made.bfloat16()


def values(seed: int, rows: int, columns: int, alike: bool) -> torch.Tensor:
    made = of_all_magnitudes(rows, columns, seed)
    if alike:  # or else one row would make bytes of all others nought where they share a scale
        generator = torch.Generator().manual_seed(seed)
        made = (torch.randn(rows, columns, generator=generator) * 2.0 ** (seed % 200 - 130)).bfloat16()
    return made


@settings(deadline=None, max_examples=60)
@given(
    granularity=st.sampled_from(list(SCHEMES)),
    rows=st.integers(1, 12),
    columns=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    ranks=st.integers(1, 3),
    by_column=st.booleans(),
    alike=st.booleans(),
)
def test_bytes_and_scales_are_those_of_torchao_but_for_its_nans(
    granularity: str, rows: int, columns: int, seed: int, ranks: int, by_column: bool, alike: bool
) -> None:
    """A zero under a scale of zero is NaN to TorchAO. Here it is 448, which times zero is the zero that was staged."""
    weight = values(seed, 16 * rows, 16 * columns, alike)
    expected = wrapped(weight, granularity)
    live = model(wrapped(torch.ones_like(weight), granularity))
    written(weight, live, ranks, by_column)
    found = live["o"].weight
    assert torch.equal(found.scale, expected.scale)
    zeros = (weight == 0) & (expected.scale == 0)
    found_bytes, expected_bytes = found.qdata.view(torch.uint8), expected.qdata.view(torch.uint8)
    assert torch.equal(found_bytes[~zeros], expected_bytes[~zeros])
    assert (expected_bytes[zeros] & 0x7F == NOT_A_NUMBER).all()
    assert (found_bytes[zeros] == GREATEST).all()
    assert not found.qdata.float().isnan().any()
    assert (found.dequantize()[zeros] == 0).all()


def test_every_greatest_magnitude_makes_the_scale_that_torchao_makes_of_it() -> None:
    every = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    expected = primitives._choose_scale_float8(every[:, None].expand(-1, 16).contiguous(), [1, 16]).view(-1)
    assert expected.isfinite().all()
    for scheme in SCHEMES.values():
        assert torch.equal(scheme.formula(every.float(), every.device), expected)


def test_a_layer_computes_with_what_was_written(granularity: str) -> None:
    weight, inputs = values(7, 64, 32, True), torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    live = model(wrapped(torch.ones_like(weight), granularity))
    expected = torch.nn.functional.linear(inputs, wrapped(weight, granularity))
    assert not torch.equal(torch.nn.functional.linear(inputs, live["o"].weight), expected)
    written(weight, live)
    assert torch.equal(torch.nn.functional.linear(inputs, live["o"].weight), expected)


def test_a_weight_of_a_size_that_torchao_leaves_be_is_written_as_it_is(granularity: str) -> None:
    weight = values(7, 24, 32, True)
    parameter = wrapped(torch.ones_like(weight), granularity)
    assert type(parameter) is torch.nn.Parameter
    live = model(parameter)
    assert home(live).scheme is None
    written(weight, live)
    assert torch.equal(live["o"].weight, weight)


def replaced(granularity: str) -> Iterator[tuple[str, Any]]:
    """What can become another than it was, and how."""
    other = wrapped(torch.ones(32, 32).bfloat16(), granularity)
    yield r"o\.weight was .* and is", lambda layer: setattr(layer.weight, "qdata", other.qdata)
    yield r"o\.weight's scale was .* and is", lambda layer: setattr(layer.weight, "scale", other.scale)
    yield r"o\.weight was .* and is", lambda layer: setattr(layer, "weight", torch.nn.Parameter(other, False))
    plain = torch.nn.Parameter(torch.ones(32, 32).bfloat16(), False)
    yield r"o\.weight was .* and is gone", lambda layer: setattr(layer, "weight", plain)


@pytest.mark.parametrize("number", range(4))
def test_bytes_or_scales_that_were_replaced_are_noticed(granularity: str, number: int) -> None:
    weight = values(7, 32, 32, True)
    live = model(wrapped(torch.ones_like(weight), granularity))
    message, replace = list(replaced(granularity))[number]
    with private_stage({"w": weight}) as stage:
        receiver = Receiver(live, plan(weight), stage)
        live["o"].weight = torch.nn.Parameter(live["o"].weight, False)  # another wrapper of the same memory
        receiver.check()
        replace(live["o"])
        with pytest.raises(LayoutChanged, match=message):
            receiver.apply(stage.write(1, {"w": weight}))


def unknown() -> Iterator[tuple[str, torch.nn.Module]]:
    """Layers that are refused, each with the reason."""
    ones, config = torch.ones(32, 32).bfloat16(), quantization.Float8DynamicActivationFloat8WeightConfig()
    known = wrapped(ones, "PerRow")
    float8 = type(known)
    yield "is wrapped as Float8Tensor, and what UnquantizedLinearMethod makes", model(known, "UnquantizedLinearMethod")
    half = float8(known.qdata, known.scale, [1, 32], config.mm_config, dtype=torch.float16)
    yield "was made of torch.float16", model(half)
    other = float8(known.qdata.view(torch.uint8).view(torch.float8_e5m2), known.scale, [1, 32], dtype=torch.bfloat16)
    yield "has bytes of torch.float8_e5m2", model(other)
    columns = float8(known.qdata, known.scale.view(1, 32), [32, 1], dtype=torch.bfloat16)
    yield r"has scales of torch.float32 \(1, 32\), which are neither", model(columns)
    coarse = float8(known.qdata, known.scale.bfloat16(), [1, 32], dtype=torch.bfloat16)
    yield r"has scales of torch.bfloat16 \(32, 1\)", model(coarse)
    holder = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig(version=2))
    yield "is a Int8Tensor, and where that keeps its memory is not known", model(holder[0].weight)


@pytest.mark.parametrize("number", range(6))
def test_what_is_wrapped_in_another_way_is_refused_by_name(number: int) -> None:
    reason, live = list(unknown())[number]
    with pytest.raises(LayoutUnknown, match=rf"layer o \(Live, \w+\): weight {reason}"):
        homes(live)
