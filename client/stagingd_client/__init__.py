# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of stagingd: flush shards into the stage and carry on."""

from stagingd_client.placement import LocalShard
from stagingd_client.publication import Publication
from stagingd_client.stage import Stage

__all__ = ["LocalShard", "Publication", "Stage"]
