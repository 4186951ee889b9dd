# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.26 imports Ray for its IPC backend, whether anybody uses it or not."""

from __future__ import annotations

import importlib.util
import sys
import types


def without_ray() -> None:
    """An empty module in its place, where it is not installed."""
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        sys.modules["ray"] = types.ModuleType("ray")
