# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""Makes page.png: what the status page shows of a real run, on the machine that this is started on.

    PYTHONPATH=client:vllm_ext:.:tests python docs/pictures/page.py

See ``scene.py`` for what is done there. It needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from browser import chromium
from PIL import Image
from scene import daemon, play
from selenium.webdriver.support.wait import WebDriverWait

HERE = Path(__file__).parent


def small(picture: bytes) -> bytes:
    """The same with 128 colours: a page has no more that matter."""
    made = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        made, "PNG", optimize=True
    )
    return made.getvalue()


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
        given.file.write_bytes(small(browser.get_screenshot_as_png()))


if __name__ == "__main__":
    main()
