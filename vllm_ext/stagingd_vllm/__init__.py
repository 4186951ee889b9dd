# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The engine's side of stagingd: read slices, quantize them, and put them into live weights."""

from stagingd_vllm.answers import checked
from stagingd_vllm.reader import Lease, Reader

__all__ = ["Lease", "Reader", "checked"]
