# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's model runners begin to compute a step: its inputs have been handed to the device by then.

vLLM 0.26 to 0.33 have two runners. One calls the model through its method ``_model_forward``, whatever the graphs. The
other replays graphs through its ``cudagraph_manager`` and calls the model where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

FORWARD = "_model_forward"
MANAGER = "cudagraph_manager"
REPLAYS = ("run_fullgraph", "run_pw_graph")

Call = Callable[[], None]


def watch(runner: object, model: torch.nn.Module, began: Call) -> Call | None:
    """Have something called whenever a step is about to be computed.

    Args:
        runner: vLLM's.
        model: the runner's.
        began: what is called, by the thread that runs the engine.

    Returns:
        What ends that; None if the runner is not one that is known, and nothing is called.
    """
    undo = ExitStack()
    if callable(getattr(runner, FORWARD, None)):
        _precede(runner, FORWARD, began, undo)
    elif hasattr(runner, MANAGER):
        _watch_replays(getattr(runner, MANAGER), model, began, undo)
    else:
        return None
    return undo.close


def _watch_replays(manager: object, model: torch.nn.Module, began: Call, undo: ExitStack) -> None:
    replays = [name for name in REPLAYS if callable(getattr(manager, name, None))]
    inside = _Inside()
    for name in replays:
        _precede(manager, name, began, undo, inside)
    undo.callback(model.register_forward_pre_hook(lambda *_: None if inside.now else began()).remove)


class _Inside:
    """Whether a replay is under way, which may call the model."""

    now = False


def _precede(owner: Any, method: str, began: Call, undo: ExitStack, inside: _Inside | None = None) -> None:
    """Have a method of one object call something first."""
    original, inside = getattr(owner, method), inside or _Inside()
    own = method in vars(owner)

    def preceded(*arguments: Any, **named: Any) -> Any:
        began()
        inside.now = True
        try:
            return original(*arguments, **named)
        finally:
            inside.now = False

    setattr(owner, method, preceded)
    if own:
        undo.callback(setattr, owner, method, original)
    else:
        undo.callback(delattr, owner, method)  # that of its class shows again
