# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Chromium without a window, driven by its own driver: Debian's packages chromium and chromium-driver."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class NoBrowser(RuntimeError):
    """Chromium or its driver is not installed."""


def _program(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise NoBrowser(f"{names[0]} is not installed: apt-get install --no-install-recommends chromium chromium-driver")


@contextmanager
def chromium(width: int, height: int, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, which is gone in the end. Raises NoBrowser."""
    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
    service = webdriver.ChromeService(executable_path=_program("chromedriver"))
    with tempfile.TemporaryDirectory() as profile:
        for option in (*OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=service)
        try:
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            yield driver
        finally:
            driver.quit()
