# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The models of ``benchmarks.read``: their Hugging Face configurations, and the tensors of their checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch


@dataclass(frozen=True)
class Sizes:
    """A decoder with grouped queries: Llama's, or with experts Qwen3-MoE's. ``width`` is that of one expert."""

    layers: int
    hidden: int
    width: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    experts: int = 0

    def save_config(self, folder: Path) -> None:
        """Write config.json."""
        import transformers  # noqa: PLC0415 - takes seconds

        options = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        }
        if self.experts:
            options |= {"num_experts": self.experts, "num_experts_per_tok": min(8, self.experts)}
            options |= {"moe_intermediate_size": self.width, "decoder_sparse_step": 1, "mlp_only_layers": []}
            config = transformers.Qwen3MoeConfig(**options, architectures=["Qwen3MoeForCausalLM"])
        else:
            config = transformers.LlamaConfig(**options, architectures=["LlamaForCausalLM"])
        config.dtype = torch.bfloat16
        config.save_pretrained(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a checkpoint, by name."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer()}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head, self.key_heads * self.head
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"self_attn.{name}_proj.weight", (rows, self.hidden)
        yield "self_attn.o_proj.weight", (self.hidden, queries)
        yield "input_layernorm.weight", (self.hidden,)
        yield "post_attention_layernorm.weight", (self.hidden,)
        if self.experts:
            yield "self_attn.q_norm.weight", (self.head,)
            yield "self_attn.k_norm.weight", (self.head,)
            yield "mlp.gate.weight", (self.experts, self.hidden)
        for prefix in [f"mlp.experts.{number}." for number in range(self.experts)] or ["mlp."]:
            yield f"{prefix}gate_proj.weight", (self.width, self.hidden)
            yield f"{prefix}up_proj.weight", (self.width, self.hidden)
            yield f"{prefix}down_proj.weight", (self.hidden, self.width)

    def tensors(self, version: int, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Random bf16 weights, other ones for every version."""
        generator = torch.Generator(device).manual_seed(version)
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            yield name, values.mul_(0.02).add_(float(len(shape) == 1))


_8B: Final = Sizes(32, 4096, 14336, 32, 8, 128, 128256)
_DEBUG: Final = Sizes(2, 256, 512, 4, 2, 64, 1024)
SIZES: Final = {
    "8B": _8B,
    "30B-A3B": Sizes(48, 2048, 768, 32, 4, 128, 151936, experts=128),
    "debug": _DEBUG,
    # Fewer layers of the same: for what a byte costs, and of what would not fit whole beside its trainers.
    "8B-16-layers": replace(_8B, layers=16),
    "8B-8-layers": replace(_8B, layers=8),
    "70B-20-layers": Sizes(20, 8192, 28672, 64, 8, 128, 128256),
    "debug-8-layers": replace(_DEBUG, layers=8),
}
