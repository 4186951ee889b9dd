# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The numeric health of versions: layers, moments merged by layer, what workers report, and what is remembered."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import Future
from functools import reduce

import numpy as np
import pytest
import torch
from daemons import RunningDaemon
from hypothesis import given
from hypothesis import strategies as st
from private_stage import by_columns, by_rows, private_stage
from stagingd_client import Stage
from stagingd_vllm import Reader
from stagingd_vllm.quantization_error import QuantizationError, layer_errors

from stagingd import health as remembered
from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import MessageRefused, UnknownTensor
from stagingd.examination import Examined, Examiner, LayerMoments
from stagingd.health import Health, LayerError, VersionHealth
from stagingd.hosted import HostedStage
from stagingd.layers import MOST_LAYERS, REST, Layers
from stagingd.moments import ALL_GRIDS, Grid, Moments, merge_groups, merged
from stagingd.progress import Progress
from stagingd.web import api
from stagingd.web.snapshot import StageSnapshot

# Layers


def test_few_tensors_are_layers_by_themselves() -> None:
    layers = Layers.from_tensors(["model.layers.0.a", "model.layers.0.b", "head"])
    assert layers.names == ("model.layers.0.a", "model.layers.0.b", "head")
    assert layers.of == {"model.layers.0.a": 0, "model.layers.0.b": 1, "head": 2}


def test_many_tensors_are_told_of_by_block() -> None:
    experts = [f"model.layers.{n}.mlp.experts.{e}.up.weight" for n in range(3) for e in range(MOST_LAYERS)]
    layers = Layers.from_tensors(["embed.weight", *experts, "norm.weight"])
    assert layers.names == ("embed.weight", "model.layers.0", "model.layers.1", "model.layers.2", "norm.weight")
    assert layers.of["model.layers.2.mlp.experts.7.up.weight"] == 3


def test_there_are_never_more_layers_than_are_allowed() -> None:
    names = [f"blocks.{n}.w" for n in range(3 * MOST_LAYERS)]
    layers = Layers.from_tensors(names)
    assert len(layers.names) == MOST_LAYERS
    assert layers.names[layers.of[names[-1]]] == REST
    assert layers.names[layers.of[names[0]]] == "blocks.0"


# Moments by layer

cells = st.tuples(st.integers(0, 3), st.lists(st.floats(-1e6, 1e6, width=32), max_size=6), st.integers(0, 2))


def moments_of(values: list[float], nonfinite: int) -> Moments:
    exact = np.asarray(values, np.float64)
    mean = exact.mean() if len(exact) else 0.0
    m2, amax = ((exact - mean) ** 2).sum(), np.abs(exact).max(initial=0.0)
    fields = (np.int64(len(exact)), np.float64(mean), np.float64(m2), np.float32(amax), np.int64(nonfinite))
    return Moments(*(np.asarray([field]) for field in fields))


@given(st.lists(cells, max_size=12))
def test_merging_by_groups_is_merging_pairwise(some: list[tuple[int, list[float], int]]) -> None:
    parts = [moments_of(values, nonfinite) for _, values, nonfinite in some]
    all_of = Moments(
        *(
            np.concatenate([getattr(Moments.empty((0,)), f), *(getattr(p, f) for p in parts)])
            for f in vars(Moments.empty((1,)))
        )
    )
    found = merge_groups(all_of, np.asarray([group for group, *_ in some], np.int64), 4)
    for group in range(4):
        wanted = reduce(merged, [p for p, (g, *_) in zip(parts, some, strict=True) if g == group], Moments.empty((1,)))
        at = slice(group, group + 1)
        assert found.count[at] == wanted.count
        assert found.amax[at] == wanted.amax
        assert found.nonfinite[at] == wanted.nonfinite
        np.testing.assert_allclose(found.mean[at], wanted.mean, rtol=1e-9, atol=1e-6)
        np.testing.assert_allclose(found.m2[at], wanted.m2, rtol=1e-9, atol=1e-3)


TENSORS = {
    "blocks.0.up": 3 + 2 * torch.randn(300, 130, generator=torch.Generator().manual_seed(1)),
    "blocks.0.down": torch.randn(64, 300, generator=torch.Generator().manual_seed(2)),
    "head": torch.full((7,), -0.5),
    "ids": torch.arange(5),
}


@pytest.mark.parametrize("grids", [ALL_GRIDS, (Grid.ROW,), (Grid.BLOCK, Grid.ROW)])
def test_moments_of_layers_are_those_of_all_their_values(grids: tuple[Grid, ...]) -> None:
    cut = {name: by_rows(tensor.shape, 3) for name, tensor in TENSORS.items()} | {
        "blocks.0.down": by_columns((64, 300), 3)
    }
    layers = Layers(("blocks.0", "head", "ids"), {"blocks.0.up": 0, "blocks.0.down": 0, "head": 1, "ids": 2})
    poisoned = TENSORS | {
        "blocks.0.up": TENSORS["blocks.0.up"].index_put((torch.tensor(5), torch.tensor(7)), torch.tensor(float("nan")))
    }
    with private_stage(TENSORS, cut, grids) as stage:
        stage.write(0, poisoned)
        found = LayerMoments(stage.catalog, layers).of(stage.made.moments(0))
    values = torch.cat([poisoned["blocks.0.up"].ravel(), poisoned["blocks.0.down"].ravel()]).double()
    values = values[values.isfinite()]
    assert found.count.tolist() == [len(values), 7, 0]
    assert found.nonfinite.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.mean, [values.mean(), -0.5, 0], rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(found.variance), [values.std(correction=0), 0, 0], rtol=1e-4)
    np.testing.assert_array_equal(found.amax, np.float32([values.abs().max(), 0.5, 0]))


def test_whatever_trainers_store_is_told_of_without_a_complaint() -> None:
    garbage = np.random.default_rng(0)
    with private_stage(TENSORS) as stage, warnings.catch_warnings():
        warnings.simplefilter("error")
        layers = Layers.from_tensors([tensor.name for tensor in stage.catalog.tensors if tensor.has_moments])
        places, memory = LayerMoments(stage.catalog, layers), stage.made.slot(0)
        for attempt in range(50):
            at, end = stage.catalog.moments_offset, stage.catalog.progress_offset
            memory[at:end] = garbage.bytes(end - at) if attempt else b"\xff" * (end - at)
            found = VersionHealth(1, attempt, 0, places.of(stage.made.moments(0)))
            assert len(found.layers(layers.names)) == len(layers.names)
            told = StageSnapshot(None, (), {}, 0, layers.names, (found,))
            json.loads(api.health(told, None, 0), parse_constant=pytest.fail)  # NaN and Infinity are no JSON


# What is remembered

LAYERS = Layers(("a", "b"), {"x": 0, "y": 1})


def error(layer: str, values: int = 100, clipped: int = 1, flushed: int = 2, squared_error: float = 4.0) -> LayerError:
    return LayerError(
        layer=layer,
        values=values,
        clipped=clipped,
        flushed=flushed,
        squared_error=squared_error,
        squared_values=400.0,
    )


def two_layers() -> Moments:
    parts = [moments_of([1.0, 3.0], 0), moments_of([-5.0], 2)]
    return Moments(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def test_what_workers_tell_adds_up_and_what_nobody_tells_is_not_known() -> None:
    health = Health()
    health.sealed(3, 1)
    health.reported(LAYERS, 3, "e", 0, [error("a")])
    health.reported(LAYERS, 3, "e", 1, [error("a", values=300, clipped=0, squared_error=12.0)])
    health.reported(LAYERS, 3, "e", 1, [error("a", clipped=100)])  # it has told
    assert health.versions[0].layers(LAYERS.names) == ()
    health.examined(3, 1, two_layers())
    a, b = health.versions[0].layers(LAYERS.names)
    assert (a.layer, a.amax, a.mean, a.std, a.nonfinite) == ("a", 3.0, 2.0, 1.0, 0)
    assert (a.clipped_share, a.flushed_share, a.relative_error) == (1 / 400, 4 / 400, (16 / 800) ** 0.5)
    assert (b.amax, b.nonfinite, b.clipped_share, b.flushed_share, b.relative_error) == (5.0, 2, None, None, None)


def test_an_error_of_a_layer_that_is_not_there_is_refused_whole() -> None:
    health = Health()
    health.sealed(3, 1)
    with pytest.raises(UnknownTensor, match="'c'"):
        health.reported(LAYERS, 3, "e", 0, [error("a"), error("c")])
    assert health.versions[0].errors is None


def test_moments_of_another_attempt_do_not_count() -> None:
    health = Health()
    health.sealed(3, 2)
    health.examined(3, 1, two_layers())
    health.examined(9, 1, two_layers())
    assert [one.moments for one in health.versions] == [None]


def test_health_stays_bounded_whatever_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "VERSIONS", 3)
    monkeypatch.setattr(remembered, "REPORTERS", 2)
    health = Health()
    for version in range(10):
        health.sealed(version, version)
    for rank in range(10):
        health.reported(LAYERS, 9, "e", rank, [error("a", values=1)])
        health.reported(LAYERS, rank, "f", rank, [error("a", values=1)])
    assert [one.version for one in health.versions][-3:] == [7, 8, 9]
    assert len(health.versions) == 3
    assert health.versions[-1].errors is not None
    assert health.versions[-1].errors[0, 0] == 2


def test_every_change_raises_the_revision_of_its_version() -> None:
    health = Health()
    health.sealed(1, 1)
    health.sealed(2, 2)
    before = max(one.revision for one in health.versions)
    health.reported(LAYERS, 1, "e", 0, [error("b")])
    assert [one.version for one in health.versions if one.revision > before] == [1]


# Looking at slots in the background


class Later:
    """Does what it is given when it is told to."""

    def __init__(self) -> None:
        self.work: list[tuple[object, Future[Examined]]] = []

    def submit(self, work: object) -> Future[Examined]:
        self.work.append((work, Future()))
        return self.work[-1][1]

    def run(self) -> None:
        for work, future in self.work:
            future.set_result(work())  # type: ignore[operator]
        self.work.clear()


def hosted(stage: object) -> HostedStage:
    """A stage in which version 1 is sealed, by attempt 1 in slot 0."""
    made = HostedStage("policy", 1, wire.StageOptions(), lambda *_: None, lambda: 0.0)
    made.segment = stage  # type: ignore[assignment]
    made.buffer.begin(0, 1)
    made.segment.progress(0).begin(1)
    made.buffer.commit(0, 1)
    made._seal(made.segment)
    return made


def test_a_sealed_version_is_looked_at_once() -> None:
    later = Later()
    with private_stage({"w": torch.ones(4, 4)}) as stage:
        stage.write(0, {"w": torch.full((4, 4), 2.0)})
        made, examiner = hosted(stage.made), Examiner(later.submit)
        examiner.mind([made])
        assert made.health.versions[0].moments is None
        later.run()
        examiner.mind([made])
        found = made.health.versions[0].moments
        assert found is not None
        assert found.amax.tolist() == [2.0]
        assert not later.work


def test_what_was_read_while_the_slot_was_filled_anew_is_discarded() -> None:
    later = Later()
    with private_stage({"w": torch.ones(4, 4)}) as stage:
        stage.write(0, {"w": torch.ones(4, 4)})
        made, examiner = hosted(stage.made), Examiner(later.submit)
        examiner.mind([made])
        progress: Progress = stage.made.progress(0)
        progress.begin(3)  # the trainers write from now on
        later.run()
        examiner.mind([made])
        assert made.health.versions[0].moments is None


def test_a_failure_in_the_background_ends_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    later = Later()
    with private_stage({"w": torch.ones(4, 4)}) as stage:
        made, examiner = hosted(stage.made), Examiner(later.submit)
        examiner.mind([made])
        later.work.pop()[1].set_exception(MemoryError("no room"))
        examiner.mind([made])
    told = capfd.readouterr()
    assert "no room" in told.out + told.err
    assert made.health.versions[0].moments is None


# Workers


def test_errors_of_tensors_add_up_to_those_of_layers() -> None:
    of = [("x", QuantizationError(10, 1, 2, 3.0, 4.0, 5.0)), ("y", QuantizationError(1)), ("x", QuantizationError(5))]
    a, b = layer_errors(LAYERS, of)
    assert (a.layer, a.values, a.clipped, a.flushed, a.squared_error, a.squared_values) == ("a", 15, 1, 2, 3.0, 4.0)
    assert (b.layer, b.values) == ("b", 1)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_errors_that_cannot_be_are_refused(wrong: float) -> None:
    report = wire.Report(stage="s", engine="e", rank=0, version=1, what="examined", seconds=0.0, bytes=0)
    plain = report.model_dump() | {"errors": [error("a").model_dump() | {"squared_error": wrong}]}
    with pytest.raises(MessageRefused, match="squared_error"):
        wire.decode_request(wire.msgpack.packb(plain))


def test_a_worker_that_reports_a_layer_that_is_not_there_is_told_so(daemon: RunningDaemon, stage_name: str) -> None:
    report = wire.Report(
        stage=stage_name, engine="e", rank=0, version=1, what="examined", seconds=0.0, bytes=0, errors=(error("no"),)
    )
    with Stage.open(stage_name, rank=0, ranks=1, socket=daemon.socket) as stage:
        stage.declare({"w": torch.ones(8, 4)})
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket):
            with Connection(daemon.socket, name="test") as connection, pytest.raises(UnknownTensor, match="layer 'no'"):
                connection.request(report, wire.Done)
