# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine would get, for the examples to compare with what they have trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from stagingd_vllm import Reader


def check_arrived(stage: str, version: int, wanted: Mapping[str, torch.Tensor]) -> None:
    """Read a version and compare every bit. Raises ValueError where it is another.

    Args:
        stage, version: what to read.
        wanted: the whole tensors by Hugging Face names.
    """
    with Reader.attach(stage, engine="example", rank=0, ranks=1) as reader, reader.lease(version=version) as lease:
        staged = {tensor.name for tensor in reader.catalog.tensors}
        if staged != set(wanted):
            raise ValueError(f"names differ: {sorted(staged ^ set(wanted))}")
        for name, tensor in wanted.items():
            if not torch.equal(lease.read(name), tensor.detach().cpu().bfloat16()):
                raise ValueError(f"{name} of version {version} is not what was trained")
    print(f"version {version} has arrived: {len(wanted)} tensors, every bit")  # noqa: T201
