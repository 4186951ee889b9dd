# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""To be written."""
