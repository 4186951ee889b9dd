# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The status page: one HTML document with its style and its script in it, read once when the daemon starts.

Its Content-Security-Policy admits exactly this style and this script, by their hashes, and requests to the daemon
itself: names of tensors and engines come from clients, and none of them can become code or lead anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final


def _text(name: str) -> str:
    return files("stagingd.web").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE: Final = _text("page.css")
_SCRIPT: Final = _text("page.js")

HTML: Final = _text("page.html").replace("/*style*/", _STYLE).replace("/*script*/", _SCRIPT).encode()
"""The page."""

HEADERS: Final = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(_SCRIPT)}",
            f"style-src {_hash(_STYLE)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
}
"""What browsers are told with it."""
