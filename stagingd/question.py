# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Requests whose answers may have to wait, and the news that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stagingd import wire
from stagingd.waiting import Waiting

Tell = Callable[[str, int | None, str], None]
"""Called with every event: its name, the version concerned and details for people."""


@dataclass
class Question:
    """A request whose answer may have to wait.

    Attributes:
        poll: answers, or says what is awaited; asked again after every change of the stage.
        give_up: undoes what the request has started; called when its deadline passes.
    """

    poll: Callable[[], wire.Answer | Waiting]
    give_up: Callable[[str], None] = lambda _: None
