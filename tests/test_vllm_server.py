# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's HTTP server takes versions: through its weight-transfer routes, and through the worker extension."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from daemons import DEADLINE_S, RunningDaemon, eventually
from stagingd_vllm.answers import checked
from stagingd_vllm.follower import Follower
from stagingd_vllm.server import Server as FollowedServer
from stagingd_vllm.versions import EngineNotSupported
from tiny_engines import BACKEND, OPTIONS, Trainer

from stagingd.errors import OutOfOrder

pytestmark = pytest.mark.vllm
pytest_plugins = ["tiny_engines"]

START_S = 120.0
PROMPT = list(range(20, 120))


@dataclass
class Server:
    """A server on this machine's own address."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> Any:
        """The answer to a request. Raises HTTPError for a refusal."""
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.loads(answer.read() or b"null")

    def rpc(self, name: str, **kwargs: Any) -> Any:
        return self.ask("/collective_rpc", {"method": name, "kwargs": kwargs})["results"]

    def generate(self, number: int = 24) -> list[int]:
        sampling = {"temperature": 0, "max_tokens": number, "ignore_eos": True, "detokenize": False}
        answer = self.ask("/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": sampling})
        return list(answer["choices"][0]["token_ids"])

    def reloaded(self, checkpoint: Path) -> list[int]:
        """What vLLM's own loader makes it generate."""
        self.rpc("reload_weights", weights_path=str(checkpoint))
        self.ask("/reset_prefix_cache")
        return self.generate()

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_S
        while True:
            try:
                return self.ask("/health", method="GET")
            except (ConnectionError, urllib.error.URLError):
                died = self.process.poll() is not None
                ended = died or time.monotonic() > until
                assert not ended, f"it does not serve:\n{self.log.read_text()[-6000:]}"
                time.sleep(0.1)  # a process of our own starts; there is nothing to be told by

    def stop(self) -> None:
        """Ends it and all that it has started."""
        if self.process.poll() is not None:
            return
        itself = psutil.Process(self.process.pid)
        family = [itself, *itself.children(recursive=True)]
        itself.terminate()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE_S)
        for process in alive:
            process.kill()
        self.process.wait(DEADLINE_S)
        assert not alive


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "version-1")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--weight-transfer-config", json.dumps(BACKEND)]
    command += ["--enable-scale-out"]  # for the route that takes and gives tokens
    for name, value in OPTIONS.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    log = folder / "server.log"
    with log.open("wb") as out:
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server = Server(port, process, log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def test_the_weight_transfer_routes_take_a_version_that_equals_a_reload(
    server: Server, daemon: RunningDaemon, trainer: Trainer
) -> None:
    expected = [server.reloaded(trainer.checkpoints[number]) for number in (1, 0)]
    info = {"stage": "policy", "socket": str(daemon.socket), "engine": "native"}
    server.ask("/init_weight_transfer_engine", {"init_info": info})
    trainer.publish(2, 2)
    server.ask("/pause?mode=wait")
    server.ask("/start_weight_update")
    server.ask("/update_weights", {"update_info": {"newer_than": 1}})
    server.ask("/finish_weight_update", {"weight_version": "2"})
    server.ask("/resume")
    assert server.generate() == expected[0]
    assert server.ask("/weight_info", method="GET") == {"weight_version": "2"}
    assert expected[0] != expected[1]


def test_a_refused_update_is_an_error_of_the_route_and_the_next_one_works(
    server: Server, daemon: RunningDaemon, trainer: Trainer
) -> None:
    info = {"stage": "policy", "socket": str(daemon.socket), "engine": "native"}
    server.ask("/init_weight_transfer_engine", {"init_info": info})
    server.ask("/start_weight_update")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        server.ask("/update_weights", {"update_info": {"newer_than": 1000, "timeout_s": 0.2}})
    assert refusal.value.code == 500
    assert "deadline_exceeded" in refusal.value.read().decode()
    server.ask("/start_weight_update")
    server.ask("/update_weights", {"update_info": {}})
    server.ask("/finish_weight_update")


def test_the_worker_extension_is_driven_by_collective_rpc_while_a_request_is_kept(
    server: Server, daemon: RunningDaemon, trainer: Trainer
) -> None:
    expected = server.reloaded(trainer.checkpoints[0])
    server.rpc("reload_weights", weights_path=str(trainer.checkpoints[1]))
    with pytest.raises(OutOfOrder, match="attached to no stage"):
        checked(server.rpc("stagingd_update"))
    (attached,) = checked(server.rpc("stagingd_attach", stage="policy", socket=str(daemon.socket), engine="extension"))
    assert attached["bytes_per_update"] == attached["bytes_of_stage"]
    trainer.publish(3, 1)
    with ThreadPoolExecutor(1) as pool:
        kept = pool.submit(server.generate, 400)
        server.ask("/pause?mode=keep")
        (answer,) = checked(server.rpc("stagingd_update", version=3))
        server.ask("/resume")
        assert len(kept.result(DEADLINE_S)) == 400
    assert answer["version"] == 3
    assert server.generate() == expected
    assert server.rpc("stagingd_version") == ["3"]  # the route turns numbers into text
    server.rpc("stagingd_detach")


def test_a_server_under_load_is_followed(server: Server, daemon: RunningDaemon, trainer: Trainer) -> None:
    expected = {number: server.reloaded(trainer.checkpoints[number]) for number in (1, 0)}

    async def follow() -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}", timeout=timeout) as session:
            followed = FollowedServer(session)
            async with Follower(followed, "policy", socket=daemon.socket, engine="served", prefetch_gib=1) as follower:
                load = [asyncio.create_task(asyncio.to_thread(server.generate, 200)) for _ in range(4)]
                for version in range(10, 20):
                    await asyncio.to_thread(trainer.publish, version, 1 + version % 2)
                    await follower.reached(version)
                assert {len(tokens) for tokens in await asyncio.gather(*load)} == {200}
                assert await asyncio.to_thread(server.generate) == expected[1]
                assert server.ask("/weight_info", method="GET") == {"weight_version": "19"}

    asyncio.run(follow())


def test_a_server_that_does_not_let_its_workers_be_asked_is_refused_and_says_how_it_would(server: Server) -> None:
    async def ask() -> None:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}/nothing/") as session:
            with pytest.raises(EngineNotSupported, match=r"no route .*collective_rpc.*VLLM_SERVER_DEV_MODE=1"):
                await FollowedServer(session)._post("collective_rpc")

    asyncio.run(ask())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_follows_until_it_is_told_to_end(
    server: Server, daemon: RunningDaemon, trainer: Trainer, number: signal.Signals
) -> None:
    address = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "stagingd_vllm.follow_command", address, "policy", "--socket", str(daemon.socket)]
    with subprocess.Popen([*command, "--prefetch-gib", "1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "following policy: prefetch\n"
        newest = daemon.stage("policy").slots
        assert process.stdout.readline().startswith("policy: version ")
        version = max(slot.version or 0 for slot in newest) + 1
        trainer.publish(version, 1)
        assert process.stdout.readline() == f"policy: version {version} is live\n"
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
    eventually(lambda: "engine" not in daemon.stage("policy").engines, "the engine to have left")
