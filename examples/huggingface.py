# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""A transformers model on one GPU, or on CPU: its names are the stage's, so there is nothing to map.

stagingd serve &
python examples/huggingface.py                  # a small random model
python examples/huggingface.py Qwen/Qwen3-0.6B  # any causal language model
"""

from __future__ import annotations

import sys

import torch
from arrived import check_arrived
from stagingd_client import Stage
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

STEPS = 3


def load(names: list[str]) -> PreTrainedModel:
    """The model that is asked for."""
    if names:
        return AutoModelForCausalLM.from_pretrained(names[0])
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=500, **sizes, **heads, tie_word_embeddings=False))


def main() -> None:
    """Train on noise, and stage every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load(sys.argv[1:]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with Stage.open("huggingface-example") as stage:
        stage.fence_before(optimizer)  # a step waits until its predecessor's weights are copied
        for step in range(1, STEPS + 1):
            tokens = torch.randint(0, model.config.vocab_size, (2, 16), device=device)
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            publication = stage.publish(step, model)  # returns at once
        publication.wait()  # only for the check below: engines need no word from the trainer
        check_arrived("huggingface-example", STEPS, dict(model.named_parameters()))


if __name__ == "__main__":
    main()
