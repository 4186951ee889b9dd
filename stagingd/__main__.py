# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m stagingd`` is the command ``stagingd``."""

from stagingd.cli import main

if __name__ == "__main__":
    main()
