# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of stagingd: each a module of its own, run by ``python -m benchmarks.NAME``."""
