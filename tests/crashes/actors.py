# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The parts that processes play: the doomed ones, and those that take their places."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NoReturn

import torch
from stagingd_client import Stage
from stagingd_vllm import Reader

from crashes import model
from crashes.doom import Doom
from crashes.points import BY_ID, Point, Step
from stagingd import cli

TIMEOUT_S = 20.0


def _begin(pipe: Pipe, point: str = "") -> Doom | None:
    pipe.recv_bytes()  # the one who watches is there
    torch.set_num_threads(1)
    if not point:
        return None
    doom = Doom(BY_ID[point], lambda word: pipe.send_bytes(word.encode()))
    doom.set()
    return doom


def _pause(pipe: Pipe, point: Point) -> None:
    """The daemon is killed now, where that is the scene."""
    if point.step is Step.RECOVERY:
        pipe.send_bytes(b"paused")
        pipe.recv_bytes()


def _survived() -> NoReturn:
    raise AssertionError("came to the end, and was not killed")


def daemon(pipe: Pipe, folder: str, prefix: str, return_s: str, point: str) -> None:
    """``stagingd serve``, doomed where a point is named."""
    with (Path(folder) / "daemon.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    _begin(pipe, point)
    cli.serve(
        runtime_dir=Path(folder), segment_prefix=prefix, lock_memory=False, return_s=float(return_s), log_level="debug"
    )


def trainer(pipe: Pipe, stage: str, socket: str, point_id: str) -> None:
    """Trainer rank 1: comes to the stage and takes part in version 2, until it is killed."""
    _begin(pipe, point_id)
    point = BY_ID[point_id]
    with Stage.open(stage, rank=1, ranks=2, socket=socket, timeout_s=TIMEOUT_S) as ours:
        ours.declare(model.shards(0, rank=1))
        model.fill(ours, 2)
        ours.fence()
        if point.step is not Step.SHUTDOWN:
            _pause(pipe, point)
            ours.commit().wait()
            model.fill(ours, 3)
            ours.fence()
    _survived()


def worker(pipe: Pipe, stage: str, socket: str, point_id: str) -> None:
    """Rank 1 of the engine: reads the newest version, until it is killed."""
    doom = _begin(pipe, point_id)
    assert doom is not None
    with Reader.attach(stage, engine="engine", rank=1, ranks=2, socket=socket, timeout_s=TIMEOUT_S) as reader:
        lease = reader.lease(timeout_s=TIMEOUT_S)
        model.check(lease, doom.passage)
        _pause(pipe, doom.point)
        if doom.point.step is not Step.SHUTDOWN:
            lease.release()
    _survived()


def new_trainer(pipe: Pipe, stage: str, socket: str, *versions: str) -> None:
    """Takes the place of trainer rank 1 for these versions."""
    _begin(pipe)
    with Stage.open(stage, rank=1, ranks=2, socket=socket, timeout_s=TIMEOUT_S) as ours:
        ours.declare(model.shards(0, rank=1))
        for version in versions:
            model.publish(int(version), ours)


def new_worker(pipe: Pipe, stage: str, socket: str) -> None:
    """Takes the place of the engine's rank 1: reads the newest version, and says which it was."""
    _begin(pipe)
    with Reader.attach(stage, engine="engine", rank=1, ranks=2, socket=socket, timeout_s=TIMEOUT_S) as reader:
        pipe.send_bytes(b"attached")
        pipe.recv_bytes()
        with reader.lease(timeout_s=TIMEOUT_S) as lease:
            pipe.send_bytes(str(model.check(lease)).encode())
