# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What a worker tells of its quantization's error is what its live bytes and scales are off from what is staged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon
from live_layers import linear
from live_model import SCHEMES, Parallel, tensors
from private_stage import PrivateLease, PrivateStage, by_columns, by_rows, private_stage
from stagingd_client import Stage
from stagingd_vllm import quantization_error
from stagingd_vllm.layouts import Home, homes
from stagingd_vllm.plan import PlanEntry, ReadPlan, Region
from stagingd_vllm.quantization_error import Errors, QuantizationError, quantization_errors, summed, tensor_errors
from stagingd_vllm.reader import Reader
from stagingd_vllm.receiver import Receiver
from stagingd_vllm.scales import ScaleRule

from stagingd.boxes import whole
from stagingd.errors import OutOfOrder, StagingError, from_code

RULES = {rule: ScaleRule.parse(rule) for rule in ("sigma:2.5", "amax")}
QUANTIZING = [scheme for scheme in SCHEMES if scheme != "plain"]
ROWS, COLUMNS = 4, 64


def told(
    worker: Parallel, stage: PrivateStage, lease: PrivateLease, rules: Mapping[str, ScaleRule]
) -> dict[str, Errors]:
    return quantization_errors(worker.plan, homes(worker.model), stage.catalog, lease, rules)


def one_matrix(scheme: str, rows: int = ROWS, columns: int = COLUMNS) -> tuple[torch.nn.Module, ReadPlan]:
    model = torch.nn.Module()
    model.w = linear(scheme, rows, columns)
    place = Region("w.weight", 0, (rows, columns), (columns, 1))
    return model, ReadPlan((PlanEntry("w", "bfloat16", whole((rows, columns)), place),), 0)


def ones_and_a_giant() -> torch.Tensor:
    """Ones of both signs and 448 * 2**11: by amax a step of the smallest FP8 values is 4, and ones become 0."""
    values = torch.ones(ROWS, COLUMNS)
    values[:, ::2] = -1.0
    values[2, 5] = 448 * 2.0**11
    return values.bfloat16()


def errors_of(values: torch.Tensor, scheme: str, rules: Mapping[str, ScaleRule]) -> Errors:
    model, plan = one_matrix(scheme, *values.shape)
    with private_stage({"w": values}) as stage:
        return quantization_errors(plan, homes(model), stage.catalog, stage.write(1, {"w": values}), rules)["w.weight"]


def test_what_amax_flushes_to_zero_the_other_rule_keeps_and_clips_the_giant() -> None:
    values = ones_and_a_giant()
    found = errors_of(values, "fp8_per_tensor", {"amax": ScaleRule(), "sigma:1": ScaleRule(1.0)})
    squares = float(values.double().square().sum())
    assert found["amax"] == QuantizationError(256, 0, 255, 255.0, squares, 1.0)
    assert found["amax"].relative_rms_error == (255 / squares) ** 0.5
    limit = float(values.double().mean().abs() + values.double().std(correction=0))
    giant = 448 * 2.0**11 - limit
    clipped = found["sigma:1"]
    assert (clipped.values, clipped.clipped, clipped.flushed) == (256, 1, 0)
    assert clipped.greatest_error == pytest.approx(giant, rel=1e-6)
    assert clipped.squared_error == pytest.approx(giant**2, rel=1e-6)
    figures = clipped.figures()
    assert (figures["clipped_share"], figures["flushed_share"]) == (1 / 256, 0.0)
    assert figures["relative_rms_error"] == pytest.approx(giant / squares**0.5, rel=1e-6)
    assert QuantizationError.of(figures) == clipped


def test_a_scale_per_row_leaves_other_rows_alone_and_values_that_fp8_has_are_exact() -> None:
    found = errors_of(ones_and_a_giant(), "fp8_per_channel", {"amax": ScaleRule()})["amax"]
    assert (found.clipped, found.flushed, found.greatest_error) == (0, 63, 1.0)
    # A scale of 1 / 448 in float32 is off by less than a part in 10 million.
    assert found.squared_error == pytest.approx(63.0, abs=1e-9)
    zeros = errors_of(torch.zeros(ROWS, COLUMNS).bfloat16(), "fp8_per_tensor", {"amax": ScaleRule()})["amax"]
    assert zeros == QuantizationError(values=256)
    assert zeros.relative_rms_error == 0.0


def test_values_that_are_not_finite_are_left_out() -> None:
    values = ones_and_a_giant()
    values[0, 0], values[1, 1] = torch.nan, -torch.inf
    found = errors_of(values, "fp8_per_tensor", {"amax": ScaleRule()})["amax"]
    assert (found.values, found.clipped, found.flushed, found.squared_error) == (254, 0, 253, 253.0)


def heavy_tailed() -> torch.Tensor:
    """1024 x 1024 values of Student's t with 4 degrees of freedom, times 0.02."""
    generator = torch.Generator().manual_seed(1)
    normal, *squares = torch.randn(5, 1024, 1024, generator=generator, dtype=torch.float64)
    return (0.02 * normal / (sum(square**2 for square in squares) / 4).sqrt()).bfloat16()


def test_the_guide_shows_what_is_told_of_a_matrix_with_heavy_tails() -> None:
    guide = (Path(__file__).parents[1] / "docs/guides/vllm-offline.md").read_text()
    shown = json.loads(re.search(r"\{\"sigma:6\".*?\}\}", guide, re.DOTALL)[0])
    rules = {rule: ScaleRule.parse(rule) for rule in shown}
    found = errors_of(heavy_tailed(), "fp8_per_tensor", rules)
    for rule, figures in shown.items():
        assert found[rule].figures() == pytest.approx(figures, rel=0.01)


def spread_out(home: Home) -> torch.Tensor:
    """A scale for every live value."""
    assert home.scheme is not None
    assert home.scale is not None
    scale, (rows, columns) = home.scale.double(), home.weight.shape[-2:]
    if home.scheme.name == "fp8_per_block":
        return scale.repeat_interleave(128, -1)[..., :columns].repeat_interleave(128, -2)[..., :rows, :]
    if home.scheme.name == "fp8_per_tensor":
        scale = scale.view(-1, 1) if home.weight.dim() == 3 else scale
    return scale[..., None].expand(home.weight.shape)


def check_told(errors: Mapping[str, Errors], rule: str, worker: Parallel, full: Mapping[str, torch.Tensor]) -> None:
    """Against live weights that a receiver has written by this rule."""
    checked = 0
    for name, home in homes(worker.model).items():
        if home.scheme is None:
            continue
        staged = worker.loaded(name, tuple(home.weight.shape), full).double()
        scale = spread_out(home)
        live = home.weight.cpu().double() * scale.cpu()
        off, found = (live - staged).abs(), errors[name][rule]
        most = (127.0 if home.weight.dtype == torch.int8 else 448.0) * scale.cpu()
        assert found.values == staged.numel()
        assert found.clipped == int((staged.abs() > most * (1 + 1 / 256)).sum())
        assert found.flushed == int(((live == 0) & (staged != 0)).sum())
        assert found.squared_error == pytest.approx(float(off.square().sum()), rel=1e-12)
        assert found.squared_values == pytest.approx(float(staged.square().sum()), rel=1e-12)
        assert found.greatest_error == float(off.max())
        checked += 1
    assert checked == len(errors) > 0


def compare_with_live(scheme: str, device: str) -> None:
    full = tensors(3)
    cut = {name: by_rows(tuple(tensor.shape), 3) for name, tensor in full.items()}
    with private_stage(full, cut) as stage:
        lease = stage.write(1, full)
        for rank in (0, 1):
            for rule, scale_rule in RULES.items():
                worker = Parallel(scheme, rank, 2, device)
                receiver = Receiver(worker.model, worker.plan, stage, scale_rule)
                receiver.apply(lease)
                before = digest(worker.model)
                errors = told(worker, stage, lease, RULES)
                assert digest(worker.model) == before
                check_told(errors, rule, worker, full)
                total = summed(errors.values())
                assert total["amax"].clipped == 0
                blocks_of_the_slice = scheme == "fp8_per_block"  # some of them have amax, whatever the rule
                assert blocks_of_the_slice or total["sigma:2.5"].clipped > 0
                receiver.close()  # memory is registered with a GPU once


def digest(model: torch.nn.Module) -> str:
    bytes_of = [p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(bytes_of)).hexdigest()


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_what_is_told_is_the_error_of_live_weights_and_these_stay_as_they_are(scheme: str) -> None:
    compare_with_live(scheme, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", QUANTIZING)
def test_on_a_gpu_it_is_the_same(scheme: str) -> None:
    compare_with_live(scheme, "cuda")


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_a_rule_that_never_clips_has_the_error_of_amax(scheme: str) -> None:
    full = tensors(4)
    with private_stage(full) as stage:
        errors = told(
            Parallel(scheme, 0, 1), stage, stage.write(1, full), {"sigma:1000": ScaleRule(1000.0), "amax": ScaleRule()}
        )
    assert errors
    for found in errors.values():
        assert found["sigma:1000"] == found["amax"]


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_sums_of_two_ranks_are_those_of_the_whole(scheme: str) -> None:
    """Of what two ranks share out; heads of k and v they both hold, and blocks of 160 rows are cut elsewhere."""
    full = tensors(5)
    shared = {"fp8_per_block": ["o.weight"], "int8_per_channel_weight_only": []}.get(
        scheme, ["o.weight", "zero.weight"]
    )
    if scheme != "fp8_per_block":
        shared += ["experts.w13_weight", "experts.w2_weight"]
    cut = {name: by_columns(tuple(tensor.shape), 2) for name, tensor in full.items()}
    with private_stage(full, cut) as stage:
        lease = stage.write(1, full)
        whole_model = told(Parallel(scheme, 0, 1), stage, lease, RULES)
        ranks = [told(Parallel(scheme, rank, 2), stage, lease, RULES) for rank in (0, 1)]
    for rule in RULES:
        all_of_it = summed(whole_model[name] for name in shared)[rule]
        added = summed(rank[name] for rank in ranks for name in shared)[rule]
        assert (added.values, added.clipped, added.flushed) == (all_of_it.values, all_of_it.clipped, all_of_it.flushed)
        assert added.greatest_error == all_of_it.greatest_error > 0
        assert added.relative_rms_error == pytest.approx(all_of_it.relative_rms_error, rel=1e-12)


@pytest.mark.parametrize("scheme", QUANTIZING)
def test_in_how_many_pieces_it_is_looked_at_makes_no_difference(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = tensors(6)
    with private_stage(full) as stage:
        worker, lease = Parallel(scheme, 0, 1), stage.write(1, full)
        at_once = told(worker, stage, lease, RULES)
        monkeypatch.setattr(quantization_error, "CHUNK", 10_000)  # 52 rows, where a block has 128
        in_pieces = told(worker, stage, lease, RULES)
    for name, errors in at_once.items():
        for rule, error in errors.items():
            found = in_pieces[name][rule]
            assert found.squared_error == pytest.approx(error.squared_error, rel=1e-12)
            assert (found.clipped, found.flushed, found.greatest_error) == (
                error.clipped, error.flushed, error.greatest_error,
            )  # fmt: skip


def _publish(stage: Stage, version: int, values: torch.Tensor) -> None:
    stage.begin(version)
    stage.put("w", values)
    stage.commit().wait()


@contextmanager
def _staged(daemon: RunningDaemon, values: torch.Tensor) -> Iterator[Stage]:
    with Stage.open("policy", rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare({"w": values})
        _publish(stage, 1, values)
        yield stage


def refused(answer: Mapping[str, str]) -> StagingError:
    return from_code(answer["refused"], answer["what"], answer["remedy"], {})


class Told:
    """Stands for the thread that reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[object, ...]] = []

    def tell(self, *report: object) -> None:
        self.reports.append(report)


def test_parts_of_a_fused_parameter_are_told_apart() -> None:
    calm, wild = torch.ones(2, COLUMNS).bfloat16(), ones_and_a_giant()[:3]
    model = torch.nn.Module()
    model.w = linear("fp8_per_tensor", 5, COLUMNS)
    entries = tuple(
        PlanEntry(
            name, "bfloat16", whole(part.shape), Region("w.weight", row * COLUMNS, tuple(part.shape), (COLUMNS, 1))
        )
        for name, part, row in (("calm", calm, 0), ("wild", wild, 2))
    )
    with private_stage({"calm": calm, "wild": wild}) as stage:
        version = stage.write(1, {"calm": calm, "wild": wild})
        found = tensor_errors(ReadPlan(entries, 0), homes(model), stage.catalog, version, RULES)["w.weight"]
        whole_one = quantization_errors(ReadPlan(entries, 0), homes(model), stage.catalog, version, RULES)["w.weight"]
    assert {name: errors["amax"].values for name, errors in found.items()} == {"calm": 128, "wild": 192}
    # They share the giant's scale, by which ones become zero.
    assert {name: errors["amax"].flushed for name, errors in found.items()} == {"calm": 128, "wild": 191}
    assert whole_one == summed(found.values())


def test_a_worker_tells_of_the_version_that_it_holds_or_refuses(daemon: RunningDaemon) -> None:
    attachment = pytest.importorskip("stagingd_vllm.attachment")
    extension = pytest.importorskip("stagingd_vllm.extension")
    values = ones_and_a_giant()
    model, plan = one_matrix("fp8_per_tensor")
    worker = extension.StagingdWorkerExtension()
    assert "attached to no stage" in str(refused(worker.stagingd_quantization_error()))
    with (
        _staged(daemon, values) as stage,
        Reader.attach("policy", engine="e", rank=0, ranks=1, socket=daemon.socket) as reader,
        Reader.attach("policy", engine="another", rank=0, ranks=1, socket=daemon.socket) as another,
    ):
        receiver = Receiver(model, plan, reader, ScaleRule(1.0))
        place = attachment.Place("e", 0, 1)
        told = Told()
        worker.stagingd_attachment = attachment.Attachment(place, reader, receiver, "sigma:1", reporter=told)
        assert "hold no version" in str(refused(worker.stagingd_quantization_error()))
        worker.stagingd_attachment.update(version=1)
        answer = worker.stagingd_quantization_error()
        assert (answer["version"], answer["rank"], answer["scale_rule"]) == (1, 0, "sigma:1")
        assert list(answer["total"]) == ["sigma:1", "amax"]
        assert answer["parameters"] == {"w.weight": answer["total"]}
        assert answer["total"]["amax"]["flushed"] == 255
        assert answer["total"]["sigma:1"]["clipped"] == 1
        [(what, version, _, _, [by_layer])] = told.reports[1:]
        assert (what, version, by_layer.layer, by_layer.clipped, by_layer.values) == ("examined", 1, "w", 1, 256)
        _publish(stage, 2, values)
        assert worker.stagingd_quantization_error() == answer  # version 1 is still there
        another.lease(version=2).release()
        assert worker.stagingd_quantization_error() == answer  # nobody has begun the next
        _publish(stage, 3, values)
        error = refused(worker.stagingd_quantization_error())
        assert isinstance(error, OutOfOrder)
        assert "version 1 has been replaced" in str(error)
        model.w.weight.view(torch.uint8).zero_()
        assert "hold no version" in str(refused(worker.stagingd_quantization_error()))
