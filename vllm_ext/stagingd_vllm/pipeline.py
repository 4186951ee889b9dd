# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Which staged tensors belong to the other stages of a pipeline-parallel engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer


def on_other_stages(model: torch.nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` that lie in layers of which this stage has but the place.

    Whether such a layer has a tensor of this name only its own stage can tell: it refuses what it does not know.

    Args:
        model: a vLLM model of one stage.
        names: of tensors in a checkpoint.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # Not vLLM's get_pp_missing_layer_names: it remembers its answers by the identity of models that may be gone.
    absent = (PPMissingLayer, StageMissingLayer)
    missing = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, absent))
    own = {name: name if mapper is None else next(iter(mapper.apply_list([name])), "") for name in names}
    return frozenset(name for name, in_model in own.items() if in_model.startswith(missing))
