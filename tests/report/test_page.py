"""The page needs nothing but itself, shows text as text and copes with what is left out."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aero.report.page import render_page, write_page
from aero.report.plots import bytes_by_operator, entropy, losses

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Collects elements and attributes, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_nothing_comes_from_outside(report: Any) -> None:
    text = render_page(report)
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not page.named("script")
    assert not page.named("link")
    policies = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_references_inside_drawings_resolve_and_identifiers_are_unique(report: Any) -> None:
    text = render_page(report)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)


def test_first_screen_says_what_happened(report: Any) -> None:
    text = Page(render_page(report)).text
    assert "A language model answered a prompt that its operator could not see" in text
    for part in ("2.1x fewer bytes", "123 MB instead of 260 MB", "-4.1 %", "no two parties collude", "loopback"):
        assert part in text
    assert "def flatten(x):\n    return [x for x in xs]" in text


def test_an_insecure_protocol_is_called_one(report: Any) -> None:
    report["trust_model"]["secure"] = False
    text = Page(render_page(report)).text
    assert "This protocol does not keep secrets" in text
    assert "could not see" not in text
    assert "stayed with the client" not in text


@pytest.mark.parametrize(
    "attack", ["<script>alert(1)</script>", "--><img src=x onerror=alert(1)>", '"><svg onload=x>', "]]>$x$"]
)
def test_text_is_shown_as_text(report: Any, attack: str) -> None:
    report["prompt"]["text"] = attack
    report["command"] = report["trust_model"]["statement"] = report["commit"] = attack
    report["corpus"] = {attack: attack}
    for model in report["models"]:
        model["completion"]["text"] = model["label"] = model["name"] = attack
        model["architecture"] = {attack: attack}
        model["private"]["prefill"]["operators"][0]["operator"] = attack
    page = Page(render_page(report))
    assert attack in page.text
    assert not page.named("script")
    assert not page.named("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_every_drawing_is_described(report: Any) -> None:
    drawings = Page(render_page(report)).named("svg")
    assert len(drawings) == 4
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 40


def test_a_secret_prompt_leaves_no_text(report: Any) -> None:
    del report["prompt"]
    for model in report["models"]:
        del model["completion"]["text"]
    text = Page(render_page(report)).text
    assert "was not written down" in text
    assert "flatten" not in text
    assert "public sample" not in text


def test_one_model_alone(report: Any) -> None:
    del report["ratios"]
    del report["models"][1]
    text = Page(render_page(report)).text
    assert "fewer bytes" not in text
    assert "259" in text or "260 MB" in text


def test_a_large_model_and_no_losses(report: Any) -> None:
    for model in report["models"]:
        model["entropy"]["mean"] = [[layer * head / 40 for head in range(12)] for layer in range(12)]
        model["training"]["losses"] = []
    assert losses(report) is None
    assert "nats" in entropy(report).alt
    assert len(Page(render_page(report)).named("svg")) == 3


def test_more_operators_than_colours(report: Any) -> None:
    account = report["models"][0]["private"]["prefill"]
    account["operators"] = [
        {"operator": f"operator {index}", "layer": 0, "bytes": 1000 * index, "rounds": 1, "seconds": 0.1}
        for index in range(30)
    ]
    account["total_bytes"] = sum(row["bytes"] for row in account["operators"])
    plot = bytes_by_operator(report)
    assert "everything else" in plot.svg
    assert "operator 29" in plot.svg
    assert "operator 3<" not in plot.svg
    assert "435 kB" in plot.alt


def test_the_same_report_gives_the_same_page(report: Any, tmp_path: Path) -> None:
    write_page(report, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_page(report)


def test_what_was_prepared_beforehand_is_said_of_each_phase_in_a_sentence_of_its_own(report: Any) -> None:
    for model in report["models"]:
        model["private"]["setup"]["offline"]["statement"] = "sharing the weights, once"
        for phase in ("prefill", "per_token"):
            model["private"][phase]["offline"]["statement"] = "nothing: this phase follows"
    text = Page(render_page(report)).text
    assert "Prepared beforehand (set-up, once): sharing the weights, once" in text
    assert "Prepared beforehand (reading the prompt; each further token): nothing: this phase follows" in text
