# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Crash tests: real processes, killed with SIGKILL at every named point of the protocol."""

import pytest

pytest.register_assert_rewrite(f"{__name__}.model", f"{__name__}.scene", f"{__name__}.processes", f"{__name__}.reign")
pytest.register_assert_rewrite(f"{__name__}.trainer_dies", f"{__name__}.worker_dies", f"{__name__}.daemon_dies")
