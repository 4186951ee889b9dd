# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Versions in live layers of every scheme: bytes and scales are what the engine makes of the whole tensors.

The model is that of ``live_model.py``, cut as tensor parallelism cuts it. What is expected is worked out here from
whole tensors, with the engine's formulae.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from live_model import EXPERTS, HIDDEN, SCHEMES, Parallel, tensors
from private_stage import PrivateStage, by_columns, by_rows, private_stage
from stagingd_vllm.layouts import LayoutUnknown
from stagingd_vllm.receiver import LayoutChanged, Receiver
from stagingd_vllm.scales import ScaleRule

from stagingd.errors import OutOfOrder
from stagingd.moments import Grid

FP8 = torch.float8_e4m3fn


def amax(values: torch.Tensor, *dims: int) -> torch.Tensor:
    return values.float().abs().amax(dims or None)


def expected_dense(weight: torch.Tensor, group: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (rows, columns) and scales of a matrix; ``group`` is what shares its scales, cut by nobody."""
    if scheme == "fp8_per_tensor":
        scale = amax(group) / torch.tensor(448.0)
        scaled = weight.float() * scale.reciprocal()
        return torch.fmax(torch.fmin(scaled, torch.tensor(448.0)), torch.tensor(-448.0)).to(FP8), scale.reshape(1)
    if scheme == "fp8_per_channel":
        scale = (amax(group, 1) / torch.tensor(448.0)).clamp_min(1 / (448.0 * 512))
        return (weight / scale[:, None]).clamp(-448, 448).to(FP8), scale
    if scheme == "int8_per_channel_weight_only":
        scale = group.abs().amax(1) / 127
        return weight.div(scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale.float()
    rows, columns = weight.shape
    down, across = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(down * 128, across * 128, dtype=torch.bfloat16)
    padded[:rows, :columns] = weight
    view = padded.view(down, 128, across, 128)
    scale = view.abs().float().amax((1, 3), keepdim=True).clamp(1e-4) / 448.0
    return (view * (1.0 / scale)).to(FP8).view(down * 128, -1)[:rows, :columns], scale.view(down, across)


def check(worker: Parallel, full: Mapping[str, torch.Tensor]) -> None:
    """Every live byte and scale."""
    dense = "plain" if worker.scheme.startswith("int8") else worker.scheme
    layers = {"qkv": torch.cat([full["q"], full["k"], full["v"]]), "o": full["o"], "zero": full["zero"]}
    for name, group in layers.items():
        layer = getattr(worker.model, name)
        live = layer.weight.t() if dense in ("fp8_per_tensor", "fp8_per_channel") else layer.weight
        loaded = worker.loaded(f"{name}.weight", tuple(live.shape), full)
        if dense == "plain":
            assert live.cpu().equal(loaded), name
            continue
        scale = layer.weight_scale_inv if dense == "fp8_per_block" else layer.weight_scale
        rows_are_whole = dense == "fp8_per_channel" and name == "qkv"
        same(live, scale, name, loaded, loaded if rows_are_whole else group, dense)
    for weight, parts in (("w13", ("gate", "up")), ("w2", ("down",))):
        live = getattr(worker.model.experts, f"{weight}_weight")
        loaded = worker.loaded(f"experts.{weight}_weight", tuple(live.shape), full)
        if worker.scheme == "plain":
            assert live.cpu().equal(loaded), weight
            continue
        suffix = {"fp8_per_block": "weight_scale_inv", "int8_per_channel_weight_only": "scale"}.get(
            worker.scheme, "weight_scale"
        )
        scale = getattr(worker.model.experts, f"{weight}_{suffix}")
        for number in range(EXPERTS):
            group = torch.cat([full[f"{number}.{part}"] for part in parts])
            if weight == "w13" and "channel" in worker.scheme:
                group = loaded[number]
            same(live[number], scale[number], f"{weight} {number}", loaded[number], group, worker.scheme)
    for name in ("norm", "embed"):
        assert getattr(worker.model, name).weight.cpu().equal(full[name])


def same(
    live: torch.Tensor, scale: torch.Tensor, name: str, loaded: torch.Tensor, group: torch.Tensor, scheme: str
) -> None:
    wanted, scales = expected_dense(loaded, group, scheme)
    torch.testing.assert_close(scale.cpu().reshape(-1), scales.reshape(-1), rtol=0, atol=0, msg=f"scales of {name}")
    assert live.cpu().reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8)), name


CUTS = {
    "rows of three": lambda shape: by_rows(shape, 3),
    "columns of two": lambda shape: by_columns(shape, 2),
}


@pytest.fixture(params=CUTS)
def stage(request: pytest.FixtureRequest) -> Iterator[PrivateStage]:
    full = tensors(0)
    cut = {name: CUTS[request.param](tuple(tensor.shape)) for name, tensor in full.items()}
    with private_stage(full, cut) as made:
        yield made


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_and_scales_are_the_engines_at_every_rank(stage: PrivateStage, scheme: str, ranks: int) -> None:
    workers = [Parallel(scheme, rank, ranks) for rank in range(ranks)]
    receivers = [Receiver(worker.model, worker.plan, stage) for worker in workers]
    for version in (1, 2):
        full = tensors(version)
        lease = stage.write(version, full)
        for worker, receiver in zip(workers, receivers, strict=True):
            receiver.apply(lease)
            assert receiver.version == version
            check(worker, full)


def test_clipping_takes_mean_and_variance_of_all_that_shares_a_scale(stage: PrivateStage) -> None:
    worker = Parallel("fp8_per_tensor", 1, 2)
    full = tensors(5)
    Receiver(worker.model, worker.plan, stage, ScaleRule.parse("sigma:2.5")).apply(stage.write(5, full))
    fused = torch.cat([full["q"], full["k"], full["v"]]).double()
    limit = fused.mean().abs() + 2.5 * fused.std(correction=0)
    assert limit < fused.abs().max()
    torch.testing.assert_close(worker.model.qkv.weight_scale, (limit / 448).float().reshape(1), rtol=1e-6, atol=0)


def test_a_layer_that_is_replaced_is_noticed_before_anything_is_written(stage: PrivateStage) -> None:
    worker = Parallel("fp8_per_channel", 0, 1)
    receiver = Receiver(worker.model, worker.plan, stage)
    worker.model.o.weight_scale = torch.nn.Parameter(torch.zeros(HIDDEN, 1), requires_grad=False)
    with pytest.raises(LayoutChanged, match=r"o\.weight's scale"):
        receiver.apply(stage.write(1, tensors(1)))
    assert (worker.model.norm.weight == 0).all()


def test_an_unknown_kernel_or_method_or_backend_is_refused_by_name(stage: PrivateStage) -> None:
    for layer, attribute, found in (
        ("qkv", "fp8_linear", "MarlinFP8ScaledMMLinearKernel"),
        ("experts", "fp8_backend", "FLASHINFER_CUTLASS"),
    ):
        worker = Parallel("fp8_per_tensor", 0, 1)
        setattr(getattr(worker.model, layer).quant_method, attribute, type(found, (), {"name": found})())
        with pytest.raises(LayoutUnknown, match=rf"layer {layer} .*{found}"):
            Receiver(worker.model, worker.plan, stage)
    worker = Parallel("fp8_per_tensor", 0, 1)
    worker.model.o.quant_method = type("AWQMarlinLinearMethod", (), {})()
    with pytest.raises(LayoutUnknown, match=r"layer o .*AWQMarlinLinearMethod"):
        Receiver(worker.model, worker.plan, stage)


def test_weights_on_several_devices_are_refused(stage: PrivateStage) -> None:
    worker = Parallel("plain", 0, 1)
    worker.model.o.weight = torch.nn.Parameter(worker.model.o.weight.to("meta"), requires_grad=False)
    with pytest.raises(LayoutUnknown, match=r"embed\.weight is on cpu, and o\.weight on meta|on meta.*on cpu"):
        Receiver(worker.model, worker.plan, stage)


def test_a_stage_without_the_grid_that_a_scheme_needs_is_refused() -> None:
    full = tensors(0)
    with private_stage(full, grids=(Grid.TENSOR,)) as stage:
        worker = Parallel("fp8_per_channel", 0, 1)
        with pytest.raises(OutOfOrder, match=r"keeps no moments of tensor 'q'.*'row'"):
            Receiver(worker.model, worker.plan, stage)
