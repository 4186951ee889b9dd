# Copyright 2026 The stagingd authors
# SPDX-License-Identifier: Apache-2.0
"""The status page in a browser: what an operator sees, by mouse, keyboard and screen reader, in light and in dark."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from snapshots import ShownStage, shown

DEADLINE_S = 30.0
HOSTILE = '<img src=x onerror="document.title=1">&amp;'
LAYERS = tuple(f"model.layers.{n}.{part}.weight" for n in range(43) for part in "abcdefg")[:300]


@pytest.fixture(scope="module")
def window() -> Iterator[Chrome]:
    """A browser without a window. Where there is none the tests fail: what nobody looked at does not work."""
    with chromium(1280, 1500) as browser:
        browser.set_page_load_timeout(DEADLINE_S)
        yield browser


def opened(window: Chrome, port: int) -> None:
    window.get_log("browser")
    window.get(f"http://127.0.0.1:{port}/")
    until(window, lambda: text(window, "#connection") == "Connected" and cells(window, "#layers tbody tr"), "the page")


def until(window: Chrome, condition: Any, what: str) -> Any:
    return WebDriverWait(window, DEADLINE_S, poll_frequency=0.02).until(lambda _: condition(), what)


def text(window: Chrome, selector: str) -> str:
    return str(window.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def attribute(window: Chrome, selector: str, name: str) -> str:
    """At one time: what is found may be replaced before it is asked."""
    script = "return document.querySelector(arguments[0])?.getAttribute(arguments[1]) ?? ''"
    return str(window.execute_script(script, selector, name))


def cells(window: Chrome, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return list(window.execute_script(script, selector))


def focused(window: Chrome) -> str:
    return str(window.execute_script("return document.activeElement.textContent || document.activeElement.id"))


def press(window: Chrome, *keys: str) -> None:
    ActionChains(window).send_keys(*keys).perform()


def complaints(window: Chrome) -> list[str]:
    """What the browser has to say, such as that its policy was broken."""
    return [entry["message"] for entry in window.get_log("browser")]


def busy(versions: int, layers: tuple[str, ...] = ("a", "b", "c")) -> ShownStage:
    stage = ShownStage("policy", layers)
    for _ in range(versions):
        stage.add()
    return stage


def test_a_large_model_over_many_versions_is_shown_whole(window: Chrome) -> None:
    stage = busy(50, LAYERS)
    stage.add(wild=True)
    with shown(stage) as server:
        opened(window, server.port)
        rows = cells(window, "#layers tbody th")
        assert sorted(rows) == sorted(LAYERS)
        assert rows[0] == LAYERS[-1]  # what is notable comes first
        first = cells(window, "#layers tbody tr:first-child td")
        assert first == ["▲ 64", "0.00222", "0.02", "0 %", "0.4 %", "2.65 %", "▲ 3"]
        assert text(window, "#shown") == "300 of 300 layers; 1 notable"
        assert len(cells(window, "#layers tbody td path")) == 300 * 6
        assert "Versions 1 to 51" in text(window, "#health-note")
        assert complaints(window) == []


def test_the_timeline_has_a_bar_for_everything_that_somebody_did(window: Chrome) -> None:
    stage = busy(9)
    stage.add(aborted="trainer rank 1: it died")
    with shown(stage) as server:
        opened(window, server.port)
        bars = cells(window, "#timeline rect title")
        assert len(bars) == 7 * (2 + 1 + 2 + 2) + 2  # eight versions are shown, of which one was given up
        assert "9: swap by rollout 1, 4 ms, 512 MiB" in bars
        assert "10: fill by trainer 0, 500 ms" in bars
        labels = cells(window, "#timeline text")
        assert {"trainer 0", "trainer 1", "daemon", "rollout 0", "rollout 1", "9", "10 aborted"} <= set(labels)
        assert cells(window, "#versions tbody tr:first-child > *")[0] == "10"
        assert cells(window, "#versions tbody tr:first-child > *")[-1] == "aborted: trainer rank 1: it died"
        second = cells(window, "#versions tbody tr:nth-child(2) > *")
        assert second[2:] == ["500 ms", "\N{EN DASH}", "1 ms", "600 ms", "4 ms", "sealed"]


def crowded() -> ShownStage:
    """Many trainers, an engine of many ranks, and many engines of one."""
    stage = ShownStage("policy", ("a",), trainers=64, readers=16)
    stage.add()
    for number in range(40):
        stage.history.leased(1, f"small-{number:02}", 0, stage.began_s + 3)
    return stage


def test_of_many_ranks_every_one_has_a_bar_and_no_name_is_written_over_another(window: Chrome) -> None:
    with shown(crowded()) as server:
        opened(window, server.port)
        bars = cells(window, "#timeline rect title")
        assert {f"1: fill by trainer {rank}, 500 ms, 1 GiB" for rank in range(64)} <= set(bars)
        named = cells(window, "#timeline text.lane")
        assert {"trainer 0", "trainer 56", "daemon", "rollout 0", "small-00 0"} <= set(named)
        script = """return [...document.querySelectorAll('#timeline text.lane')].map((one) => {
            const { y, height } = one.getBBox();
            return [y, y + height];
        })"""
        found = window.execute_script(script)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found)), found


def test_on_a_narrow_screen_the_timeline_is_scrolled_and_not_shrunk(window: Chrome) -> None:
    size = window.get_window_size()
    with shown(busy(9)) as server:
        try:
            window.set_window_size(500, 1000)
            opened(window, server.port)
            script = """const text = document.querySelector('#timeline text.lane').getBoundingClientRect();
                const { scrollWidth, clientWidth } = document.documentElement;
                return [text.height, scrollWidth - clientWidth];"""
            height, beyond = window.execute_script(script)
        finally:
            window.set_window_size(size["width"], size["height"])
    assert height >= 9  # pixels
    assert beyond == 0  # of the page, not of what is scrolled by itself


def test_what_happens_is_shown_without_a_reload(window: Chrome) -> None:
    stage = busy(3)
    with shown(stage) as server:
        opened(window, server.port)
        stage.add(wild=True)
        until(window, lambda: text(window, "#tiles dd").startswith("4"), "version 4")
        until(window, lambda: text(window, "#shown") == "3 of 3 layers; 1 notable", "its health")
        assert "engine rollout rank 0 (pid 7) waits for a version newer than 4" in text(window, "#waits")


def test_names_are_text_whatever_they_are(window: Chrome) -> None:
    stage = ShownStage("policy", (HOSTILE, "b"), engine=HOSTILE)
    stage.add(aborted=HOSTILE)
    stage.add()
    with shown(stage) as server:
        opened(window, server.port)
        assert HOSTILE in cells(window, "#layers tbody th")
        assert f"Engine {HOSTILE}" in cells(window, "#tiles dt")
        assert HOSTILE in text(window, "#versions tbody")
        assert window.title == "stagingd"
        assert not cells(window, "img")
        assert complaints(window) == []


def test_what_nobody_has_told_is_said_not_to_be_reported(window: Chrome) -> None:
    stage = ShownStage("policy", ("a",))
    stage.add(told=False)
    with shown(stage) as server:
        opened(window, server.port)
        assert cells(window, "#layers tbody td")[3:6] == ["not reported"] * 3
        assert "has not been reported" in text(window, "#health-note")


def test_layers_are_sorted_and_looked_into_by_keyboard(window: Chrome) -> None:
    stage = busy(5, ("a", "b", "c"))
    stage.add(wild=True)
    with shown(stage) as server:
        opened(window, server.port)
        window.find_element(By.ID, "filter").send_keys("")
        for _ in range(40):
            press(window, Keys.TAB)
            if focused(window) == "Amax":
                break
        press(window, Keys.ENTER)
        assert attribute(window, "#layers thead th[aria-sort]", "aria-sort") == "descending"
        assert focused(window) == "Amax"
        press(window, Keys.ENTER)
        assert attribute(window, "#layers thead th[aria-sort]", "aria-sort") == "ascending"
        assert cells(window, "#layers tbody th") == ["a", "b", "c"]
        for _ in range(20):
            press(window, Keys.TAB)
            if focused(window) == "a":
                break
        stage.add()
        until(window, lambda: "Versions 1 to 7" in text(window, "#health-note"), "version 7")
        assert focused(window) == "a"
        press(window, Keys.ENTER)
        assert text(window, "#detail-title") == "a"
        assert focused(window) == "Close"
        assert cells(window, "#charts figcaption")[0] == "Amax: 1"
        stage.add()
        until(
            window,
            lambda: "versions 1 to 8" in attribute(window, "#charts svg", "aria-label"),
            "the chart to go on",
        )
        assert focused(window) == "Close"
        press(window, Keys.ENTER)
        assert not window.find_element(By.ID, "detail").is_displayed()
        assert focused(window) == "filter"


def test_layers_are_found_by_part_of_their_name(window: Chrome) -> None:
    with shown(busy(2, LAYERS)) as server:
        opened(window, server.port)
        window.find_element(By.ID, "filter").send_keys("layers.7.")
        until(window, lambda: text(window, "#shown") == "7 of 300 layers; 0 notable", "the filter")
        window.find_element(By.ID, "only-notable").click()
        until(window, lambda: text(window, "#shown") == "0 of 300 layers; 0 notable", "the filter")


def test_a_stage_is_chosen_among_several(window: Chrome) -> None:
    reference = ShownStage("reference", ("r",))
    reference.add()
    with shown(busy(3), reference) as server:
        opened(window, server.port)
        window.find_element(By.CSS_SELECTOR, "#stage option:nth-child(2)").click()
        until(window, lambda: cells(window, "#layers tbody th") == ["r"], "the other stage")
        assert text(window, "#tiles dd").startswith("1")


def test_a_daemon_that_is_gone_is_told_of_and_one_that_comes_back_is_shown(window: Chrome) -> None:
    with shown(busy(3)) as server:
        opened(window, server.port)
    until(window, lambda: text(window, "#connection").startswith("No answer from the daemon"), "the end")
    assert cells(window, "#layers tbody th") == ["a", "b", "c"]  # what was known stays to be read
    successor = busy(0)
    successor.add(wild=True)  # told of by a revision that the page has seen already, of another daemon
    for _ in range(8):
        successor.add()
    with shown(successor, pid=4712, port=server.port):
        until(window, lambda: "Versions 1 to 9" in text(window, "#health-note"), "what its successor tells")
        assert window.execute_script("return page.health.versions.get(1).amax") == [1, 1, 64]
        assert text(window, "#connection") == "Connected"


def test_without_a_stage_the_page_says_so(window: Chrome) -> None:
    with shown() as server:
        window.get(f"http://127.0.0.1:{server.port}/")
        until(window, lambda: window.find_element(By.ID, "nothing").is_displayed(), "the words")
        assert not window.find_element(By.ID, "content").is_displayed()


OUTLINE = """
const all = (selector) => [...document.querySelectorAll(selector)];
const named = (one) => one.labels?.length || one.textContent.trim() || one.getAttribute("aria-label");
return {
  headings: all("h1, h2, h3").filter((one) => one.offsetParent).map((one) => Number(one.tagName[1])),
  unnamed: all("button, input, select, [tabindex]").filter((one) => !named(one)).map((one) => one.outerHTML),
  unscoped: all("th:not([scope])").length,
  captions: all("table").every((one) => one.caption?.textContent),
  pictures: all("svg:not([aria-hidden])").every((one) => one.getAttribute("role") === "img"
    && (one.getAttribute("aria-label") || document.getElementById(one.getAttribute("aria-labelledby")))),
  language: document.documentElement.lang,
  landmarks: ["header", "main"].every((one) => all(one).length === 1),
};
"""


def test_a_screen_reader_finds_its_way(window: Chrome) -> None:
    with shown(busy(3)) as server:
        opened(window, server.port)
        window.find_element(By.CSS_SELECTOR, "#layers tbody th button").click()
        found = window.execute_script(OUTLINE)
    assert found["headings"][0] == 1
    assert all(later - earlier <= 1 for earlier, later in zip(found["headings"], found["headings"][1:], strict=False))
    assert (found["unnamed"], found["unscoped"]) == ([], 0)
    assert found["captions"]
    assert found["pictures"]
    assert found["landmarks"]
    assert found["language"] == "en"


COLOURS = """
const backdrop = (one) => {
  for (; one; one = one.parentElement) {
    const colour = getComputedStyle(one).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
const own = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
return [...document.querySelectorAll("body *")]
  .filter((one) => one.offsetParent && own(one))
  .map((one) => [one.textContent.trim().slice(0, 40), getComputedStyle(one).color, backdrop(one)]);
"""


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_light_and_in_dark(window: Chrome, scheme: str) -> None:
    stage = busy(5)
    stage.add(aborted="it died")
    stage.add(wild=True)
    window.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    with shown(stage) as server:
        opened(window, server.port)
        backdrops = set()
        for what, colour, backdrop in window.execute_script(COLOURS):
            backdrops.add(round(luminance(backdrop)))
            lighter, darker = sorted((luminance(colour), luminance(backdrop)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (what, colour, backdrop)
    assert backdrops == {1 if scheme == "light" else 0}
