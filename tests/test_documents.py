# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Everything that the README and the documentation tell people to type works, and what they list is what there is.

``snippets.py`` says what is run, and ``read_commands.py`` and ``signed.py`` what is only checked.
"""

from __future__ import annotations

import ast
import shlex
import socket
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from documents import GENERATED, ROOT, Block, blocks, inline_code, links, pages, tables
from engine_environment import engine_environment
from read_commands import NOT_RUN, known_command
from signed import NEWEST
from snippets import CannotRun, Snippets
from stagingd_client import Stage
from stagingd_client.torchtitan.settings import PublishingSettings
from tiny_engines import OPTIONS, save_checkpoints
from torch import nn
from transformers import AutoModelForCausalLM

from stagingd.config import Settings

DOCS = ROOT / "docs"
CHECKPOINT = "Qwen3-8B"
"""What the pages call the model's folder. Here it is a tiny one."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [saved] = save_checkpoints(tmp_path_factory.mktemp("model"), 1)
    return saved


class Megatron(nn.Module):
    """One layer of a Megatron-Core model, whole."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "embedding.word_embeddings.weight": (512, 64),
            "decoder.layers.0.self_attention.linear_qkv.weight": (256, 64),
            "decoder.layers.0.self_attention.linear_proj.weight": (64, 128),
            "decoder.layers.0.mlp.linear_fc1.weight": (192, 64),
            "decoder.layers.0.mlp.linear_fc2.weight": (64, 96),
        }
        self._named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()

    def parameters(self, *_: Any) -> Iterator[nn.Parameter]:
        yield from self._named.values()


def taken_for_granted(page: Path, checkpoint: Path) -> dict[str, Any]:
    """What snippets use without having made it."""
    model = Megatron() if page.stem == "megatron" else AutoModelForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train(trained: nn.Module) -> None:
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    ranks = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
    mpu = types.SimpleNamespace(**ranks)
    return {"model": model, "optimizer": optimizer, "train": train, "steps": 3, "mpu": mpu}


@pytest.fixture
def snippets(
    request: pytest.FixtureRequest, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Snippets]:
    """For one page; its engines' stage has versions already."""
    page: Path = request.param
    (tmp_path / CHECKPOINT).symlink_to(checkpoint)
    made = Snippets(tmp_path, f"/stagingd-test-{uuid.uuid4().hex[:12]}-", taken_for_granted(page, checkpoint))
    for name, value in made.environment().items():
        if name.startswith("STAGINGD_"):
            monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield made
    made.close()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_BLOCKS = [page for page in pages() if [*blocks(page)]]


@pytest.mark.parametrize("snippets", WITH_BLOCKS, indirect=True, ids=name_of)
def test_what_a_page_tells_people_to_type_works(snippets: Snippets, request: pytest.FixtureRequest) -> None:
    page = request.node.callspec.params["snippets"]
    if page.stem in ("README", "operations", "vllm-offline", "vllm-serving"):
        publish_newest(snippets)
    for block in blocks(page):
        try:
            snippets.run(block)
        except Exception as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}\n{block.text}") from error


def publish_newest(snippets: Snippets) -> None:
    """What the pages' engines are to find."""
    snippets.need_daemon()
    with Stage.open("policy") as stage:
        stage.publish(NEWEST, snippets.namespace["model"]).wait()


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    commands = [
        command
        for page in WITH_BLOCKS
        for block in blocks(page)
        if block.language == "sh"
        for command in block.commands
    ]
    assert {begins for begins in NOT_RUN if any((c + " ").startswith(begins + " ") for c in commands)} == set(NOT_RUN)
    assert all(len(reason) > 20 for reason in NOT_RUN.values())


@pytest.mark.parametrize("language", ["", "console", "ruby"])
def test_a_block_that_nobody_knows_how_to_run_is_refused(tmp_path: Path, language: str) -> None:
    with pytest.raises(CannotRun, match=language or "no language"):
        Snippets(tmp_path, "/stagingd-test-none-", {}).run(Block(DOCS / "x.md", 1, language, "anything\n"))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from vllm import LLM\nLLM('m', tensor_parallel=2)", "EngineArgs has no"),
        ("from vllm import LLM\nLLM('m').collective_rpcs('stagingd_update')", "has no attribute 'collective_rpcs'"),
        ("from vllm import LLM\nLLM('m').collective_rpc('stagingd_updates')", "has no attribute 'stagingd_updates'"),
        ("from vllm import LLM\nLLM('m').collective_rpc('stagingd_attach', kwargs={'stages': 'x'})", "argument"),
        ("from vllm import LLM\nLLM('m').reset_prefix_cache(all=True)", "unexpected keyword argument 'all'"),
        ("from vllm import LLM\nLLM('m').update_weights({'update_info': {'newest': 1}})", "'newest'"),
    ],
)
def test_a_snippet_that_uses_an_engine_wrongly_fails(tmp_path: Path, text: str, wrong: str) -> None:
    snippets = Snippets(tmp_path, "/stagingd-test-none-", {})
    snippets.need_daemon = lambda: None  # type: ignore[method-assign]
    with pytest.raises((TypeError, AttributeError, AssertionError), match=wrong):
        snippets.run(Block(DOCS / "x.md", 1, "python", text))


# What the text says besides


def test_commands_in_the_text_exist() -> None:
    found = 0
    for page in pages():
        for said in inline_code(page):
            words = shlex.split(said.replace("|", " "), posix=False)
            if words[:1] == ["stagingd"] and len(words) > 1 and not words[1].startswith("-"):
                found += 1
                known_command(words[1:])
    assert found > 10


def test_links_lead_to_files_that_are_there() -> None:
    for page in pages():
        for href in links(page):
            path = page.parent / href.partition("#")[0]
            generated = path.resolve().parent == GENERATED
            assert generated or urlsplit(href).scheme or path.exists(), f"{page}: {href}"


def rows(page: str, head: str) -> list[list[str]]:
    return next(table[1:] for table in tables((DOCS / page).read_text()) if table[0][0] == head)


def test_torchtitans_settings_are_listed_with_their_defaults() -> None:
    listed = {name.strip("`"): default.strip("`") for name, _, default in rows("guides/torchtitan.md", "setting")}
    fields = PublishingSettings.model_fields
    assert [*listed] == [*fields]
    assert {name: str(field.default) for name, field in fields.items() if field.default is not None} == {
        name: default for name, default in listed.items() if fields[name].default is not None
    }


def test_the_daemons_settings_are_listed_with_their_defaults() -> None:
    listed = {name.strip("`"): default for name, default in rows("reference/daemon.md", "setting")}
    assert [*listed] == [*Settings.model_fields]
    for name, field in Settings.model_fields.items():
        if field.default_factory is None:
            wanted = "none" if field.default is None else f"`{str(field.default).lower()}`"
            assert listed[name] == wanted


def codes() -> dict[str, str]:
    """Every error's code and class."""
    found = {}
    for folder in ("stagingd", "client", "vllm_ext"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found |= dict.fromkeys(_codes_in(node), node.name)
    return found


def _codes_in(node: ast.ClassDef) -> Iterator[str]:
    """What it assigns to ``code``; a field of that name has no value."""
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if [target.id for target in targets if isinstance(target, ast.Name)] == ["code"]:
            value = getattr(line, "value", None)
            yield from [str(value.value)] if isinstance(value, ast.Constant) else []


def test_every_error_has_an_entry_that_names_it() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    entries = text.split("\n### ")[1:]
    listed = {}
    for entry in entries:
        code, _, rest = entry.partition("\n\n")
        name, _, said = rest.partition(". ")
        listed[code.strip("`")] = name.strip("`")
        assert len(said.split()) > 8, f"{code} does not say what to do"
    assert listed == codes()
    assert len(listed) == len(entries)


@pytest.mark.vllm
@pytest.mark.parametrize("snippets", [DOCS / "guides/vllm-offline.md"], indirect=True)
def test_the_first_snippets_for_an_engine_run_on_a_real_one(snippets: Snippets, tmp_path: Path) -> None:
    """Of one rank, where the page has two: the tests of engines have more."""
    publish_newest(snippets)
    vllm = pytest.importorskip("vllm")
    real = vllm.LLM
    here = OPTIONS | {"tensor_parallel_size": 1, "distributed_executor_backend": "mp"}
    with engine_environment(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr(
            vllm, "LLM", lambda model, **options: real(model, **(here | options | {"tensor_parallel_size": 1}))
        )
        first, second, *_ = (block for block in blocks(DOCS / "guides/vllm-offline.md") if block.language == "python")
        for block in (first, second):
            exec(compile(block.text, str(block), "exec"), snippets.namespace)
        llm = snippets.namespace["llm"]
        assert llm.collective_rpc("stagingd_version") == [NEWEST]
        assert snippets.namespace["answers"][0]["version"] == NEWEST
        llm.llm_engine.engine_core.shutdown()
