# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The check of ``benchmarks.read`` finds what a receiver has written right, and one wrong byte or scale wrong."""

from __future__ import annotations

import pytest
import torch
from live_model import Parallel, tensors
from private_stage import by_rows, private_stage
from stagingd_vllm.exactness import Exactness
from stagingd_vllm.layouts import homes
from stagingd_vllm.receiver import Receiver

from benchmarks.host_case import BenchmarkFailed
from benchmarks.read_check import compare
from stagingd.boxes import whole


@pytest.mark.parametrize("scheme", ["plain", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_byte_and_a_wrong_scale_are_found_in_every_parameter(scheme: str, rank: int) -> None:
    full, worker = tensors(5), Parallel(scheme, rank, 2)
    boxes = {name: by_rows(tuple(t.shape), 2) if t.dim() > 1 else [whole(tuple(t.shape))] for name, t in full.items()}
    with private_stage(full, boxes) as stage:
        stage.write(1, full)
        Receiver(worker.model, worker.plan, stage).apply(stage.lease(1))
        for name in worker.plan.parameters:
            home = homes(worker.model)[name]
            entries = [entry for entry in worker.plan.entries if entry.region.parameter == name]

            def found() -> Exactness:
                return compare(home, tuple(home.weight.shape), entries, full.__getitem__)  # noqa: B023

            assert found() == Exactness(home.weight.nbytes, 0 if home.scale is None else home.scale.numel())
            home.weight.view(torch.uint8).view(-1)[-1] ^= 1
            assert found().differing_bytes == 1
            if home.scale is not None:
                home.scale.view(-1)[0] += 1
                assert found().differing_scales == 1


def test_a_scheme_that_it_cannot_check_is_refused() -> None:
    full, worker = tensors(5), Parallel("int8_per_channel_weight_only", 0, 1)
    home = homes(worker.model)["experts.w13_weight"]
    entries = [entry for entry in worker.plan.entries if entry.region.parameter == "experts.w13_weight"]
    with pytest.raises(BenchmarkFailed, match="not checked here"):
        compare(home, tuple(home.weight.shape), entries, full.__getitem__)
