# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The demo's engine: a real vLLM engine that takes every version from the stage and is checked against itself.

After each update it generates; then vLLM's own loader loads the trainer's full checkpoint of the same
version into the same engine, and it generates again: tokens and log-probabilities must be the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagingd.errors import DeadlineExceeded
from stagingd_vllm.answers import Answer, answering, checked
from stagingd_vllm.exactness import Exactness, compare_slice
from stagingd_vllm.extension import StagingdWorkerExtension, Worker, attachment_of
from stagingd_vllm.scales import Granularity

if TYPE_CHECKING:
    from vllm import LLM

TENSOR_PARALLEL = 2
DEADLINE_S = 120.0
PROMPTS = ([1, 5, 9, 7], [3, 4], [1000, 17, 256, 33, 8, 2])
Generated = list[list[tuple[int, float]]]


class DemoWorkerExtension(StagingdWorkerExtension):
    """The extension that users name, and one check of the demo's own."""

    @answering
    def stagingd_check_fp8(self: Worker, version: int) -> Answer:
        """Whether FP8 made from this worker's slices of a version is that of the whole tensors, per granularity."""
        attachment = attachment_of(self)
        found = {granularity: Exactness() for granularity in Granularity}
        with attachment.reader.lease(version=version) as lease:
            for entry in attachment.receiver.plan.entries:
                if len(entry.source.lengths) == 2:  # the weights of linear layers and embeddings
                    for granularity in Granularity:
                        found[granularity] += compare_slice(lease, entry.tensor, entry.source, granularity)
        return {granularity.value: exactness.exact for granularity, exactness in found.items()}


def start_engine(folder: Path) -> LLM:
    """A CPU engine at tensor-parallel size 2 with the model as it was before training."""
    from vllm import LLM

    return LLM(
        str(folder / "model"),
        tensor_parallel_size=TENSOR_PARALLEL,
        worker_extension_cls="stagingd_vllm.demo.DemoWorkerExtension",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        gpu_memory_utilization=0.2,
        disable_log_stats=True,
    )


def generate(llm: LLM) -> Generated:
    """Greedy tokens with the log-probability of each, for every prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1, detokenize=False)
    llm.reset_prefix_cache()  # it holds keys and values of the weights before
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    return [
        [(token, step[token].logprob) for token, step in zip(out.token_ids, out.logprobs, strict=True)]
        for out in (output.outputs[0] for output in outputs)
    ]


def wait_for(path: Path, deadline_s: float = DEADLINE_S) -> Path:
    """Wait for what another process of the demo makes. Raises DeadlineExceeded."""
    until = time.monotonic() + deadline_s
    while not path.exists():
        if time.monotonic() > until:
            raise DeadlineExceeded(f"the trainers made no {path.name} within {deadline_s} s", remedy="see their logs")
        time.sleep(0.02)
    return path


def one_version(llm: LLM, folder: Path, wanted: int, before: int | None, outputs: list[Generated]) -> dict[str, Any]:
    """Ask for one more version, update to it, generate, and check. Returns a row of the report."""
    (folder / "wanted.part").write_text(str(wanted))
    (folder / "wanted.part").rename(folder / "wanted")
    updates = checked(llm.collective_rpc("stagingd_update", kwargs={"newer_than": before, "timeout_s": DEADLINE_S}))
    staged = generate(llm)
    version = updates[0]["version"]
    exact = checked(llm.collective_rpc("stagingd_check_fp8", kwargs={"version": version}))
    checkpoint = wait_for(folder / f"checkpoint-{version}")
    for source in (folder / "model", checkpoint):  # the first makes sure that the second has to load something
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(source)})
    loaded = generate(llm)
    row = {
        "version": version,
        "tokens_match": staged == loaded,
        "differs_from_before": staged != outputs[-1],
        "fp8_bit_exact": {g.value: all(rank[g.value] for rank in exact) for g in Granularity},
        "bytes_read_per_rank": [update["bytes_read"] for update in updates],
        "update_ms": max(update["milliseconds"] for update in updates),
        "same_version_on_all_ranks": len({update["version"] for update in updates}) == 1,
    }
    outputs.append(staged)
    return row


def main() -> None:
    """The engine process of the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--versions", type=int, required=True)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    wait_for(given.folder / "model")
    import vllm

    llm = start_engine(given.folder)
    attached = checked(
        llm.collective_rpc(
            "stagingd_attach", kwargs={"stage": given.stage, "socket": str(given.socket), "timeout_s": DEADLINE_S}
        )
    )
    report = given.folder / "engine.jsonl"
    outputs, version = [generate(llm)], None
    for wanted in range(1, given.versions + 1):
        row = one_version(llm, given.folder, wanted, version, outputs)
        version = row["version"]
        with report.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    llm.collective_rpc("stagingd_detach")
    llm.llm_engine.engine_core.shutdown()  # or its workers are killed and leave their shared memory behind
    (given.folder / "engine.json").write_text(json.dumps({"vllm": vllm.__version__, "ranks": attached}))


if __name__ == "__main__":
    main()
