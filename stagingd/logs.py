# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Structured logs: one JSON object a line for machines, or text for people, always on stderr."""

from __future__ import annotations

import logging
import sys

import structlog

from stagingd.config import Settings


def configure(settings: Settings) -> None:
    """Set up logging for this process."""
    render: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if settings.log_format == "console":
        render = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
