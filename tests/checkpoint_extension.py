# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension on a stage whose versions 1, 2, … are checkpoints on disk; imported in the worker only."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from typing import Any

import stagingd_vllm.attachment
import torch
from private_stage import PrivateLease, by_rows, private_stage
from safetensors.torch import load_file
from stagingd_vllm.extension import StagingdWorkerExtension, Worker
from stagingd_vllm.reader import Reader
from stagingd_vllm.step_hooks import watch

from stagingd.aliases import Alias


class CheckpointReader:
    """Attaches to a stage whose name is a list of checkpoint directories; to another as always.

    Where the head equals the embedding it is an alias of it, as trainers with tied weights declare it.
    """

    def __init__(self, stage: str) -> None:
        directories = stage.split(os.pathsep)
        self.versions = [load_file(os.path.join(directory, "model.safetensors")) for directory in directories]
        aliases = self._tied("lm_head.weight", "model.embed_tokens.weight")
        cut = {name: by_rows(tuple(tensor.shape), 2) for name, tensor in self.versions[0].items()}
        self._undo = contextlib.ExitStack()
        self._stage = self._undo.enter_context(private_stage(self.versions[0], cut, aliases=aliases))
        self.catalog, self.slots = self._stage.catalog, self._stage.slots

    def _tied(self, alias: str, name: str) -> tuple[Alias, ...]:
        if not all(torch.equal(version[alias], version[name]) for version in self.versions):
            return ()
        for version in self.versions:
            del version[alias]
        return (Alias(alias=alias, name=name),)

    @classmethod
    def attach(cls, stage: str, **options: Any) -> CheckpointReader | Reader:
        return cls(stage) if os.path.isdir(stage.split(os.pathsep, maxsplit=1)[0]) else Reader.attach(stage, **options)

    def lease(self, *, version: int | None = None, **_: object) -> PrivateLease:
        version = version or len(self.versions)
        return self._stage.write(version, self.versions[version - 1])

    def leave(self) -> None:
        """Nobody waits for what is there."""

    def close(self) -> None:
        self._undo.close()


stagingd_vllm.attachment.Reader = CheckpointReader  # type: ignore[assignment, attr-defined]


class CheckpointExtension(StagingdWorkerExtension):
    """Also tells what the live weights are, and how many steps have been told of."""

    stagingd_seen = 0
    stagingd_unwatch: Callable[[], None] | None = None

    def stagingd_watch(self: Any) -> None:
        def began() -> None:
            self.stagingd_seen += 1

        self.stagingd_unwatch = watch(self.model_runner, self.get_model(), began)

    def stagingd_steps(self: Any) -> int:
        return self.stagingd_seen

    def stagingd_weights(self: Worker) -> dict[str, tuple[int, str]]:
        """Address and digest of every live parameter."""
        return {
            name: (parameter.data_ptr(), hashlib.sha256(parameter.view(torch.uint8).numpy().tobytes()).hexdigest())
            for name, parameter in self.get_model().named_parameters(remove_duplicate=False)
        }
