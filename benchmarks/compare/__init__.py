# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""stagingd beside what users would pick instead, on the same models, trainers, engine and quantization."""
