# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The pages on the protocol and the segment: a client that was written from them alone gets along with a real daemon,
and they list what there is.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import independent_client
import numpy as np
import pytest
import torch
import zmq
from daemons import RunningDaemon
from documents import tables
from independent_client import PAGES, Client, Refused, Segment, Values, indices, scale_of, told
from stagingd_client.quantize import quantized

from stagingd import catalog, superblock, wire
from stagingd import segment as ours
from stagingd.boxes import whole
from stagingd.format_scales import scales
from stagingd.formats import StageFormat
from stagingd.moments import Grid, cells_of, merge_boxes
from stagingd.progress import Needs

WAIT_S = 20.0
SHAPE = (6, 140)
HALVES = [([0, 0], [6, 100]), ([0, 100], [6, 40])]
"""What two ranks hold: the cut falls inside a block."""


def value(index: tuple[int, ...], version: int) -> float:
    """A number that bfloat16 holds."""
    return float((sum(index) * 7 + version) % 31 - 15) / 4


def values(version: int) -> Values:
    return {index: value(index, version) for index in indices(([0, 0], SHAPE))}


class Trainers:
    """Two ranks, each with its connection, and the stage that they have declared."""

    def __init__(self, daemon: RunningDaemon, stage: str, **options: object) -> None:
        self.stage = stage
        self.ranks = [Client(daemon.folder, f"trainer rank {rank}") for rank in (0, 1)]
        for rank, client in enumerate(self.ranks):
            tensors = [
                {"name": "w", "dtype": "bfloat16", "shape": SHAPE, "boxes": [HALVES[rank]]},
                {"name": "steps", "dtype": "int64", "shape": [], "boxes": [([], [])]},
            ]
            aliases = [{"alias": "tied", "name": "w"}] if rank else []
            fields = {"stage": stage, "rank": rank, "ranks": 2, "options": options, "timeout_s": WAIT_S}
            self.asked = client.send("declare", tensors=tensors, aliases=aliases, **fields), client
        self.segment = Segment(self.asked[1].answer(self.asked[0])["segment"], writable=True)

    def publish(self, version: int, of: Values) -> None:
        commits = []
        for rank, client in enumerate(self.ranks):
            about = {"stage": self.stage, "rank": rank, "version": version, "timeout_s": WAIT_S}
            slot = client.ask("begin", **about)["slot"]
            owned = self.segment.owned_by(rank)
            for one in owned:
                if self.segment.catalog["tensors"][one["tensor"]]["name"] == "w":
                    self.segment.write(slot, one, of)
            commits.append(client.send("commit", boxes=len(owned), **about))
        for client, commit in zip(self.ranks, commits, strict=True):
            assert client.answer(commit, WAIT_S)["version"] == version

    def close(self) -> None:
        for client in self.ranks:
            client.close()
        self.segment.close()


@pytest.fixture
def trainers(daemon: RunningDaemon, stage_name: str) -> Iterator[Trainers]:
    with closing(Trainers(daemon, stage_name)) as trainers:
        yield trainers


@pytest.fixture
def engine(daemon: RunningDaemon, trainers: Trainers) -> Iterator[Client]:
    with closing(Client(daemon.folder, "engine")) as client:
        attach = {"stage": trainers.stage, "engine": "e", "rank": 0, "ranks": 1, "timeout_s": WAIT_S}
        assert client.ask("attach", **attach)["segment"]
        yield client


def leased(engine: Client, stage: str, **asked: int) -> dict[str, Any]:
    return engine.ask("lease", stage=stage, engine="e", rank=0, timeout_s=WAIT_S, **asked)


# A client of these pages alone


def test_the_client_imports_nothing_but_sockets_msgpack_and_the_standard_library() -> None:
    tree = ast.parse(Path(independent_client.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"msgpack", "zmq"}


def test_it_stages_versions_and_reads_them(trainers: Trainers, engine: Client) -> None:
    trainers.publish(1, values(1))
    with closing(Segment(segment_of(engine, trainers), writable=False)) as segment:
        first = leased(engine, trainers.stage)
        assert first["version"] == 1
        assert 0 < first["deadline_s"] <= 60
        trainers.publish(2, values(2))  # into the other slot: what is leased stays as it is
        box = ([1, 90], [4, 30])
        assert segment.read(first["slot"], "w", box) == {index: value(index, 1) for index in indices(box)}
        engine.ask("release", stage=trainers.stage, lease=first["lease"], rank=0)
        second = leased(engine, trainers.stage, newer_than=1)
        assert (second["version"], second["slot"]) == (2, 1 - first["slot"])
        assert segment.read(second["slot"], "tied", box) == {index: value(index, 2) for index in indices(box)}
        engine.ask("release", stage=trainers.stage, lease=second["lease"], rank=0)


def segment_of(engine: Client, trainers: Trainers) -> str:
    """Who attaches once more is told once more."""
    attach = {"stage": trainers.stage, "engine": "e", "rank": 0, "ranks": 1, "timeout_s": WAIT_S}
    return str(engine.ask("attach", **attach)["segment"])


def test_stagingd_finds_its_bytes_and_moments_where_they_belong(trainers: Trainers, engine: Client) -> None:
    trainers.publish(1, values(1))
    slot = leased(engine, trainers.stage)["slot"]
    mapped = ours.open_existing(segment_of(engine, trainers), writable=False)
    w = mapped.catalog.tensor("tied")
    raw = np.frombuffer(mapped.slot(slot), np.uint16, math.prod(SHAPE), w.offset).astype(np.uint32) << 16
    array = raw.view(np.float32).reshape(SHAPE)
    wanted = np.array([value(index, 1) for index in indices(([0, 0], SHAPE))], np.float32).reshape(SHAPE)
    np.testing.assert_array_equal(array, wanted)
    for grid in Grid:
        region = cells_of(grid, w.shape)
        stored = mapped.moments(slot)
        parts = [
            (
                cells_of(grid, w.shape, one.box),
                stored.of_box(mapped.catalog.first_cell(one, grid), grid, w.shape, one.box),
            )
            for one in mapped.catalog.owned_of("w")
        ]
        merged = merge_boxes(region, parts)
        for cell in indices(region):
            mine = trainers.segment.merged(slot, "w", grid, cell)
            assert {name: float(getattr(merged, name)[cell]) for name in mine} == pytest.approx(mine)
        assert merged.count.sum() == array.size
        assert merged.amax.max() == np.abs(array).max()
    del raw, array, stored, parts
    mapped.close()


def test_its_moments_are_those_of_the_values(trainers: Trainers, engine: Client) -> None:
    trainers.publish(1, values(1))
    slot = leased(engine, trainers.stage)["slot"]
    block = [value(index, 1) for index in indices(([0, 0], [6, 128]))]
    mean = sum(block) / len(block)
    assert trainers.segment.merged(slot, "w", "block", (0, 0)) == pytest.approx(
        {
            "count": len(block),
            "mean": mean,
            "m2": sum((one - mean) ** 2 for one in block),
            "amax": max(map(abs, block)),
            "nonfinite": 0,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("stage_format", [*StageFormat])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_its_scales_are_those_that_engines_make(stage_format: StageFormat, device: str) -> None:
    amax = np.concatenate([np.zeros(1), np.geomspace(1e-9, 1e5, 400)]).astype(np.float32)
    mine = [scale_of(stage_format.value, device, float(one)) for one in amax]
    np.testing.assert_array_equal(np.array(mine, np.float32), scales(stage_format, device, amax))


def test_it_quantizes_before_it_stages(daemon: RunningDaemon, stage_name: str) -> None:
    """Ranks have columns here, so that a row's scale follows from the moments of both."""
    kept: Values = {index: one or 0.25 for index, one in values(1).items()}  # a row of zeros has a scale of zero
    quantization = {"format": "int8_per_channel_weight_only", "groups": [["w"]]}
    with closing(Trainers(daemon, stage_name, quantization=quantization)) as trainers:
        about = [{"stage": stage_name, "rank": rank, "version": 1, "timeout_s": WAIT_S} for rank in (0, 1)]
        ranks = list(zip(trainers.ranks, about, strict=True))
        slot, _ = (client.ask("begin", **fields)["slot"] for client, fields in ranks)
        w = trainers.segment.tensor("w")
        assert (w["dtype"], w["quantized_from"], w["group"]) == ("int8", "bfloat16", 0)
        number = trainers.segment.catalog["tensors"].index(w)
        owned = [one for one in trainers.segment.catalog["owned"] if one["tensor"] == number]
        for one in owned:
            trainers.segment.write_moments(slot, one, kept)
        assert all_answers([(client, client.send("measure", **fields)) for client, fields in ranks]) == ["measured"] * 2
        for one in owned:
            trainers.segment.write_int8(slot, one, kept)
        boxes = [len(trainers.segment.owned_by(rank)) for rank in (0, 1)]
        commits = [(c, c.send("commit", boxes=n, **fields)) for n, (c, fields) in zip(boxes, ranks, strict=True)]
        assert all_answers(commits) == ["sealed"] * 2
        held = trainers.segment.read(slot, "w", ([0, 0], SHAPE))
    matrix = torch.tensor([*kept.values()]).view(SHAPE).bfloat16()
    limits = matrix.float().abs().amax(1, keepdim=True).numpy()
    made = torch.from_numpy(scales(StageFormat.INT8_PER_CHANNEL, "cuda", limits))
    wanted = quantized(matrix, made, StageFormat.INT8_PER_CHANNEL, whole(SHAPE), SHAPE)
    assert [*held.values()] == wanted.flatten().tolist()


def test_it_reads_a_version_as_it_lands(trainers: Trainers, engine: Client) -> None:
    about = [{"stage": trainers.stage, "rank": rank, "version": 1, "timeout_s": WAIT_S} for rank in (0, 1)]
    begun = [client.ask("begin", **fields) for client, fields in zip(trainers.ranks, about, strict=True)]
    slot, attempt = begun[0]["slot"], begun[0]["attempt"]
    lease = leased(engine, trainers.stage, early=True)
    assert (lease["version"], lease["slot"], lease["attempt"]) == (1, slot, attempt)
    wanted = values(1)
    for rank in (0, 1):
        assert not trainers.segment.has_landed(slot, "tied", attempt)
        trainers.segment.start(slot, rank, attempt)
        owned = trainers.segment.owned_by(rank)
        for number, one in enumerate(owned, 1):
            if one["tensor"] == 0:
                trainers.segment.write(slot, one, wanted)
            trainers.segment.land(slot, rank, number)
    assert trainers.segment.has_landed(slot, "tied", attempt)
    mapped = ours.open_existing(segment_of(engine, trainers), writable=False)
    assert mapped.progress(slot).has(attempt, Needs.of(mapped.catalog, ["w", "steps"]))
    mapped.close()
    assert trainers.segment.read(slot, "w", ([0, 0], SHAPE)) == wanted
    release = engine.send("release", stage=trainers.stage, lease=lease["lease"], rank=0, timeout_s=WAIT_S)
    boxes = [len(trainers.segment.owned_by(rank)) for rank in (0, 1)]
    commits = [
        (client, client.send("commit", boxes=number, **fields))
        for client, number, fields in zip(trainers.ranks, boxes, about, strict=True)
    ]
    assert all_answers([*commits, (engine, release)]) == ["sealed", "sealed", "done"]


def test_what_it_read_early_of_a_version_that_is_aborted_does_not_count(trainers: Trainers, engine: Client) -> None:
    about = {"stage": trainers.stage, "rank": 0, "version": 1}
    begun = trainers.ranks[0].ask("begin", timeout_s=WAIT_S, **about)
    lease = leased(engine, trainers.stage, early=True)
    trainers.ranks[0].ask("abort", reason="a test", **about)
    with pytest.raises(LookupError):
        trainers.segment.has_landed(begun["slot"], "w", begun["attempt"])
    with pytest.raises(Refused) as refused:
        engine.ask("release", stage=trainers.stage, lease=lease["lease"], rank=0)
    assert refused.value.code == "lease_lost"


def all_answers(asked: list[tuple[Client, bytes]]) -> list[str]:
    return [client.answer(request_id, WAIT_S)["kind"] for client, request_id in asked]


def test_its_non_finite_values_are_refused_by_name(trainers: Trainers) -> None:
    poisoned = values(1) | {(2, 120): math.nan}
    with pytest.raises(Refused, match="NaN or infinite values: w ") as refused:
        trainers.publish(1, poisoned)
    assert refused.value.code == "non_finite_values"
    trainers.publish(1, values(1))  # the version was given up, and may begin again


def test_it_comes_back_after_its_connection_broke(daemon: RunningDaemon, trainers: Trainers, engine: Client) -> None:
    trainers.publish(1, values(1))
    lease = leased(engine, trainers.stage)
    engine.drop_connection()
    again = Client(daemon.folder, "engine", engine.token)
    assert leased(again, trainers.stage, again=True)["lease"] == lease["lease"]
    again.ask("release", stage=trainers.stage, lease=lease["lease"], rank=0)
    engine.socket = again.socket


def test_it_hears_of_what_happens(trainers: Trainers) -> None:
    events = zmq.Context.instance().socket(zmq.SUB)
    events.connect(f"ipc://{trainers.ranks[0].welcome['events']}")
    events.subscribe(trainers.stage.encode())
    heard = dict[str, object]()
    version = 0
    while "sealed" not in heard:  # a subscription takes effect some time after it was made
        version += 1
        trainers.publish(version, values(version))
        while events.poll(100 if version > 1 else 0):
            stage, body = events.recv_multipart()
            event = independent_client.msgpack.unpackb(body)
            assert (stage.decode(), event["kind"]) == (trainers.stage, "event")
            heard[event["event"]] = event["version"]
        assert version < 100
    events.close(linger=0)


# What the pages list


def test_the_pages_describe_this_protocol_and_this_format() -> None:
    assert told("protocol.md", "protocol") == wire.PROTOCOL
    assert told("segment.md", "format") == superblock.FORMAT


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def table(page: str, *head: str) -> list[list[str]]:
    """The rows of the table with this head."""
    [found] = [rows for first, *rows in tables((PAGES / page).read_text()) if first == list(head)]
    return found


def test_the_page_lists_every_message_with_its_fields() -> None:
    listed = {}
    for request, fields, answer, told_back in table("protocol.md", "request", "fields", "answer", "fields"):
        listed[names(request)[0]] = names(fields)
        listed[names(answer)[0]] = names(told_back)
    kinds = [*get_args(wire.Request), *get_args(wire.Answer)]
    wanted = {kind.model_fields["kind"].default: [*kind.model_fields][1:] for kind in kinds}
    assert listed == {kind: fields for kind, fields in wanted.items() if kind != "refusal"}
    explained = {name for cell, *_ in table("protocol.md", "field", "type", "what it says") for name in names(cell)}
    assert explained == {field for fields in listed.values() for field in fields}


@pytest.mark.parametrize(
    ("page", "head", "kind"),
    [
        ("protocol.md", ("field", "values", "default"), wire.StageOptions),
        ("protocol.md", ("field", "what"), catalog.TensorDeclaration),
        ("protocol.md", ("field", "what"), wire.Event),
        ("segment.md", ("field", "what"), catalog.Catalog),
    ],
    ids=["options", "declaration", "event", "catalog"],
)
def test_the_page_lists_every_field(page: str, head: tuple[str, ...], kind: type[wire.Record]) -> None:
    found = [rows for first, *rows in tables((PAGES / page).read_text()) if first == list(head)]
    assert [*kind.model_fields] in [[name for cell, *_ in rows for name in names(cell)] for rows in found]


def test_the_page_lists_every_event_dtype_and_format() -> None:
    said = names(next(text for name, text in table_of(wire.Event) if names(name) == ["event"]))
    source = "".join(path.read_text() for path in (Path(wire.__file__).parent).glob("*.py"))
    assert set(said) == set(re.findall(r'_tell\("(\w+)"', source))
    dtypes = names(next(text for name, text in table_of(catalog.TensorDeclaration) if names(name) == ["dtype"]))
    assert dtypes == [*catalog.ITEM_BYTES]
    formats = table("segment.md", "format", "grid", "scale", "element")
    assert {names(row[0])[0]: names(row[1])[0] for row in formats} == {one.value: one.grid.value for one in StageFormat}


def table_of(kind: type[wire.Record]) -> list[list[str]]:
    found = [rows for first, *rows in tables((PAGES / "protocol.md").read_text()) if first == ["field", "what"]]
    return next(rows for rows in found if [name for cell, *_ in rows for name in names(cell)] == [*kind.model_fields])
