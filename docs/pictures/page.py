# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Makes the picture of the status page, from a daemon at work: ``python docs/pictures/page.py [FILE]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from browser import chromium
from scene import daemon, play
from selenium.webdriver.support.wait import WebDriverWait

HERE = Path(__file__).parent


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=HERE / "page.png")
    parser.add_argument("--versions", type=int, default=24, help="how many versions are trained")
    parser.add_argument("--dark", action="store_true", help="as those see it who prefer dark")
    parser.add_argument("--height", type=int, default=1500, help="of the picture, in pixels")
    given = parser.parse_args()
    with daemon() as scene, play(scene, given.versions), chromium(1280, given.height, dark=given.dark) as browser:
        browser.get(f"http://127.0.0.1:{scene.port}/")
        WebDriverWait(browser, 20).until(lambda b: b.find_elements("css selector", "#layers tbody tr"))
        browser.save_screenshot(str(given.file))
        print(*browser.get_log("browser"), sep="\n")


if __name__ == "__main__":
    main()
