# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What the daemon shows over HTTP: metrics, health and the status page. See ``stagingd.web.server``."""
