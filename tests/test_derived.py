# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""State that a model derives from its weights is made anew where it was, and follows every version."""

from __future__ import annotations

import pytest
import torch
from stagingd_vllm.derived import made_anew, refresh_derived
from stagingd_vllm.layouts import LayoutUnknown, homes


class MLAAttention(torch.nn.Module):
    """Named as vLLM's, which makes two tensors of a projection's weight after loading.

    One of them is a parameter, as in newer versions, the other a plain attribute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kv_b_proj = torch.nn.Linear(4, 6, bias=False)
        self.process_weights_after_loading(torch.float32)

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        upper, lower = self.kv_b_proj.weight.detach().to(dtype).clone().split(3)
        self.W_UK_T = torch.nn.Parameter(upper.t(), requires_grad=False)
        self.W_UV = lower * 1


def test_what_is_derived_follows_the_weights_and_stays_where_it_was() -> None:
    model = torch.nn.Sequential(MLAAttention(), torch.nn.Linear(2, 2))
    attention = model[0]
    before = attention.W_UK_T, attention.W_UV
    attention.kv_b_proj.weight.data.normal_()
    refresh_derived(made_anew(model), torch.float32)
    assert attention.W_UK_T is before[0]
    assert attention.W_UV is before[1]
    assert attention.W_UK_T.t().equal(attention.kv_b_proj.weight[:3])
    assert attention.W_UV.equal(attention.kv_b_proj.weight[3:])


def test_what_is_derived_in_another_shape_is_refused() -> None:
    model = torch.nn.Sequential(MLAAttention())
    model[0].W_UV = torch.zeros(2, 2)
    with pytest.raises(LayoutUnknown, match=r"0\.W_UV was torch\.float32 \(2, 2\) and is made anew as"):
        refresh_derived(made_anew(model), torch.float32)


def test_no_loader_is_expected_to_write_what_is_derived() -> None:
    assert set(homes(torch.nn.Sequential(MLAAttention()))) == {"0.kv_b_proj.weight"}
