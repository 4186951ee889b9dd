# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Devices that shards cannot be flushed from are refused, with what to do."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator

import pytest
import torch
from stagingd_client.flushers import open_device

from stagingd import segment
from stagingd.boxes import whole
from stagingd.catalog import TensorDeclaration, build
from stagingd.errors import DeviceUnusable
from stagingd.moments import ALL_GRIDS


@pytest.fixture
def made() -> Iterator[segment.Segment]:
    declared = TensorDeclaration(name="w", dtype="bfloat16", shape=(4, 4), boxes=(whole((4, 4)),))
    catalog = build("policy", [[declared]], ALL_GRIDS)
    made = segment.create(f"/stagingd-test-{uuid.uuid4().hex[:12]}", catalog, lock=False)
    yield made
    made.unlink()
    made.close()


def test_a_device_of_another_kind_is_refused(made: segment.Segment) -> None:
    with pytest.raises(DeviceUnusable, match=r"meta.*CUDA device"):
        open_device(torch.device("meta"), made)


@pytest.mark.skipif(importlib.util.find_spec("cuda") is not None, reason="CUDA's bindings are installed here")
def test_missing_bindings_are_named_with_where_they_come_from(made: segment.Segment) -> None:
    with pytest.raises(DeviceUnusable, match=r"cuda.*cuda-bindings"):
        open_device(torch.device("cuda", 0), made)
