# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""How a worker's refusal travels through vLLM to whoever called.

It is returned, not raised. When one worker of several raises, vLLM's executor leaves the other workers'
answers in their queues, where the next call takes them for its own; and of the error only a text arrives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from stagingd.boxes import Box
from stagingd.errors import StagingError, from_code

Answer = dict[str, Any]
Caller = TypeVar("Caller")
Arguments = ParamSpec("Arguments")


def answering(
    method: Callable[Concatenate[Caller, Arguments], Answer],
) -> Callable[Concatenate[Caller, Arguments], Answer]:
    """Makes a worker's method return what it refuses, under the key ``refused``."""

    @functools.wraps(method)
    def answer(self: Caller, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
        try:
            return method(self, *args, **kwargs)
        except StagingError as error:
            context = {name: str(v) if isinstance(v, Box) else v for name, v in error.context.items()}
            return {"refused": error.code, "what": error.what, "remedy": error.remedy, "context": context}

    return answer


def checked(answers: Sequence[Answer]) -> list[Answer]:
    """The workers' answers, when none of them is a refusal.

    Wrap it around ``collective_rpc``: ``checked(llm.collective_rpc("stagingd_update"))``.

    Raises:
        StagingError: the first refusal, as the type that the worker raised.
    """
    for answer in answers:
        if "refused" in answer:
            raise from_code(answer["refused"], answer["what"], answer["remedy"], answer["context"])
    return list(answers)
