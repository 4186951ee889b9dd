# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension on a stage whose versions 1, 2, … are checkpoints on disk; imported in the worker only."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import stagingd_vllm.extension
import torch
from safetensors.torch import load_file
from stagingd_vllm.extension import StagingdWorkerExtension, Worker

from stagingd.aliases import Alias
from stagingd.boxes import Box, whole


@dataclass(frozen=True)
class CheckpointTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointCatalog:
    tensors: tuple[CheckpointTensor, ...]
    aliases: tuple[Alias, ...]


class CheckpointLease:
    """A version, as tensors in this process's memory."""

    def __init__(self, version: int, tensors: dict[str, torch.Tensor]) -> None:
        self.version = version
        self.tensors = tensors

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        return self.tensors[name][(box or whole(self.tensors[name].shape)).slices]

    def __enter__(self) -> CheckpointLease:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class CheckpointReader:
    """Attaches to a stage whose name is a list of checkpoint directories.

    Where the head equals the embedding it is an alias of it, as trainers with tied weights declare it.
    """

    def __init__(self, stage: str) -> None:
        directories = stage.split(os.pathsep)
        self.versions = [load_file(os.path.join(directory, "model.safetensors")) for directory in directories]
        tied = self._tied("lm_head.weight", "model.embed_tokens.weight")
        self.catalog = CheckpointCatalog(
            tuple(
                CheckpointTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for name, tensor in self.versions[0].items()
            ),
            tied,
        )

    def _tied(self, alias: str, name: str) -> tuple[Alias, ...]:
        if not all(torch.equal(version[alias], version[name]) for version in self.versions):
            return ()
        for version in self.versions:
            del version[alias]
        return (Alias(alias=alias, name=name),)

    @classmethod
    def attach(cls, stage: str, **_: object) -> CheckpointReader:
        return cls(stage)

    def lease(self, *, version: int | None = None, **_: object) -> CheckpointLease:
        version = version or len(self.versions)
        return CheckpointLease(version, self.versions[version - 1])

    def close(self) -> None:
        pass


stagingd_vllm.extension.Reader = CheckpointReader  # type: ignore[assignment, attr-defined]


class CheckpointExtension(StagingdWorkerExtension):
    """Also tells what the live weights are."""

    def stagingd_weights(self: Worker) -> dict[str, tuple[int, str]]:
        """Address and digest of every live parameter."""
        return {
            name: (parameter.data_ptr(), hashlib.sha256(parameter.view(torch.uint8).numpy().tobytes()).hexdigest())
            for name, parameter in self.get_model().named_parameters(remove_duplicate=False)
        }
