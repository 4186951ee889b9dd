# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Real TorchTitan runs on CPU publish every step: what readers get is what the model's adapter makes of the whole.

The runs are those of the TorchTitan that is installed, 0.2 or 0.3: only one can be. Where it is 0.2, the override for
0.3 runs in a stand-in for what it uses of 0.3.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from daemons import RunningDaemon, eventually
from stagingd_vllm import Reader
from titan import Run, Titan, running

from stagingd import wire
from stagingd.connection import Connection
from stagingd.errors import UnknownModel

VERSION = importlib.metadata.version("torchtitan")
EXAMPLES = Path(__file__).parents[1] / "examples" / "torchtitan"
SMALL = ("--training.seq_len=64", "--training.local_batch_size=2", "--lr_scheduler.warmup_steps=0")
OF_02 = ("--training.dataset=c4_test", "--model.converters=witness,stagingd")
BY_IMPORT = "--experimental.custom_import=stagingd_client.torchtitan.converter"
OF_03 = ("--parallelism.spmd_backend=partial_dtensor",)  # the default one needs a newer torch
OVERRIDE = "stagingd_client.torchtitan.override.staged"
HERE_02 = VERSION.startswith("0.2.")


@pytest.fixture(scope="module")
def titan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Titan]:
    with running(tmp_path_factory.mktemp("titan")) as found:
        yield found


def check(run: Run, reader: Reader, version: int, step: int) -> None:
    """Every tensor of a version, in every bit, is what the witness saw after the step."""
    with reader.lease(newer_than=version - 1, timeout_s=120) as lease:
        assert lease.version == version
        wanted = run.tensors(step)
        assert {tensor.name for tensor in reader.catalog.tensors} == set(wanted)
        for name, tensor in wanted.items():
            staged = lease.read(name)
            assert staged.dtype == tensor.dtype, name
            assert torch.equal(staged.view(torch.uint8), tensor.view(torch.uint8)), f"{name} of version {version}"


def follow(run: Run, reader: Reader, versions: dict[int, int]) -> None:
    """Read every version, given with its step, when the trainer has gone one step further already."""
    last = max(versions.values())
    for version, step in versions.items():
        eventually(lambda: run.saved(min(step + 1, last)), f"the end of a step:\n{run.log}")  # noqa: B023
        check(run, reader, version, step)
    assert set(run.statuses()) == {0}, run.log


def attached(daemon: RunningDaemon, stage: str) -> Reader:
    # A trainer that starts on busy cores imports for a minute.
    return Reader.attach(stage, engine="e", rank=0, ranks=1, socket=daemon.socket, timeout_s=240)


def settings(daemon: RunningDaemon, stage: str) -> dict[str, str]:
    return {"STAGINGD_SOCKET": str(daemon.socket), "STAGINGD_STAGE": stage, "STAGINGD_POLICY": "block"}


def check_nothing_is_left(daemon: RunningDaemon, stage: str) -> None:
    """A stage can be dropped when nobody holds anything of it."""
    assert not daemon.stage(stage).leases
    with Connection(daemon.socket, name="test") as connection:
        connection.request(wire.Drop(stage=stage), wire.Done)
    assert not daemon.segments()


if HERE_02:

    def test_every_step_arrives_and_a_resumed_run_goes_on(daemon: RunningDaemon, titan: Titan, stage_name: str) -> None:
        """FSDP2. A run ends with step 4; one goes on from there, and one goes back to step 2."""
        keeping = ("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no_last_save_model_only")
        common = ("--model.name=llama3", *SMALL, *OF_02, BY_IMPORT, *keeping)
        environment = settings(daemon, stage_name)
        run = titan.start("whole", 2, *common, "--training.steps=4", **environment)
        with attached(daemon, stage_name) as reader:
            follow(run, reader, {1: 1, 2: 2, 3: 3, 4: 4})
            run = titan.start("resumed", 2, *common, "--training.steps=5", **environment, WITNESS_STEP="4")
            follow(run, reader, {5: 5})
            back = ("--training.steps=3", "--checkpoint.load_step=2")
            run = titan.start("back", 2, *common, *back, **environment, WITNESS_STEP="2")
            follow(run, reader, {6: 3})
            assert "step 3 is published as version 6: the stage had 5 already" in run.log
        check_nothing_is_left(daemon, stage_name)

    @pytest.mark.parametrize(
        ("model", "ranks", "parallel"),
        [
            ("llama3", 4, ("--parallelism.tensor_parallel_degree=2",)),
            (
                "llama3",
                2,
                ("--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=1F1B"),
            ),
            ("deepseek_v3", 2, ()),
        ],
        ids=["fsdp-and-tensor-parallel", "pipeline-parallel", "experts"],
    )
    def test_every_layout_arrives(
        daemon: RunningDaemon, titan: Titan, stage_name: str, model: str, ranks: int, parallel: tuple[str, ...]
    ) -> None:
        """Set in TorchTitan's own config, as the example has it."""
        config = (f"--job.config_file={EXAMPLES / 'llama3_02.toml'}", f"--model.name={model}", "--checkpoint.no_enable")
        own = (f"--stagingd.stage={stage_name}", f"--stagingd.socket={daemon.socket}", "--stagingd.policy=block")
        run = titan.start(
            f"{model}-{ranks}",
            ranks,
            *config,
            *own,
            *SMALL,
            *OF_02,
            *parallel,
            "--training.steps=2",
            STAGINGD_STAGE="other",
        )
        with attached(daemon, stage_name) as reader:
            follow(run, reader, {1: 1, 2: 2})
        check_nothing_is_left(daemon, stage_name)

    def test_every_step_of_a_stand_in_for_03_arrives(daemon: RunningDaemon, tmp_path: Path, stage_name: str) -> None:
        own = json.dumps({"stage": stage_name, "socket": str(daemon.socket), "policy": "block"})
        command = [sys.executable, str(Path(__file__).with_name("titan_standin_03.py")), str(tmp_path), own]
        with (tmp_path / "log.0").open("wb") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        with process, attached(daemon, stage_name) as reader:
            follow(Run(process, tmp_path, 1), reader, {1: 1, 2: 2, 3: 3})
        check_nothing_is_left(daemon, stage_name)

else:

    def test_every_step_of_the_example_arrives_and_a_resumed_run_goes_on(daemon: RunningDaemon, titan: Titan) -> None:
        """FSDP2. What the example does not set is in the environment."""
        environment = settings(daemon, "another than the config says")
        keeping = ("--checkpoint.enable", "--checkpoint.no_last_save_model_only")
        common = ("--module=titan_config_03", "--config=example", *OF_03, *SMALL, *keeping)
        run = titan.start("whole", 2, *common, "--training.steps=3", **environment)
        with attached(daemon, "policy") as reader:
            follow(run, reader, {1: 1, 2: 2, 3: 3})
            run = titan.start("resumed", 2, *common, "--training.steps=4", **environment, WITNESS_STEP="3")
            follow(run, reader, {4: 4})
        check_nothing_is_left(daemon, "policy")

    def test_every_layout_arrives(daemon: RunningDaemon, titan: Titan, stage_name: str) -> None:
        """FSDP2 and tensor parallel, with fused q|k|v; set on the command line."""
        own = json.dumps({"stage": stage_name, "socket": str(daemon.socket), "policy": "block"})
        overrides = ("--override.imports", "titan_witness.witnessed", f"{OVERRIDE}={own}")
        common = ("--module=titan_config_03", "--config=llama3", *OF_03, *SMALL)
        tensor_parallel = "--parallelism.tensor_parallel_degree=2"
        run = titan.start("layout", 4, *common, tensor_parallel, "--training.steps=2", *overrides)
        with attached(daemon, stage_name) as reader:
            follow(run, reader, {1: 1, 2: 2})
        check_nothing_is_left(daemon, stage_name)


def test_the_shim_for_another_version_says_what_it_found() -> None:
    other = "override" if HERE_02 else "converter"
    with pytest.raises(UnknownModel, match=rf"torchtitan {re.escape(VERSION)} is installed: "):
        importlib.import_module(f"stagingd_client.torchtitan.{other}")
