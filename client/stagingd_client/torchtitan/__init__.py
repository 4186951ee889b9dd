# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""TorchTitan publishes its weights after every step, by a few lines of its config; nothing of it is forked.

``converter`` is for 0.2.x, a model converter; ``override`` is for 0.3.x, a config override. Either hooks
``publishing`` into the optimizer's steps. Only those two import torchtitan.
"""
