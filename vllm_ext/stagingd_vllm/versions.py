# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Which vLLM versions are known, and what any other must have. Looks at classes; imports no vLLM."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Mapping

from stagingd.errors import StagingError

_IMPLEMENTED = {
    "init_transfer_engine",
    "start_weight_update",
    "receive_weights",
    "finish_weight_update",
    "shutdown",
    "trainer_send_weights",  # abstract in 0.26; the trainer's half is another class since
}
_INHERITED = {"parse_init_info", "parse_update_info", "set_weight_update_target", "reset_weight_update_target"}
_CONSTRUCTOR = ("self", "config", "vllm_config", "device", "model")


class EngineNotSupported(StagingError):
    """The engine is of a version or a shape that is not known."""

    code = "engine_not_supported"


class Standing(enum.Enum):
    """How well a version of vLLM is known."""

    RUN = "engines of it have taken versions from a stage"
    READ = "its weight-transfer API was compared, and not run"
    UNKNOWN = "nobody has looked at it"


_STANDING: Mapping[int, Standing] = {26: Standing.RUN, 32: Standing.RUN} | dict.fromkeys(
    (27, 28, 29, 30, 31, 33), Standing.READ
)


def standing(version: str) -> Standing:
    """How well a version is known, such as ``0.32.0+cpu``."""
    found = re.match(r"0\.(\d+)\.", version)
    return _STANDING.get(int(found[1]), Standing.UNKNOWN) if found else Standing.UNKNOWN


def check_base(base: type, version: str) -> None:
    """Checks that vLLM's base class of weight-transfer engines is one that ``StagingdEngine`` can fill in.

    By what it has, not by its version: that is only told.

    Raises:
        EngineNotSupported: it asks for a method that is not known, lacks one that is used, or is made otherwise.
    """
    found = []
    abstract: frozenset[str] = getattr(base, "__abstractmethods__", frozenset())
    found += [f"asks for {name}" for name in sorted(abstract - _IMPLEMENTED)]
    needed = (_IMPLEMENTED - {"trainer_send_weights"}) | _INHERITED
    found += [f"has no {name}" for name in sorted(needed) if not callable(getattr(base, name, None))]
    arguments = tuple(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    if arguments != _CONSTRUCTOR:
        found.append(f"is made from ({', '.join(arguments)})")
    if found:
        raise EngineNotSupported(
            f"the weight-transfer base class of vLLM {version} ({standing(version).value}) {', and '.join(found)}",
            remedy="use a vLLM from 0.26 to 0.33, or the worker extension instead of the backend",
        )
