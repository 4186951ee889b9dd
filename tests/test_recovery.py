# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon that ends and is started again: versions, leases, trainers and readers go on where they were."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import Puppet, RunningDaemon, eventually, need_root, serving, start
from stagingd_client import LocalShard, Stage
from stagingd_vllm import Lease, Reader

from stagingd import segment, superblock, wire
from stagingd.boxes import Box
from stagingd.catalog import TensorDeclaration
from stagingd.connection import Connection
from stagingd.errors import (
    CatalogMismatch,
    DaemonUnreachable,
    LeaseLost,
    SegmentForeign,
    SegmentTaken,
    UnknownStage,
    VersionAborted,
)
from stagingd.formats import Quantization, StageFormat
from stagingd.superblock import Superblock

SHAPE = (8, 4)
CLIENTS = "import torch; from stagingd_client import LocalShard, Stage; from stagingd_vllm import Reader"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon for whose successor its clients wait longer than any machine takes to start one."""
    with serving(tmp_path / "run", "--return-s", "60") as daemon:
        yield daemon


def weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(SHAPE, generator=generator) for name in ("a", "b")}


def staged(version: int, name: str = "a") -> torch.Tensor:
    return weights(version)[name].bfloat16()


def open_stage(daemon: RunningDaemon, name: str = "policy", rank: int = 0, ranks: int = 1, **options: Any) -> Stage:
    return Stage.open(name, rank=rank, ranks=ranks, socket=daemon.socket, timeout_s=60.0, **options)


def declared(daemon: RunningDaemon, name: str = "policy", **options: str) -> Stage:
    """A trainer of one rank, which has declared its tensors."""
    stage = open_stage(daemon, name, **options)
    stage.declare(weights(0))
    return stage


def publish(stage: Stage, version: int) -> None:
    stage.begin(version)
    for name, tensor in weights(version).items():
        stage.put(name, tensor)
    stage.commit().wait()


def attach(daemon: RunningDaemon, stage: str = "policy", engine: str = "e") -> Reader:
    return Reader.attach(stage, engine=engine, rank=0, ranks=1, socket=daemon.socket)


def half(rank: int, version: int) -> LocalShard:
    return LocalShard(weights(version)["a"][4 * rank : 4 * rank + 4], SHAPE, (4 * rank, 0))


def two_ranks(daemon: RunningDaemon, quantization: Quantization | None = None) -> tuple[Stage, Stage]:
    """Two ranks that hold half a tensor each, and have declared it."""
    first, second = (open_stage(daemon, rank=rank, ranks=2, quantization=quantization) for rank in (0, 1))
    declared = first._background.submit(first.declare, {"a": half(0, 0)})
    second.declare({"a": half(1, 0)})
    declared.result(30)
    return first, second


def other_rank(daemon: RunningDaemon, puppet: Puppet, options: str = "") -> None:
    """The second of two ranks, in a process of its own; it is told to declare."""
    puppet.do(f"stage = Stage.open('policy', rank=1, ranks=2, socket={str(daemon.socket)!r}, timeout_s=60.0{options})")
    puppet.do("shard = LocalShard(torch.ones(4, 4), (8, 4), (4, 0))")
    puppet.tell("stage.declare({'a': shard}) and None")


def waits(daemon: RunningDaemon, what: str) -> None:
    """Until the daemon says that somebody waits for this."""
    found = lambda: [line for stage in daemon.status().stages for line in map(str, stage.waiting) if what in line]  # noqa: E731
    eventually(found, f"somebody to wait for {what}")


def states(daemon: RunningDaemon, stage: str = "policy") -> list[tuple[str, int | None]]:
    return [(slot.state, slot.version) for slot in daemon.stage(stage).slots]


def assert_holds(daemon: RunningDaemon, version: int, *names: str, stage: str = "policy") -> None:
    """A reader that comes now gets this version, in every byte."""
    with attach(daemon, stage, engine="check") as reader, reader.lease() as lease:
        assert lease.version == version
        for name in names or ("a", "b"):
            assert torch.equal(lease.read(name), staged(version, name))


def is_over(lease: Lease) -> bool:
    try:
        lease.read("a")
    except LeaseLost:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_sealed_and_front_versions_stand_byte_for_byte(daemon: RunningDaemon, number: signal.Signals) -> None:
    with declared(daemon) as stage, attach(daemon) as reader:
        publish(stage, 1)
        reader.lease().release()
        publish(stage, 2)
        before = states(daemon)
        assert before == [("front", 1), ("sealed", 2)]
        mapped = segment.open_existing(daemon.stage("policy").segment, writable=False)
        held = [bytes(mapped.slot(slot)) for slot in (0, 1)]
        daemon.end(number)
        daemon.restart()
        assert states(daemon) == before
        assert [bytes(mapped.slot(slot)) for slot in (0, 1)] == held
        with reader.lease(version=1) as front, attach(daemon, engine="another") as another:
            with another.lease() as sealed:
                assert torch.equal(front.read("a"), staged(1))
                assert torch.equal(sealed.read("a"), staged(2))
        mapped.close()


def test_a_trainer_in_the_middle_of_a_version_finishes_it(daemon: RunningDaemon) -> None:
    with declared(daemon) as stage:
        stage.begin(1)
        stage.put("a", weights(1)["a"])
        stage.fence()
        daemon.restart()
        assert states(daemon)[0] == ("filling", 1)
        stage.put("b", weights(1)["b"])
        stage.commit().wait()
        assert_holds(daemon, 1)
        publish(stage, 2)
        assert_holds(daemon, 2)


def test_a_commit_that_was_waiting_is_answered_after_the_restart(daemon: RunningDaemon) -> None:
    first, second = two_ranks(daemon)
    with first, second:
        for stage in (first, second):
            stage.begin(1)
            stage.put("a", half(stage.rank, 1))
        publication = first.commit()
        waits(daemon, "version 1 to be committed")
        daemon.restart()
        waits(daemon, "version 1 to be committed")
        second.commit().wait()
        publication.wait()
        assert_holds(daemon, 1, "a")


def test_a_declaration_that_was_waiting_is_answered_after_the_restart(daemon: RunningDaemon) -> None:
    with open_stage(daemon, ranks=2) as first, open_stage(daemon, rank=1, ranks=2) as second:
        declared = first._background.submit(first.declare, {"a": half(0, 0)})
        waits(daemon, "all 2 ranks")
        daemon.restart()
        waits(daemon, "all 2 ranks")
        second.declare({"a": half(1, 0)})
        assert declared.result(30).tensors == second.catalog.tensors


HALVES = Quantization(format=StageFormat.FP8_PER_TENSOR, device="cpu", groups=(("a",),))


def test_ranks_that_wait_for_each_others_moments_go_on_after_a_restart(daemon: RunningDaemon) -> None:
    with ExitStack() as stages:
        first, second = (stages.enter_context(stage) for stage in two_ranks(daemon, HALVES))
        for stage in (first, second):
            stage.begin(1)
            stage.put("a", half(stage.rank, 1))
        publication = first.commit()
        waits(daemon, "version 1 to be measured")
        daemon.restart()
        waits(daemon, "version 1 to be measured")
        second.commit().wait()
        publication.wait()
        assert states(daemon)[0] == ("sealed", 1)


def test_a_rank_that_dies_before_its_moments_are_stored_is_named_to_those_that_wait(daemon: RunningDaemon) -> None:
    quantization = f"Quantization(format='fp8_per_tensor', device='cpu', groups={HALVES.groups})"
    with Puppet(CLIENTS) as puppet, open_stage(daemon, ranks=2, quantization=HALVES) as stage:
        puppet.do("from stagingd.formats import Quantization")
        other_rank(daemon, puppet, f", quantization={quantization}")
        stage.declare({"a": half(0, 0)})
        assert puppet.answer() is None
        stage.begin(1)
        stage.put("a", half(0, 1))
        puppet.do("stage.begin(1)")
        publication = stage.commit()
        waits(daemon, "version 1 to be measured")
        puppet.kill()
        with pytest.raises(VersionAborted, match="rank 1"):
            publication.wait()


def test_a_reader_with_a_lease_reads_on_and_releases_it(daemon: RunningDaemon) -> None:
    with declared(daemon) as stage, attach(daemon) as reader:
        publish(stage, 1)
        lease = reader.lease()
        daemon.restart()
        publish(stage, 2)
        assert torch.equal(lease.read("a"), staged(1))
        (known,) = daemon.stage("policy").leases
        assert (known.engine, known.version, known.awaited_ranks) == ("e", 1, (0,))
        stage.begin(3)  # into the slot that the lease is on
        waits(daemon, "version 1 to be released")
        assert torch.equal(lease.read("b"), staged(1, "b"))
        lease.release()
        for name, tensor in weights(3).items():
            stage.put(name, tensor)
        stage.commit().wait()
        assert not daemon.stage("policy").leases
        with reader.lease() as newest:
            assert torch.equal(newest.read("a"), staged(3))


def test_a_lease_whose_process_died_while_the_daemon_was_away_is_ended(daemon: RunningDaemon) -> None:
    with Puppet(CLIENTS) as puppet, declared(daemon) as stage:
        publish(stage, 1)
        puppet.do(f"reader = Reader.attach('policy', engine='e', rank=0, ranks=1, socket={str(daemon.socket)!r})")
        assert puppet.do("lease = reader.lease()") is None
        assert [lease.engine for lease in daemon.stage("policy").leases] == ["e"]
        daemon.kill()
        puppet.kill()
        daemon.restart()
        found = daemon.stage("policy")
        assert (found.leases, found.engines) == ((), ())
        for version in (2, 3):  # the second of them into the slot that it held
            publish(stage, version)


def test_a_lease_whose_time_passes_while_the_daemon_is_away_is_lost(tmp_path: Path) -> None:
    with serving(tmp_path / "run", "--return-s", "60", "--lease-s", "0.5") as daemon:
        with declared(daemon) as stage, attach(daemon) as reader:
            publish(stage, 1)
            lease = reader.lease()
            daemon.kill()
            eventually(lambda: is_over(lease), "the lease to be over")
            daemon.restart()
            assert not daemon.stage("policy").leases
            with pytest.raises(LeaseLost, match="did not release version 1 in time"):
                lease.release()
            for version in (2, 3):
                publish(stage, version)


def test_a_trainer_that_died_while_the_daemon_was_away_aborts_the_version_and_is_named(daemon: RunningDaemon) -> None:
    with Puppet(CLIENTS) as puppet, open_stage(daemon, ranks=2) as stage:
        other_rank(daemon, puppet)
        stage.declare({"a": half(0, 0)})
        puppet.answer()
        puppet.do("stage.begin(1); stage.put('a', shard); stage.fence()")
        stage.begin(1)
        stage.put("a", half(0, 1))
        publication = stage.commit()
        waits(daemon, "version 1 to be committed")
        daemon.kill()
        puppet.kill()
        daemon.restart()
        with pytest.raises(VersionAborted, match=r"trainer rank 1: .* died while the daemon was away"):
            publication.wait()
        found = daemon.stage("policy")
        assert (found.trainers, found.aborted_versions, states(daemon)) == ((0,), 1, [("free", None)] * 2)


def test_a_replacement_that_comes_late_goes_on_with_the_same_tensors_and_no_others(daemon: RunningDaemon) -> None:
    with open_stage(daemon, ranks=2) as stage:
        with open_stage(daemon, rank=1, ranks=2) as gone:
            declared = stage._background.submit(stage.declare, {"a": half(0, 0)})
            gone.declare({"a": half(1, 0)})
            declared.result(30)
        daemon.restart()
        wrong = {
            r"tensor 'a' is bfloat16 \(8, 5\), but was bfloat16 \(8, 4\)": LocalShard(torch.ones(4, 5), (8, 5), (4, 0)),
            "other boxes": LocalShard(torch.ones(3, 4), SHAPE, (5, 0)),
        }
        for why, shard in wrong.items():
            with open_stage(daemon, rank=1, ranks=2) as other, pytest.raises(CatalogMismatch, match=why):
                other.declare({"a": shard})
        with open_stage(daemon, rank=1, ranks=2) as same:
            same.declare({"a": half(1, 0)})
            for rank in (stage, same):
                rank.begin(1)
                rank.put("a", half(rank.rank, 1))
            for publication in [stage.commit(), same.commit()]:
                publication.wait()
        assert_holds(daemon, 1, "a")


def test_clients_that_gave_up_go_on_with_a_daemon_that_comes_late(tmp_path: Path) -> None:
    with serving(tmp_path / "run", "--return-s", "0.1") as daemon, declared(daemon) as stage:
        publish(stage, 1)
        with attach(daemon) as reader:
            lease = reader.lease()
            stage.begin(2)
            for name, tensor in weights(2).items():
                stage.put(name, tensor)
            stage.fence()
            daemon.kill()
            for call in (lease.release, reader.lease, stage.commit().wait):
                with pytest.raises(DaemonUnreachable, match=r"is gone: .*; none has taken its place within 0\.1 s"):
                    call()
            daemon.restart()
            publish(stage, 3)
            assert [lease.version for lease in daemon.stage("policy").leases] == [1]
            with reader.lease(newer_than=1) as newest:
                assert newest.version == 3
            assert not daemon.stage("policy").leases
            publish(stage, 4)


def test_a_daemon_that_hands_over_leaves_its_segments_and_tells_nobody(daemon: RunningDaemon) -> None:
    first, second = two_ranks(daemon)
    with first, second:
        first.begin(1)
        first.put("a", half(0, 1))
        publication = first.commit()
        waits(daemon, "version 1 to be committed")
        assert daemon.end(signal.SIGUSR1) == 0
        assert daemon.segments() == [daemon.segment("policy").name]
        assert not daemon.socket.exists()
        assert not publication.done
        daemon.restart()
        second.begin(1)
        second.put("a", half(1, 1))
        for waiting in (second.commit(), publication):
            waiting.wait()
        assert_holds(daemon, 1, "a")


def test_a_daemon_that_is_stopped_gives_all_back(daemon: RunningDaemon) -> None:
    stage = declared(daemon)
    publish(stage, 1)
    assert daemon.stop() == 0
    assert not daemon.segments()
    assert sorted(path.name for path in daemon.folder.iterdir()) == ["daemon.log", "lock"]
    daemon.restart()
    assert not daemon.status().stages
    with pytest.raises(UnknownStage, match="'policy'"):
        publish(stage, 2)
    stage.close()


def test_two_restarts_in_a_row(daemon: RunningDaemon) -> None:
    with declared(daemon) as stage, attach(daemon) as reader:
        publish(stage, 1)
        lease = reader.lease()
        stage.begin(2)
        stage.put("a", weights(2)["a"])
        stage.fence()
        before = daemon.picture()
        for _ in range(2):
            daemon.restart()
            assert daemon.picture() == before
        stage.put("b", weights(2)["b"])
        stage.commit().wait()
        assert torch.equal(lease.read("a"), staged(1))
        lease.release()
        assert_holds(daemon, 2)


def test_several_stages_are_adopted_each_with_its_own_versions(daemon: RunningDaemon) -> None:
    with declared(daemon, "policy") as policy, declared(daemon, "reward", policy="block") as reward:
        publish(policy, 3)
        publish(reward, 8)
        daemon.restart()
        assert {stage.stage: stage.policy for stage in daemon.status().stages} == {
            "policy": "latest",
            "reward": "block",
        }
        assert_holds(daemon, 3)
        assert_holds(daemon, 8, stage="reward")
        publish(policy, 4)
        publish(reward, 9)


def test_a_begin_that_waits_for_an_engine_goes_on_after_the_restart(daemon: RunningDaemon) -> None:
    with declared(daemon, policy="block") as stage:
        publish(stage, 1)
        stage.begin(2)
        waits(daemon, "version 1 to be read")
        daemon.restart()
        waits(daemon, "version 1 to be read")
        assert_holds(daemon, 1)
        for name, tensor in weights(2).items():
            stage.put(name, tensor)
        stage.commit().wait()
        assert_holds(daemon, 2)
        assert daemon.stage("policy").begins_kept_waiting == 1


def test_the_counters_stand(daemon: RunningDaemon) -> None:
    with declared(daemon, policy="block") as stage:
        publish(stage, 1)
        stage.begin(2)
        waits(daemon, "version 1 to be read")
        assert_holds(daemon, 1)
        stage.abort()
        publish(stage, 3)
        before = daemon.stage("policy")
        assert (before.sealed_versions, before.aborted_versions, before.begins_kept_waiting) == (2, 1, 1)
        daemon.restart()
        assert daemon.stage("policy") == before


# What is damaged, or not ours. One daemon makes a stage for every case, and is killed; what it left is changed, and
# its successor finds all of it at once.


def block(path: Path) -> Superblock:
    return superblock.unpack(path.name, path.read_bytes()[: superblock.PAGE])


def records(path: Path) -> tuple[int, int]:
    """Where the older record of the ledger begins, and where the newer one."""
    places = (superblock.PAGE, superblock.PAGE + block(path).ledger_bytes // 2)
    data = path.read_bytes()
    first, second = (struct.unpack_from("<Q", data, place)[0] for place in places)
    return places if first < second else (places[1], places[0])


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, *places: int) -> None:
    """Another bit in each of these bytes."""
    data = path.read_bytes()
    for place in places:
        overwrite(path, place, bytes([data[place] ^ 1]))


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else stands where the segment was."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


RECORD = 20
"""A byte inside a record, behind its head."""

ADOPTED: dict[str, tuple[Callable[[Path], None], int | None]] = {
    "whole": (lambda path: None, 1),
    "older-record": (lambda path: flip(path, records(path)[0] + RECORD), 1),
    "newer-record": (lambda path: flip(path, records(path)[1] + RECORD), None),
}
"""What is adopted all the same, and with which sealed version: the older record says that it is being filled."""

SET_ASIDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "superblock": (lambda path: flip(path, 20), "the superblock of segment .* is damaged"),
    "catalog": (lambda path: flip(path, block(path).catalog_at + 5), "the catalog in segment .* is damaged"),
    "terms": (lambda path: flip(path, block(path).terms_at + 5), "the terms in segment .* are damaged"),
    "records": (lambda path: flip(path, *(at + RECORD for at in records(path))), "holds no whole state record"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), r"is truncated: it has \d+ of \d+ bytes"),
    "older-format": (lambda path: overwrite(path, 8, struct.pack("<I", 1)), "has format 1, this stagingd reads format"),
}

LEFT_ALONE: dict[str, tuple[Callable[[Path], None], str]] = {
    "of-another-user": (lambda path: os.chown(path, 65534, 65534), "belongs to uid 65534"),
    "magic": (lambda path: flip(path, 0), "was not made by stagingd"),
    "empty": (lambda path: os.truncate(path, 0), "was not made by stagingd"),
    "folder": (replace_by(Path.mkdir), "not a file of this daemon's uid 0: drwx"),
    "pipe": (replace_by(os.mkfifo), "not a file of this daemon's uid 0: prw"),
    "link": (replace_by(lambda path: path.symlink_to("/etc/passwd")), "not a file of this daemon's uid 0: lrwx"),
    "dead-link": (replace_by(lambda path: path.symlink_to("/nowhere")), "not a file of this daemon's uid 0: lrwx"),
    "other-name": (lambda path: shutil.copy(path.with_name(path.name[:-10] + "whole"), path), "holds stage 'whole'"),
}


def declare(connection: Connection, stage: str) -> wire.Declared:
    """One rank declares one small tensor."""
    tensors = (TensorDeclaration(name="w", dtype="bfloat16", shape=(8, 4), boxes=(Box((0, 0), (8, 4)),)),)
    options = wire.StageOptions()
    request = wire.Declare(stage=stage, rank=0, ranks=1, options=options, tensors=tensors, timeout_s=30.0)
    return connection.request(request, wire.Declared, timeout_s=30.0)


def publish_zeros(connection: Connection, stage: str, version: int) -> None:
    connection.request(wire.Begin(stage=stage, rank=0, version=version, timeout_s=30.0), wire.Begun)
    connection.request(wire.Commit(stage=stage, rank=0, version=version, boxes=1, timeout_s=30.0), wire.Sealed)


@pytest.fixture(scope="module")
def trainer_of_wrecks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningDaemon, Connection]]:
    """A daemon that has found all of this, and the trainer of all the stages."""
    need_root()
    cases = {name: change for table in (ADOPTED, SET_ASIDE, LEFT_ALONE) for name, (change, _) in table.items()}
    with serving(tmp_path_factory.mktemp("wrecks") / "run", "--return-s", "60") as daemon:
        with Connection(daemon.socket, name="trainer rank 0") as trainer:
            for name in cases:
                declare(trainer, name)
                publish_zeros(trainer, name, 1)
            daemon.kill()
            for name, change in cases.items():
                change(daemon.segment(name))
            for name in ("half", "being"):
                daemon.segment(name + segment.UNFINISHED).write_bytes(b"half a segment")
            with daemon.segment("being" + segment.UNFINISHED).open() as somebody:
                fcntl.flock(somebody, fcntl.LOCK_EX)
                daemon.restart()
            yield daemon, trainer


Wrecks = tuple[RunningDaemon, Connection]


def logged(daemon: RunningDaemon, event: str, path: Path) -> dict[str, str]:
    """What the daemon has logged about a file. Exactly one line."""
    lines = map(json.loads, daemon.log.splitlines())
    (found,) = (line for line in lines if line["event"] == event and line["segment"] == str(path))
    return found


def touches(daemon: RunningDaemon, name: str) -> bool:
    """Whether the daemon has a file of this name open or mapped."""
    process = Path(f"/proc/{daemon.pid}")
    opened = [os.readlink(path) for path in (process / "fd").iterdir()]
    return any(name in line for line in [*opened, *(process / "maps").read_text().splitlines()])


@pytest.mark.parametrize("name", ADOPTED)
def test_a_stage_is_adopted_while_one_record_is_whole(trainer_of_wrecks: Wrecks, name: str) -> None:
    daemon, trainer = trainer_of_wrecks
    _, sealed = ADOPTED[name]
    assert declare(trainer, name).newest == sealed
    assert touches(daemon, daemon.segment(name).name)
    if sealed is None:
        assert states(daemon, name)[0] == ("filling", 1)
        trainer.request(wire.Abort(stage=name, rank=0, version=1, reason="who knows"), wire.Done)
    publish_zeros(trainer, name, 2)


@pytest.mark.parametrize("name", SET_ASIDE)
def test_a_damaged_segment_is_set_aside_and_its_stage_declared_anew(trainer_of_wrecks: Wrecks, name: str) -> None:
    daemon, trainer = trainer_of_wrecks
    aside = daemon.segment(name + "~damaged")
    line = logged(daemon, "segment_set_aside", aside)
    assert re.search(SET_ASIDE[name][1], line["what"])
    assert line["remedy"]
    assert not touches(daemon, aside.name)
    with pytest.raises(UnknownStage, match=f"there is no stage '{name}'"):
        publish_zeros(trainer, name, 2)
    assert declare(trainer, name).newest is None
    publish_zeros(trainer, name, 1)
    assert aside.exists()
    assert daemon.segment(name).exists()


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_ours_is_left_alone_and_its_name_not_used(trainer_of_wrecks: Wrecks, name: str) -> None:
    daemon, trainer = trainer_of_wrecks
    line = logged(daemon, "segment_left_alone", daemon.segment(name))
    assert re.search(LEFT_ALONE[name][1], line["what"])
    assert line["remedy"]
    assert not touches(daemon, daemon.segment(name).name)
    before = daemon.segment(name).lstat()
    with pytest.raises(SegmentTaken, match="that this daemon did not make"):
        declare(trainer, name)
    assert daemon.segment(name).lstat() == before
    assert not daemon.segment(name + segment.UNFINISHED).exists()


def test_a_half_made_segment_is_removed_unless_somebody_is_making_it(trainer_of_wrecks: Wrecks) -> None:
    daemon, _ = trainer_of_wrecks
    half, being = (daemon.segment(name + segment.UNFINISHED) for name in ("half", "being"))
    assert logged(daemon, "half_made_segment_removed", half)
    assert not half.exists()
    assert "in use by another daemon" in logged(daemon, "segment_left_alone", being)["what"]
    assert being.exists()


def test_one_damaged_segment_is_kept_per_stage(daemon: RunningDaemon) -> None:
    path = daemon.segment("policy")
    inodes = []
    with Connection(daemon.socket, name="trainer rank 0") as trainer:
        for _ in range(2):
            declare(trainer, "policy")
            inodes.append(path.stat().st_ino)
            daemon.kill()
            flip(path, 20)
            daemon.restart()
        assert daemon.segments() == [path.name + "~damaged"]
        assert daemon.segment("policy~damaged").stat().st_ino == inodes[1] != inodes[0]
        daemon.restart()
        assert logged(daemon, "set_aside_before", daemon.segment("policy~damaged"))["remedy"]
        declare(trainer, "policy")


def test_what_cannot_be_set_aside_is_left_alone(daemon: RunningDaemon) -> None:
    with Connection(daemon.socket, name="trainer rank 0") as trainer:
        declare(trainer, "policy")
        daemon.kill()
        flip(daemon.segment("policy"), 20)
        daemon.segment("policy~damaged").mkdir()
        daemon.restart()
        line = logged(daemon, "segment_left_alone", daemon.segment("policy"))
        assert "the superblock" in line["what"]
        assert "cannot be set aside" in line["what"]
        with pytest.raises(SegmentTaken):
            declare(trainer, "policy")
        declare(trainer, "another")


def test_what_somebody_else_put_in_the_way_of_a_new_stage_is_refused(daemon: RunningDaemon) -> None:
    daemon.segment("policy" + segment.UNFINISHED).symlink_to("/etc/passwd")
    with Connection(daemon.socket, name="trainer rank 0") as trainer:
        with pytest.raises(SegmentForeign, match="not a file of this daemon's uid"):
            declare(trainer, "policy")
        declare(trainer, "another")
    assert daemon.segment("policy" + segment.UNFINISHED).is_symlink()


def test_segments_of_another_living_daemon_are_left_alone(daemon: RunningDaemon, tmp_path: Path) -> None:
    with declared(daemon) as stage:
        publish(stage, 1)
        other = start(tmp_path / "other", prefix=daemon.prefix)
        try:
            assert "in use by another daemon" in logged(other, "segment_left_alone", daemon.segment("policy"))["what"]
            assert not other.status().stages
            with Connection(other.socket, name="trainer rank 0") as trainer, pytest.raises(SegmentTaken):
                declare(trainer, "policy")
        finally:
            assert other.stop() == 0
        publish(stage, 2)
        assert_holds(daemon, 2)


def test_clients_of_a_stage_that_was_set_aside_learn_so(daemon: RunningDaemon) -> None:
    stage = declared(daemon)
    publish(stage, 1)
    with attach(daemon) as reader:
        lease = reader.lease()
        daemon.kill()
        flip(daemon.segment("policy"), block(daemon.segment("policy")).catalog_at)
        daemon.restart()
        assert torch.equal(lease.read("a"), staged(1))  # the mapping stands, and nobody writes to it any more
        for call in (lease.release, reader.lease, lambda: publish(stage, 2)):
            with pytest.raises(UnknownStage, match="there is no stage 'policy'"):
                call()
        stage.close()
        with declared(daemon) as anew:
            publish(anew, 1)
            assert_holds(daemon, 1)
