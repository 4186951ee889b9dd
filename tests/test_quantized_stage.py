# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Trainer ranks on a real daemon that quantize by the moments of all of them: bytes are those of the whole tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon
from private_stage import by_columns, by_rows
from stagingd_client import LocalShard, Stage
from stagingd_client.quantize import quantized
from stagingd_vllm import Reader
from test_stage import in_parallel

from stagingd import wire
from stagingd.boxes import whole
from stagingd.errors import CatalogMismatch, DeadlineExceeded, OutOfOrder, UnknownTensor, VersionAborted
from stagingd.format_scales import scales
from stagingd.formats import Quantization, QuantizationUnreadable, StageFormat, read_quantization
from stagingd.moments import cells_of

RANKS = 2
FORMATS = list(StageFormat)
CUTS = {"q": by_rows((300, 256), RANKS), "k": by_columns((130, 256), RANKS), "experts": by_rows((3, 200, 128), RANKS)}
QUANTIZED = (("q", "k"), ("experts",))


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (300, 256), "k": (130, 256), "experts": (3, 200, 128), "norm": (256,)}
    return {name: torch.randn(shape, generator=generator) * (1 + len(name)) for name, shape in shapes.items()}


def held(rank: int, tensors: dict[str, torch.Tensor]) -> dict[str, LocalShard]:
    """A rank's shards."""
    boxes = {name: CUTS[name][rank] if name in CUTS else whole(tuple(tensor.shape)) for name, tensor in tensors.items()}
    return {
        name: LocalShard(tensor[boxes[name].slices].clone(), tuple(tensor.shape), boxes[name].offsets)
        for name, tensor in tensors.items()
    }


def groups_of(form: StageFormat) -> tuple[tuple[str, ...], ...]:
    """What is quantized: of stacked matrices each has a scale where a scale is a tensor's, so these are not."""
    return QUANTIZED[:1] if form is StageFormat.FP8_PER_TENSOR else QUANTIZED


@contextmanager
def trainers(daemon: RunningDaemon, name: str, form: StageFormat, timeout_s: float = 10.0) -> Iterator[list[Stage]]:
    quantization = Quantization(format=form, device="cpu", groups=groups_of(form))
    with ExitStack() as open_stages:
        stages = [
            open_stages.enter_context(
                Stage.open(
                    name, rank=rank, ranks=RANKS, socket=daemon.socket, quantization=quantization, timeout_s=timeout_s
                )
            )
            for rank in range(RANKS)
        ]
        raised = in_parallel(*(lambda stage=stage: stage.declare(held(stage.rank, weights(0))) for stage in stages))
        assert raised == [None] * RANKS
        yield stages


def put_all(stage: Stage, version: int, tensors: dict[str, torch.Tensor]) -> None:
    stage.begin(version)
    for name, shard in held(stage.rank, tensors).items():
        stage.put(name, shard)


def publish(stages: list[Stage], version: int, tensors: dict[str, torch.Tensor]) -> None:
    for stage in stages:
        put_all(stage, version, tensors)
    for publication in [stage.commit() for stage in stages]:
        publication.wait()


def expected(form: StageFormat, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Made from whole tensors."""
    values = tensors[name].bfloat16()
    shape = tuple(values.shape)
    if form is StageFormat.FP8_PER_TENSOR:
        group = next(group for group in QUANTIZED if name in group)
        limits = (
            torch.stack([tensors[one].bfloat16().abs().amax() for one in group])
            .amax()
            .float()
            .reshape((1,) * len(shape))
        )
    elif form is StageFormat.FP8_PER_BLOCK:
        cells = cells_of(form.grid, shape)
        limits = torch.zeros(cells.lengths)
        for index in torch.cartesian_prod(*map(torch.arange, cells.lengths)).tolist():
            *leading, row, column = index
            block = values[(*leading, slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))]
            limits[tuple(index)] = block.abs().amax().float()
    else:
        limits = values.abs().amax(-1, keepdim=True).float()
    made = torch.from_numpy(scales(form, "cpu", limits.numpy()))
    return quantized(values, made, form, whole(shape), shape)


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_are_those_of_the_whole_tensors_however_they_are_cut(
    daemon: RunningDaemon, stage_name: str, form: StageFormat
) -> None:
    with (
        trainers(daemon, stage_name, form) as stages,
        Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader,
    ):
        for version in (1, 2, 3):
            publish(stages, version, weights(version))
            with reader.lease() as lease:
                for name in itertools.chain(*groups_of(form)):
                    read = lease.read(name)
                    assert str(read.dtype) == f"torch.{form.dtype}"
                    assert torch.equal(read.view(torch.uint8), expected(form, name, weights(version)).view(torch.uint8))
                assert torch.equal(lease.read("norm"), weights(version)["norm"].bfloat16())


def test_a_stage_of_quantized_bytes_takes_about_half_the_memory(daemon: RunningDaemon, stage_name: str) -> None:
    with trainers(daemon, stage_name, StageFormat.FP8_PER_CHANNEL) as stages:
        catalog = stages[0].catalog
        values = sum(tensor.numel() * 2 for tensor in weights(0).values())
        assert catalog.tensor_bytes < 0.51 * values


def test_a_rank_that_does_not_measure_is_named_within_the_deadline(daemon: RunningDaemon, stage_name: str) -> None:
    with trainers(daemon, stage_name, StageFormat.FP8_PER_TENSOR, timeout_s=0.5) as stages:
        for stage in stages:
            put_all(stage, 1, weights(1))
        with pytest.raises(DeadlineExceeded, match=r"version 1 to be measured.*trainer rank 1"):
            stages[0].commit().wait()
        with pytest.raises(VersionAborted, match="awaited: trainer rank 1"):
            stages[1].commit().wait()
        publish(stages, 2, weights(2))


def test_a_rank_that_gives_up_ends_the_waiting_of_the_others(daemon: RunningDaemon, stage_name: str) -> None:
    with trainers(daemon, stage_name, StageFormat.FP8_PER_TENSOR) as stages:
        for stage in stages:
            put_all(stage, 1, weights(1))
        publication = stages[0].commit()
        stages[1].abort("it has had enough")
        with pytest.raises(VersionAborted, match="it has had enough"):
            publication.wait()
        publish(stages, 2, weights(2))


def test_who_waits_for_a_version_waits_longer_than_the_exchange_of_moments_may_take(
    daemon: RunningDaemon, stage_name: str
) -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("w",),))
    deadlines = []
    for number, option in enumerate((None, quantization)):
        name = f"{stage_name}-{number}"
        with Stage.open(name, rank=0, ranks=1, socket=daemon.socket, quantization=option, timeout_s=7.0) as stage:
            stage.declare({"w": torch.ones(8, 8)})
            stage.begin(1)
            stage.put("w", torch.ones(8, 8))
            publication = stage.commit()
            publication.wait()
            deadlines.append(publication.deadline_s)
    plain, quantized_too = deadlines
    assert quantized_too >= plain + 7.0


def test_shards_stay_as_they_are_until_the_version_is_committed(daemon: RunningDaemon, stage_name: str) -> None:
    with trainers(daemon, stage_name, StageFormat.FP8_PER_TENSOR) as stages:
        for stage in stages:
            put_all(stage, 1, weights(1))
        with pytest.raises(OutOfOrder, match="fence before version 1 is committed"):
            stages[0].fence()
        publications = [stage.commit() for stage in stages]
        for stage in stages:
            stage.fence()
        for publication in publications:
            publication.wait()


def test_a_commit_before_all_have_measured_is_refused(daemon: RunningDaemon, stage_name: str) -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_CHANNEL, device="cpu", groups=(("w",),))
    tensor = torch.ones(8, 8)
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, quantization=quantization) as stage:
        stage.declare({"w": tensor})
        stage.begin(1)
        stage.put("w", tensor)
        stage._current._slot.result(10)  # type: ignore[union-attr]
        request = wire.Commit(stage=stage_name, rank=0, version=1, boxes=1, timeout_s=1.0)
        with pytest.raises(OutOfOrder, match="before all ranks have measured it"):
            stage._connection.request(request, wire.Sealed)
        stage.commit().wait()


def test_a_stage_whose_trainers_do_not_quantize_is_not_measured(daemon: RunningDaemon, stage_name: str) -> None:
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare({"w": torch.ones(8, 8)})
        request = wire.Measure(stage=stage_name, rank=0, version=1, timeout_s=1.0)
        with pytest.raises(OutOfOrder, match="whose trainers do not quantize"):
            stage._connection.request(request, wire.Measured)


def test_ranks_that_quantize_otherwise_are_refused(daemon: RunningDaemon, stage_name: str) -> None:
    groups = (QUANTIZED, (("q",), ("k",), ("experts",)))
    stages = [
        Stage.open(
            stage_name,
            rank=rank,
            ranks=RANKS,
            socket=daemon.socket,
            quantization=Quantization(format=StageFormat.FP8_PER_BLOCK, groups=groups[rank]),
            timeout_s=1.0,
        )
        for rank in range(RANKS)
    ]
    raised = in_parallel(*(lambda stage=stage: stage.declare(held(stage.rank, weights(0))) for stage in stages))
    refused = next(error for error in raised if isinstance(error, CatalogMismatch))
    assert "it quantizes otherwise" in refused.what
    for stage in stages:
        stage.close()


def test_what_is_to_be_quantized_has_to_be_there(daemon: RunningDaemon, stage_name: str) -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_TENSOR, groups=(("w", "missing"),))
    with (
        Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket, quantization=quantization) as stage,
        pytest.raises(UnknownTensor, match="'missing' is to be quantized, and no rank declares it"),
    ):
        stage.declare({"w": torch.ones(8, 8)})


def test_what_is_quantized_can_stand_in_a_file(tmp_path: Path) -> None:
    quantization = Quantization(format=StageFormat.FP8_PER_BLOCK, groups=(("a", "b"), ("c",)))
    file = tmp_path / "quantization.json"
    file.write_text(quantization.model_dump_json())
    assert read_quantization(file) == quantization
    file.write_text('{"format": "fp4"}')
    with pytest.raises(QuantizationUnreadable, match="does not say what trainers quantize"):
        read_quantization(file)
    with pytest.raises(QuantizationUnreadable, match="No such file"):
        read_quantization(tmp_path / "none.json")
