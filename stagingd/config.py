# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's settings: one typed object, from the environment (``STAGINGD_…``) and the command line."""

from __future__ import annotations

import grp
import os
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_runtime_dir() -> Path:
    """Where sockets live: ``/run/stagingd`` where it exists, else a folder that is this user's alone."""
    system = Path("/run/stagingd")
    if system.is_dir():
        return system
    if "XDG_RUNTIME_DIR" in os.environ:
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "stagingd"
    return Path(tempfile.gettempdir()) / f"stagingd-{os.getuid()}"


class Settings(BaseSettings):
    """Everything that can be set. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="STAGINGD_", frozen=True, extra="forbid")

    runtime_dir: Path = Field(default_factory=default_runtime_dir)
    """Folder of the control and event sockets."""

    segment_prefix: str = Field(default_factory=lambda: f"/stagingd-{os.getuid()}-", pattern=r"^/[A-Za-z0-9_.-]+$")
    """Start of the shared memory segments' names."""

    lock_memory: bool = True
    """Lock the segments into physical memory. Without it the kernel may swap weights out."""

    group: str | None = None
    """Unix group whose members may connect and map; by default only the daemon's own user may."""

    @field_validator("group")
    @classmethod
    def _group_exists(cls, name: str | None) -> str | None:
        if name is not None and name not in {entry.gr_name for entry in grp.getgrall()}:
            raise ValueError(f"there is no Unix group {name!r}; make it, or leave the setting out")
        return name

    lease_s: float = Field(default=60.0, gt=0)
    """How long an engine may hold a version before the lease is taken from it."""

    return_s: float = Field(default=1.5, gt=0)
    """Should the daemon die: how long clients wait for a successor before they give up, and how long a
    successor waits for clients that it cannot see. Raise it where a supervisor restarts the daemon."""

    heartbeat_s: float | None = Field(default=None, gt=0)
    """Serve clients in pid namespaces that the daemon does not see, and take one for dead that has been
    silent for so long. By default they are refused. Share the host's pid namespace where you can: a process
    that was only stopped for longer may still write the rest of one piece of a copy when it goes on."""

    http_port: int | None = Field(default=None, ge=0, le=65535)
    """Serve metrics, health and the status page over HTTP at this port; 0 takes one that is free, which the log
    names. By default there is no such thing."""

    http_host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    """Address at which they are served. Whoever reaches it may read them: there is no password, and no encryption."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""

    log_format: Literal["json", "console"] = "json"
    """One JSON object a line, or coloured text for people."""

    @property
    def control_socket(self) -> Path:
        """The ROUTER socket's file."""
        return self.runtime_dir / "control.sock"

    @property
    def event_socket(self) -> Path:
        """The PUB socket's file."""
        return self.runtime_dir / "events.sock"

    @property
    def shared_mode(self) -> int:
        """Permission bits of sockets and segments: this user's alone, or also the group's."""
        return 0o660 if self.group else 0o600

    @property
    def group_id(self) -> int:
        """The group's number, or -1 for the process's own."""
        return grp.getgrnam(self.group).gr_gid if self.group else -1
