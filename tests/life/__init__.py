# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The world of test_life.py: a machine, clients that do what the real ones do, and a daemon that may be killed."""
