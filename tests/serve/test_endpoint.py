"""The whole way between real processes over TLS: OpenAI's client, curl and a browser ask; nobody else sees the text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

pytest.importorskip("spu")

from tests.browser import AVAILABLE, Browser
from tests.serve.asking import Asked, check_end
from tests.serve.conftest import MODEL, Deployment, make_tokenizer, wait_until

PROMPT = "Hello"
"""As long as most prompts here: a session compiles once for all of a length."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, str]]:
    """Two servers and the client's endpoint, with one session for the whole module."""
    home = tmp_path_factory.mktemp("parties")
    made = Deployment(home)
    make_tokenizer(home / "client" / "tokenizer")
    try:
        made.serve()
        yield made, f"http://127.0.0.1:{made.offer()}"
    finally:
        made.stop()


@pytest.fixture
def client(running: tuple[Deployment, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running[1]}/v1", api_key="unused", max_retries=0, timeout=120.0) as made:
        yield made


def plain_answer(prompt: str, count: int, folder: Path) -> str:
    """What the folded model says in double precision, in the clear."""
    from aero.eliminate.plain import logits
    from aero.eliminate.source import folded
    from aero.serve.text import Tokenizer

    tokenizer = Tokenizer(folder)
    model = folded(MODEL, seed=0)
    tokens = tokenizer.encode(prompt)
    start = len(tokens)
    for _ in range(count):
        tokens.append(int(logits(model, np.array(tokens))[-1].argmax()))
    return tokenizer.decode(tokens[start:])


def test_the_openai_client_gets_the_models_own_answer(running: tuple[Deployment, str], client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=3, temperature=0)
    assert whole.choices[0].text == plain_answer(PROMPT, 3, running[0].home / "client" / "tokenizer")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 3)
    pieces = list(
        client.completions.create(
            model=model, prompt=PROMPT, max_tokens=3, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].usage == whole.usage


def test_a_conversation_with_a_seed_and_a_stop_string(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id

    def say(stop: str | None = None) -> tuple[str, str]:
        pieces = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Hi"}],
            max_completion_tokens=2,
            temperature=1.5,
            top_p=0.9,
            seed=5,
            stop=stop,
            stream=True,
        )
        listed = list(pieces)
        assert listed[0].choices[0].delta.role == "assistant"
        return "".join(piece.choices[0].delta.content or "" for piece in listed), str(
            listed[-1].choices[0].finish_reason
        )

    text, ended = say()
    assert ended == "length"
    assert len(text) >= 2
    again = say(stop=text[1:])
    assert again == (text[:1], "stop")


def test_what_cannot_be_answered_is_an_error_in_openais_format(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="x" * 150)
    assert caught.value.code == "context_length_exceeded"
    assert "context is 128" in caught.value.message
    assert "xxx" not in caught.value.message
    with pytest.raises(openai.BadRequestError, match="n is not supported"):
        client.completions.create(model=model, prompt="x", n=2)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=model, prompt="x", max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="vocabulary of 2048"):
        client.completions.create(model=model, prompt=[5000])
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="gpt-4", prompt="x")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(running: tuple[Deployment, str]) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    url = running[1]
    model = json.loads(curl(f"{url}/v1/models"))["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "Curly", "max_tokens": 1, "temperature": 0, "stream": True})
    said = curl(f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body)
    events = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(each)["object"] == "text_completion" for each in events[:-1])
    assert "not JSON" in curl(f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", "{")
    # Another site's page in the user's browser: a foreign Host header, or a form's content type.
    assert curl(f"{url}/v1/models", "-H", "Host: site.example") == "Invalid host header"
    assert "Send JSON" in curl(f"{url}/v1/completions", "-H", "Content-Type: text/plain", "-d", body)
    assert "aero_tokens_total" in curl(f"{url}/metrics")


@pytest.mark.skipif(not AVAILABLE, reason="chromium and chromedriver are not installed")
def test_the_page_in_a_browser(running: tuple[Deployment, str], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(running[1])
        wait_until(
            lambda: "aby3" in browser.run("return document.getElementById('about').textContent"), "model's facts"
        )
        browser.type("#prompt", "Onion")
        browser.run("document.getElementById('count').value = 2")
        browser.click("#ask")
        wait_until(lambda: browser.run("return document.getElementById('tokens').textContent") == "1", "a first token")
        assert browser.run("return document.getElementById('ask').disabled")
        state = "return document.getElementById('state').textContent"
        wait_until(lambda: browser.run(state) == "Done.", "the end", 90.0)
        shown = {
            key: browser.run(f"return document.getElementById('{key}').textContent") for key in ("bytes", "rounds")
        }
        assert float(shown["bytes"]) > 0.1
        assert int(shown["rounds"].replace(",", "")) > 100
        assert browser.run("return document.getElementById('text').textContent").startswith("Onion")
        browser.screenshot(tmp_path / "page.png")


def test_a_second_client_is_told_that_the_server_is_full(running: tuple[Deployment, str]) -> None:
    done = running[0].ask("x", timeout=60.0)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("aero: The model's server refused: The server is full: 1 of 1")
    )


def test_no_prompt_and_no_answer_is_in_any_log(running: tuple[Deployment, str], client: openai.OpenAI) -> None:
    secret = "Zq9Gx"
    model = client.models.list().data[0].id
    client.completions.create(model=model, prompt=secret, max_tokens=1)
    for role in ("model", "helper", "client"):
        log = running[0].log(role)
        assert '"session ready"' in log
        assert secret not in log
        assert "Traceback" not in log


def test_a_party_killed_while_it_computes_is_named_and_the_next_request_is_answered(
    running: tuple[Deployment, str],
) -> None:
    made, url = running
    asked = Asked(url)
    wait_until(lambda: asked.pieces >= 1, "a first token", 90.0)
    os.kill(made.party("helper"), signal.SIGKILL)
    check_end(running, asked, "Party helper was killed (signal 9)", 10.0)
    for role in ("model", "helper"):
        assert "Party helper was killed (signal 9)" in made.log(role)
