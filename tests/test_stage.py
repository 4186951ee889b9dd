# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Trainers and readers on a real daemon."""

import itertools
import threading

import pytest
import torch
import zmq
from daemons import RunningDaemon
from stagingd_client import LocalShard, Publication, Stage
from stagingd_client import stage as stage_module
from stagingd_client.flushers import Flushers
from stagingd_client.modules import Modules
from stagingd_vllm import Reader

from stagingd import wire
from stagingd.boxes import Box
from stagingd.connection import Connection
from stagingd.errors import (
    CatalogMismatch,
    DeadlineExceeded,
    OutOfOrder,
    RankTaken,
    StagingError,
    UnknownTensor,
    VersionAborted,
)
from stagingd.moments import Grid

SHAPE = (37, 300)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(SHAPE, generator=generator),
        "vector": torch.randn(33, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "counts": torch.randint(0, 9, (5,), generator=generator),
    }


def put_all(stage: Stage, version: int, tensors: dict[str, torch.Tensor]) -> Publication:
    stage.begin(version)
    for name, tensor in tensors.items():
        stage.put(name, tensor)
    return stage.commit()


def open_stage(daemon: RunningDaemon, name: str, **options: object) -> Stage:
    given = {"rank": 0, "ranks": 1, "timeout_s": 10.0} | options
    return Stage.open(name, socket=daemon.socket, **given)  # type: ignore[arg-type]


def test_a_reader_gets_what_was_put_in_the_staged_dtype(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        put_all(stage, 1, weights(1)).wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                for name, tensor in weights(1).items():
                    staged = tensor.bfloat16() if tensor.is_floating_point() else tensor
                    assert torch.equal(lease.read(name), staged)
                box = Box((5, 17), (20, 111))
                assert torch.equal(lease.read("matrix", box), weights(1)["matrix"].bfloat16()[5:25, 17:128])
                assert lease.moments("matrix", Grid.TENSOR).amax == weights(1)["matrix"].bfloat16().abs().max()
                assert lease.version == 1


def test_dtype_none_stages_tensors_as_they_are(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name, dtype=None) as stage:
        catalog = stage.declare(weights(0))
        assert [tensor.dtype for tensor in catalog.tensors] == ["float32", "bfloat16", "float32", "int64"]


def in_parallel(*calls: object) -> list[StagingError | None]:
    """Run calls as ranks do, each in a thread; returns what each raised."""
    raised: list[StagingError | None] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            calls[index]()  # type: ignore[operator]
        except StagingError as error:
            raised[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return raised


def column_shard(rank: int, seed: int) -> dict[str, LocalShard]:
    """Half the columns of the matrix, cut inside a block of 128."""
    start, stop = (0, 141) if rank == 0 else (141, SHAPE[1])
    return {"matrix": LocalShard(weights(seed)["matrix"][:, start:stop], SHAPE, (0, start))}


def test_two_ranks_put_columns_and_a_reader_sees_one_tensor(daemon: RunningDaemon, stage_name: str) -> None:
    ranks = [open_stage(daemon, stage_name, rank=rank, ranks=2) for rank in (0, 1)]
    declare = [lambda s=stage: s.declare(column_shard(s.rank, 0)) for stage in ranks]
    assert in_parallel(*declare) == [None, None]
    for stage in ranks:
        stage.begin(3)
        shard = column_shard(stage.rank, 3)["matrix"]
        stage.put("matrix", shard.tensor, global_shape=shard.global_shape, offset=shard.offset)
    for publication in [stage.commit() for stage in ranks]:
        publication.wait()
    with (
        Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader,
        reader.lease() as lease,
    ):
        full = weights(3)["matrix"].bfloat16()
        assert torch.equal(lease.read("matrix"), full)
        amax = full.abs().float()
        assert lease.moments("matrix", Grid.BLOCK).amax[0, 1] == amax[:, 128:256].max()  # both ranks' columns
    for stage in ranks:
        stage.close()


def test_replicas_put_their_rows_and_a_reader_sees_one_tensor(daemon: RunningDaemon, stage_name: str) -> None:
    shape = (1024, 1024)
    full = torch.randn(shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    ranks = [open_stage(daemon, stage_name, rank=rank, ranks=2) for rank in (0, 1)]
    assert in_parallel(*[lambda s=stage: s.declare({"w": full}) for stage in ranks]) == [None, None]
    assert [str(owned.box) for owned in ranks[0].catalog.owned] == ["[0:512, 0:1024]", "[512:1024, 0:1024]"]
    for publication in [put_all(stage, 1, {"w": full}) for stage in ranks]:
        publication.wait()
    with (
        Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader,
        reader.lease() as lease,
    ):
        assert torch.equal(lease.read("w"), full)
        assert lease.moments("w", Grid.TENSOR).variance == pytest.approx(full.double().var(correction=0).item())
    for stage in ranks:
        stage.close()


def test_after_the_fence_the_trainer_may_change_its_tensors(daemon: RunningDaemon, stage_name: str) -> None:
    tensors = weights(1)
    with open_stage(daemon, stage_name) as stage:
        stage.declare(tensors)
        publication = put_all(stage, 1, tensors)
        stage.fence()
        for tensor in tensors.values():
            tensor.zero_()
        publication.wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                assert torch.equal(lease.read("matrix"), weights(1)["matrix"].bfloat16())


@pytest.mark.parametrize(
    ("batch_s", "put_s", "flushed"), [(float("inf"), 0.0, 0), (0.0, float("inf"), 0), (0.0, 0.0, 2)]
)
def test_shards_that_are_put_at_once_are_flushed_together_and_others_as_they_come(
    daemon: RunningDaemon,
    stage_name: str,
    monkeypatch: pytest.MonkeyPatch,
    batch_s: float,
    put_s: float,
    flushed: int,
) -> None:
    monkeypatch.setattr(stage_module, "BATCH_BYTES", 1)
    monkeypatch.setattr(stage_module, "BATCH_S", batch_s)
    monkeypatch.setattr(stage_module, "PUT_S", put_s)
    tensors = {name: torch.randn(8, 8) for name in "ab"}
    with open_stage(daemon, stage_name) as stage:
        stage.declare(tensors)
        stage.begin(1)
        for name, tensor in tensors.items():
            stage.put(name, tensor)
        assert stage._current is not None
        assert len(stage._current._flushed) == flushed
        stage.commit().wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                for name, tensor in tensors.items():
                    assert torch.equal(lease.read(name), tensor.bfloat16())


def test_publish_stages_parameters_and_buffers_of_a_module_in_one_line(daemon: RunningDaemon, stage_name: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with open_stage(daemon, stage_name) as stage:
        stage.fence_before(optimizer)
        stage.publish(1, module).wait()
        assert {tensor.name: tensor.dtype for tensor in stage.catalog.tensors} == {
            "0.weight": "bfloat16",
            "0.bias": "bfloat16",
            "1.weight": "bfloat16",
            "1.bias": "bfloat16",
            "1.running_mean": "float32",
            "1.running_var": "float32",
            "1.num_batches_tracked": "int64",
        }
        module(torch.randn(3, 8)).sum().backward()
        optimizer.step()
        stage.publish(2, module).wait()


def test_a_version_that_fails_and_cannot_be_given_up_either_tells_what_failed_first(
    own_daemon: RunningDaemon, stage_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is lost")

    def fail_again(*_: object) -> None:
        raise RuntimeError("the device is still lost")

    stage = open_stage(own_daemon, stage_name)
    stage.declare(weights(0))
    monkeypatch.setattr(Flushers, "finish", fail)
    monkeypatch.setattr(Stage, "_give_up", fail_again)
    with pytest.raises(RuntimeError, match="the device is lost") as caught:
        put_all(stage, 1, weights(0)).wait()
    assert caught.value.__notes__ == ["to give the version up failed, too: the device is still lost"]
    stage._leave()


def test_a_module_that_fails_while_it_is_published_leaves_no_version_behind(
    daemon: RunningDaemon, stage_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Linear(8, 4)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with open_stage(daemon, stage_name) as stage:
        stage.publish(1, module).wait()
        with monkeypatch.context() as patch:
            patch.setattr(Modules, "tensors", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                stage.publish(2, module)
        stage.publish(3, module).wait()


class Tied(torch.nn.Module):
    """An embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_parameter_is_staged_once_and_read_under_both_names(daemon: RunningDaemon, stage_name: str) -> None:
    module = Tied()
    with open_stage(daemon, stage_name) as stage:
        stage.publish(1, module).wait()
        assert [tensor.name for tensor in stage.catalog.tensors] == ["embed.weight"]
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                box = Box((2, 0), (3, 4))
                for name in ("embed.weight", "head.weight"):
                    assert torch.equal(lease.read(name, box), module.embed.weight.detach().bfloat16()[2:5])
                    assert lease.moments(name, Grid.TENSOR).count == 28


def test_aliases_may_be_given_and_a_trainer_that_comes_back_has_the_same(
    daemon: RunningDaemon, stage_name: str
) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0), aliases={"twin": "matrix", "other": "vector"})
        put_all(stage, 1, weights(1)).wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                assert torch.equal(lease.read("twin"), weights(1)["matrix"].bfloat16())
    with open_stage(daemon, stage_name) as stage, pytest.raises(CatalogMismatch, match="or aliases of them"):
        stage.declare(weights(0), aliases={"twin": "matrix"})
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0), aliases={"other": "vector", "twin": "matrix"})


def test_an_alias_of_no_tensor_is_refused_and_a_modules_may_be_corrected(
    daemon: RunningDaemon, stage_name: str
) -> None:
    with open_stage(daemon, stage_name) as stage:
        with pytest.raises(UnknownTensor, match=r"'twin' as another name of 'head\.weight', which no rank declares"):
            stage.declare(Tied(), aliases={"twin": "head.weight"})
        catalog = stage.declare(Tied(), aliases={"twin": "embed.weight"})
        assert {alias.alias: alias.name for alias in catalog.aliases} == {
            "head.weight": "embed.weight",
            "twin": "embed.weight",
        }


def test_a_trainer_that_comes_back_goes_on_from_the_newest_version(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        put_all(stage, 4, weights(4)).wait()
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        assert stage.newest_sealed == 4
        put_all(stage, 5, weights(5)).wait()


def test_a_trainer_that_comes_back_with_other_tensors_is_refused(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
    with open_stage(daemon, stage_name) as stage, pytest.raises(CatalogMismatch, match=f"stagingd drop {stage_name}"):
        stage.declare({"matrix": torch.zeros(3, 3)})
    with Connection(daemon.socket, name="test") as connection:
        connection.request(wire.Drop(stage=stage_name), wire.Done)
    with open_stage(daemon, stage_name) as stage:
        stage.declare({"matrix": torch.zeros(3, 3)})


def test_a_rank_or_reader_that_is_held_by_a_live_process_is_refused(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage, open_stage(daemon, stage_name) as other:
        stage.declare(weights(0))
        with pytest.raises(RankTaken, match="rank 0"):
            other.declare(weights(0))
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket), pytest.raises(RankTaken):
            Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket)


def test_a_stage_in_use_is_not_dropped(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage, Connection(daemon.socket, name="test") as connection:
        stage.declare(weights(0))
        with pytest.raises(OutOfOrder, match="in use by trainer rank 0"):
            connection.request(wire.Drop(stage=stage_name), wire.Done)


def test_waiting_for_ranks_that_never_declare_ends_and_names_them(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name, ranks=3, timeout_s=0.2) as stage:
        with pytest.raises(DeadlineExceeded, match="trainer rank 1, trainer rank 2"):
            stage.declare(weights(0))
        assert stage_name not in {stage.stage for stage in daemon.status().stages}


def test_waiting_for_a_stage_that_nobody_declares_ends(daemon: RunningDaemon, stage_name: str) -> None:
    with pytest.raises(DeadlineExceeded, match="none of which has declared it"):
        Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket, timeout_s=0.1)


def two_ranks(daemon: RunningDaemon, name: str, timeout_s: float) -> list[Stage]:
    """Two declared ranks, that from now on wait only so long for anything."""
    ranks = [open_stage(daemon, name, rank=rank, ranks=2, timeout_s=60.0) for rank in (0, 1)]
    declare = [lambda s=stage: s.declare(column_shard(s.rank, 0)) for stage in ranks]
    assert in_parallel(*declare) == [None, None]
    for stage in ranks:
        stage.timeout_s = timeout_s
    return ranks


def test_a_commit_that_the_other_rank_never_makes_ends_and_names_it(daemon: RunningDaemon, stage_name: str) -> None:
    first, second = two_ranks(daemon, stage_name, 0.3)
    first.begin(1)
    first.put("matrix", column_shard(0, 1)["matrix"])
    with pytest.raises(DeadlineExceeded, match="trainer rank 1"):
        first.commit().wait()
    first.close()
    second.close()


def test_a_rank_that_leaves_aborts_the_version_and_is_named_to_the_others(
    daemon: RunningDaemon, stage_name: str
) -> None:
    first, second = two_ranks(daemon, stage_name, 20.0)
    for stage in (first, second):
        stage.begin(1)
    first.put("matrix", column_shard(0, 1)["matrix"])
    publication = first.commit()
    second.close()
    with pytest.raises(VersionAborted, match="trainer rank 1"):
        publication.wait()
    first.close()


def test_policy_block_makes_a_trainer_wait_for_a_reader_and_say_so(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name, policy="block", timeout_s=0.3) as stage:
        stage.declare(weights(0))
        put_all(stage, 1, weights(1)).wait()
        with Reader.attach(stage_name, engine="reader-7", rank=0, ranks=1, socket=daemon.socket) as reader:
            with pytest.raises(DeadlineExceeded, match="engine 'reader-7'"):
                put_all(stage, 2, weights(2)).wait()
            reader.lease().release()
            put_all(stage, 3, weights(3)).wait()


def test_policy_latest_lets_a_trainer_publish_without_any_reader(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        for version in range(1, 8):
            put_all(stage, version, weights(version)).wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            with reader.lease() as lease:
                assert lease.version == 7
                assert torch.equal(lease.read("matrix"), weights(7)["matrix"].bfloat16())


def test_a_late_reader_waits_for_a_newer_version(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        put_all(stage, 1, weights(1)).wait()
        with Reader.attach(stage_name, engine="e", rank=0, ranks=1, socket=daemon.socket) as reader:
            got: list[int] = []
            waiting = threading.Thread(target=lambda: got.append(_version_after(reader, 1)))
            waiting.start()
            put_all(stage, 2, weights(2)).wait()
            waiting.join(20)
            assert got == [2]


def _version_after(reader: Reader, version: int) -> int:
    with reader.lease(newer_than=version, timeout_s=20) as lease:
        return lease.version


def test_events_tell_everybody_of_every_seal(daemon: RunningDaemon, stage_name: str) -> None:
    with open_stage(daemon, stage_name) as stage:
        stage.declare(weights(0))
        with Connection(daemon.socket, name="test") as connection:
            listener = zmq.Context.instance().socket(zmq.SUB)
            listener.connect(f"ipc://{connection.event_socket}")
            listener.subscribe(stage_name.encode())
        heard: list[wire.Event] = []
        for version in itertools.count(1):  # a subscription takes a moment to reach the publisher
            put_all(stage, version, weights(version)).wait()
            while listener.poll(100):
                heard.append(wire.decode_event(listener.recv_multipart()[1]))
            if heard:
                break
        listener.close()
        assert ("sealed", stage_name) in {(event.event, event.stage) for event in heard}
