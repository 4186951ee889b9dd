# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""What /proc and /sys say of this machine, for the daemon and for the doctor."""
