# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What happens to a version that nobody has read."""

from __future__ import annotations

from enum import StrEnum


class Policy(StrEnum):
    """What beginning a version does when a sealed one has not been read yet."""

    BLOCK = "block"
    """Wait until an engine has leased it: every version is read by somebody."""

    LATEST = "latest"
    """Go on: the sealed version becomes the front unread, and the old front is filled."""
