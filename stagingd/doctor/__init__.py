# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``stagingd doctor``: what would keep this machine from staging weights, or slow it down, and what to do about it.

What a machine says of itself is read into frozen records, under a root that tests can give (``files``). Rules turn the
records into findings, and touch nothing. What needs torch runs in a process of its own (``gpu_process``).
"""
