"""The pages in a real browser, on a desk's screen and on a phone's: nothing is cut off, loaded or complained about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import AVAILABLE, Browser
from tests.report.test_entropy_page import report as heads
from tests.report.test_study_table import document

from aero.report.collect import collect
from aero.report.compare_page import write_compare_page
from aero.report.entropy_page import write_entropy_page
from aero.report.page import write_page
from aero.report.read import read_report

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="chromium and chromedriver are not installed")

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
DESK, PHONE = 1280, 390

BEYOND = """
return [...document.querySelectorAll('body *')]
  .filter(each => !each.closest('.scroll, svg') && each.getBoundingClientRect().right > innerWidth + 1)
  .map(each => each.tagName + ': ' + each.textContent.trim().slice(0, 60));
"""
"""What reaches beyond the screen's right edge, but for what scrolls in a box of its own."""

CUT = """
return [...document.querySelectorAll('svg text')].filter(each => {
  const text = each.getBoundingClientRect(), whole = each.ownerSVGElement.getBoundingClientRect();
  return text.width && (text.left < whole.left - 1 || text.right > whole.right + 1 ||
                        text.top < whole.top - 1 || text.bottom > whole.bottom + 1);
}).map(each => each.textContent);
"""
"""Words that a drawing's edge cuts."""

HELD = """
const box = [...document.querySelectorAll('.scroll')].find(each => each.scrollWidth > each.clientWidth + 20);
const name = box.querySelector('tbody th[scope=row]');
const before = name.getBoundingClientRect().left;
box.scrollLeft = 9999;
return [box.scrollLeft, name.getBoundingClientRect().left - before];
"""
"""How far a wide table scrolls in its box, and how far that moves the names of its rows."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, of results of this project and of a made study."""
    home = tmp_path_factory.mktemp("pages")
    files = ["removal-bounded-gpt2-small-aby3", "planner-demo", "demo-shipped-aby3", "emulation-demo-aero"]
    given = [
        RESULTS / f"{name}.json" for name in [*files, "estimate-gpt2-small-power-aby3", "static-bilinear-gpt2-tiny"]
    ]
    for row, seed in (("SM+LN+G", 0), ("SM+LN+G", 1), ("static+bilinear+bounded", 0)):
        given.append(home / f"{row}-{seed}.json")
        many = {"softmax heads": 144, "layernorm": 25, "gelu_tanh": 12}
        given[-1].write_text(json.dumps(document(row, seed, 2.5 + seed, layers=12, context=128, operators=many)))
    made = {name: home / f"{name}.html" for name in ("runs", "demo", "heads")}
    write_compare_page(collect(given), made["runs"], version="0.1.0", date="2026-01-01T00:00:00Z")
    write_page(read_report(RESULTS / "demo-shipped-aby3.json"), made["demo"])
    write_entropy_page(heads(), made["heads"])
    return made


@pytest.mark.parametrize("name", ["runs", "demo", "heads"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_nothing_is_cut_off_and_nothing_is_loaded(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.view(width)
    browser.open(pages[name].as_uri())
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("return document.querySelectorAll('svg').length") >= 2
    inner, wide = browser.run("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width
    assert wide <= width
    assert browser.run(BEYOND) == []
    assert browser.run(CUT) == []
    assert browser.complaints() == []
    assert browser.requests() == [pages[name].as_uri()]


def test_a_wide_table_scrolls_on_a_phone_and_its_rows_keep_their_names(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.view(PHONE)
    browser.open(pages["runs"].as_uri())
    far, moved = browser.run(HELD)
    assert far > 20
    assert abs(moved) < 1


def test_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    """Every text is readable on its ground: the contrast that WCAG asks of normal text."""
    for dark in (False, True):
        browser.view(PHONE, dark=dark)
        browser.open(pages["runs"].as_uri())
        colours: list[list[Any]] = browser.run(
            "const of = (each, what) => getComputedStyle(document.querySelector(each))[what];"
            "return [[of('body', 'color'), of('body', 'backgroundColor')],"
            " [of('figcaption', 'color'), of('figure', 'backgroundColor')],"
            " [of('svg text', 'fill'), of('figure', 'backgroundColor')],"
            " [of('.soft', 'color'), of('body', 'backgroundColor')]];"
        )
        for text, ground in colours:
            assert contrast(text, ground) >= 4.5, (dark, text, ground)


def contrast(one: str, other: str) -> float:
    """Of two colours as CSS computes them, by WCAG's formula."""

    def luminance(text: str) -> float:
        parts = [int(part) / 255 for part in text.removeprefix("rgb(").removesuffix(")").split(",")]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
