# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How the workers of one engine come to one outcome of a call through vLLM's own weight-transfer API.

That API has no answers, so a refusal has to be raised; and vLLM's multiprocess executor stops listening at the first
worker that raises and leaves the others' answers in their queues, where every later call takes them for its own. So
here all workers learn of a refusal (``together``), all of them refuse, which ends vLLM's session in each, and only
the last one, whose answer is listened to last, says so (``refuse_once``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from stagingd.errors import DeadlineExceeded, StagingError

PEERS_S = 60.0
"""How long to wait for the other workers beyond the time that each may take by itself, in seconds."""
_TEXT_BYTES = 4096
_SESSION_BEFORE = {"start_weight_update": False, "update_weights": True, "finish_weight_update": True}
_CALLS = ("init_weight_transfer_engine", "start_draft_weight_update", *_SESSION_BEFORE)

logger = logging.getLogger(__name__)


class RefusedByAll(StagingError):
    """What one worker of an engine refused, so that every one of them refuses it."""

    code = "refused_by_all"


class Group(Protocol):
    """The part of vLLM's process groups that this needs: gloo is for the text of a refusal."""

    world_size: int
    cpu_group: dist.ProcessGroup


@contextlib.contextmanager
def together(groups: Sequence[Group], timeout_s: float) -> Iterator[None]:
    """What fails in the body on one worker fails on all; each of them has to enter it.

    Args:
        groups: their product is the engine; none for an engine of one worker.
        timeout_s: how long to wait for the others at the end, in seconds.

    Raises:
        RefusedByAll: the first refusal, on every worker.
        DeadlineExceeded: the others have not come to an end.
    """
    try:
        yield
    except Exception as error:
        refusal = _first_refusal(_described(error), groups, timeout_s)
        raise _refused(refusal) from error
    refusal = _first_refusal({}, groups, timeout_s)
    if refusal:
        raise _refused(refusal)


def _described(error: Exception) -> dict[str, str]:
    if isinstance(error, StagingError):
        return {"code": error.code, "what": error.what, "remedy": error.remedy}
    return {"code": type(error).__name__, "what": str(error), "remedy": "see the worker's log"}


def _refused(refusal: dict[str, str]) -> RefusedByAll:
    return RefusedByAll(f"{refusal['code']}: {refusal['what']}", remedy=refusal["remedy"])


def _first_refusal(mine: dict[str, str], groups: Sequence[Group], timeout_s: float) -> dict[str, str]:
    for group in groups:
        if group.world_size > 1:
            told = _gather(_as_bytes(mine), group, timeout_s)
            mine = next((refusal for refusal in map(_from_bytes, told) if refusal), {})
    return mine


def _gather(mine: torch.Tensor, group: Group, timeout_s: float) -> list[torch.Tensor]:
    told = [torch.zeros_like(mine) for _ in range(group.world_size)]
    try:
        group.cpu_group.allgather([told], [mine]).wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:  # of gloo: out of time, or a peer is gone
        raise DeadlineExceeded(
            f"the engine's other workers did not say within {timeout_s} s how they fared: {error}",
            remedy="look at their logs; the weights of this engine may be of two versions",
        ) from error
    return told


def _as_bytes(refusal: dict[str, str]) -> torch.Tensor:
    # Cut to fit, so that the text of each part survives and the whole can still be read.
    text = json.dumps({name: part[:600] for name, part in refusal.items()}).encode()
    return torch.frombuffer(bytearray(text.ljust(_TEXT_BYTES)[:_TEXT_BYTES]), dtype=torch.uint8)


def _from_bytes(told: torch.Tensor) -> dict[str, str]:
    refusal: dict[str, str] = json.loads(told.numpy().tobytes())
    return refusal


def refuse_once(worker_class: type, ours: Callable[[Any], bool]) -> None:
    """Lets only the last worker of a multiprocess engine raise what all of its workers raise.

    Args:
        worker_class: vLLM's worker class, whose weight-transfer calls are wrapped; wrapped once.
        ours: whether a worker's calls are to be treated so; those of any other stay as they are.
    """
    for name in _CALLS:
        original = getattr(worker_class, name, None)
        if original is not None and not hasattr(original, "__wrapped__"):
            setattr(worker_class, name, _refusing_once(name, original, ours))


def _refusing_once(name: str, original: Callable[..., None], ours: Callable[[Any], bool]) -> Callable[..., None]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        # A draft is always refused; a session is open in all workers or in none.
        out_of_order = name == "start_draft_weight_update" or (
            name in _SESSION_BEFORE and self._weight_update_active != _SESSION_BEFORE[name]
        )
        try:
            original(self, *args, **kwargs)
        except (RefusedByAll, RuntimeError) as error:
            by_all = out_of_order or isinstance(error, RefusedByAll)
            if not (by_all and ours(self) and _others_answer_later(self)):
                raise
            logger.warning("%s is refused: %s", name, error)

    return call


def _others_answer_later(worker: Any) -> bool:
    parallel = worker.parallel_config
    # The worker's own rank, counted inside its data-parallel replica, is the order in which vLLM listens.
    return bool(parallel.distributed_executor_backend == "mp" and worker.rank < parallel.world_size - 1)
