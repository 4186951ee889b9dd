# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension of engines with vLLM's IPC backend: a module of its own, since its import has effects."""

from __future__ import annotations

from benchmarks.compare.no_ray import without_ray
from benchmarks.compare.worker import CompareExtension

without_ray()  # before the worker makes its weight-transfer engine


class IpcExtension(CompareExtension):
    """Nothing more."""
