"""One session, many requests: every answer is plaintext's, and no request leaves anything to the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("spu")

from aero.eliminate import plain
from aero.eliminate.private_model import PrivateModel
from aero.eliminate.source import folded
from aero.errors import AeroError
from aero.private.document import document
from aero.private.launch import PrivateSession, local_parties
from aero.private.messages import Choice, PartyJob, Request
from aero.private.protocols import ABY3, PROTOCOLS

MODEL = "gpt2-tiny:static+bilinear"
PROMPT = (3, 1401, 59, 265, 35, 897, 932, 384)


def opened(prefix: tuple[int, ...] = (), **settings: str) -> PrivateSession:
    parties = local_parties(ABY3, None)
    job = PartyJob(protocol="aby3", parties=parties, rank=0, wait_seconds=120.0, prefix=prefix, **settings)
    return PrivateSession(job, model=MODEL)


def greedy(model: PrivateModel, text: Sequence[int], count: int) -> list[int]:
    tokens = list(text)
    for _ in range(count):
        tokens.append(int(plain.logits(model, np.array(tokens))[-1].argmax()))
    return tokens[len(text) :]


@pytest.fixture(scope="module")
def model() -> PrivateModel:
    return folded(MODEL, seed=0)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSession]:
    # Parties of other runs on this machine have their folders elsewhere.
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(folder))
        made = opened()
    with made as session:
        assert len(list(folder.glob("aero-party-*"))) == 3
        yield session
    assert not list(folder.glob("aero-party-*"))


def test_answers_are_plaintexts_and_the_same_request_costs_the_same(
    session: PrivateSession, model: PrivateModel
) -> None:
    request = Request(prompt=PROMPT, new_tokens=3, keep_logits=True)
    first = session.ask(request)
    other = session.ask(Request(prompt=PROMPT[::-1][:5], new_tokens=2))
    again = session.ask(request)
    for result in (first, again):
        text = np.array([*PROMPT, *result.answer[:-1]])
        assert result.logits is not None
        assert np.abs(result.logits - plain.logits(model, text)[len(PROMPT) - 1 :]).max() < 5e-3
    assert first.answer == again.answer == greedy(model, PROMPT, 3)
    assert other.answer == greedy(model, PROMPT[::-1][:5], 2)
    assert first.prefill.total_bytes == again.prefill.total_bytes
    assert [each.total_bytes for each in first.tokens] == [each.total_bytes for each in again.tokens]
    assert len(again.seconds) == 3
    # The account goes on from request to request, and so do the operating system's counters.
    assert again.system_bytes is not None
    for system, counted, messages in zip(again.system_bytes, again.counted_bytes, again.counted_messages, strict=True):
        assert 0 <= system - counted <= 400 * messages + 64 * 1024


def test_a_request_that_cannot_be_answered_is_refused_and_the_session_goes_on(session: PrivateSession) -> None:
    refusals = {
        "do not fit the model's context of 128": Request(prompt=PROMPT, new_tokens=122),
        "prompt is empty": Request(prompt=()),
        "outside the model's vocabulary": Request(prompt=(3, 99999)),
        "set the temperature to 0": Request(prompt=PROMPT, draft=2, choice=Choice(temperature=1.0)),
        "nothing below zero": Request(prompt=PROMPT, new_tokens=-1),
    }
    for words, request in refusals.items():
        with pytest.raises(AeroError, match=words):
            session.ask(request)
    assert len(session.ask(Request(prompt=PROMPT[:2], new_tokens=1)).answer) == 1


def test_drafted_tokens_change_the_passes_and_not_the_answer(session: PrivateSession, model: PrivateModel) -> None:
    expected = greedy(model, PROMPT, 6)
    asked: list[int] = []

    def draft(tokens: Sequence[int], count: int) -> list[int]:
        done = len(tokens) - len(PROMPT)
        asked.append(count)
        guess = list(expected[done : done + count])
        # Right about the first proposals, wrong about the second, and always one too many.
        if len(asked) == 2:
            guess[-1] = (guess[-1] + 1) % model.config.vocab_size
        return [*guess, 0]

    result = session.ask(Request(prompt=PROMPT, new_tokens=6, draft=2, keep_logits=True), draft)
    assert result.answer == expected
    # The prompt's pass yields one token, then 3 (both proposals and one more), then 1 (the proposal is wrong), then 1.
    assert asked == [2, 1]
    assert (len(result.tokens), result.drafted) == (3, 3)
    assert result.logits is not None
    exact = plain.logits(model, np.array([*PROMPT, *expected[:-1]]))[len(PROMPT) - 1 :]
    assert np.abs(result.logits - exact).max() < 5e-3
    written = document(result, model=MODEL, embedding="private", gelu=None, seed=0, max_abs_error=None)
    assert written["speculation"]["accepted"] == 2
    assert "accepted" in written["revealed"]["speculation"]


def test_a_reader_who_leaves_early_ends_the_answer(session: PrivateSession, model: PrivateModel) -> None:
    expected = greedy(model, PROMPT, 1)
    stream = session.generate(PROMPT, new_tokens=100)
    assert next(stream) == expected[0]
    with pytest.raises(AeroError, match="answering another request"):
        next(session.generate(PROMPT, new_tokens=1))
    stream.close()
    assert 1 <= len(session.result.answer) < 20
    sampled = Request(prompt=PROMPT, new_tokens=4, choice=Choice(temperature=2.0, seed=1))
    answer = session.ask(sampled).answer
    first = answer.index(answer[2])
    assert session.ask(replace(sampled, stop=(answer[2],))).answer == answer[: first + 1]


def test_a_public_prefix_costs_a_request_nothing(model: PrivateModel) -> None:
    prefix, prompt = PROMPT[:5], PROMPT[5:]
    with opened(prefix, embedding="client") as session:
        for _ in range(2):
            result = session.ask(Request(prompt=prompt, new_tokens=2, keep_logits=True))
            exact = plain.logits(model, np.array([*PROMPT, *result.answer[:-1]]))[len(PROMPT) - 1 :]
            assert result.answer == greedy(model, PROMPT, 2)
            assert result.logits is not None
            assert np.abs(result.logits - exact).max() < 5e-3
        with pytest.raises(AeroError, match="5 prefix tokens"):
            session.ask(Request(prompt=prompt, new_tokens=125))
    # The first layer's feed-forward runs over the prompt's rows alone (the last one's over a single row).
    prompts, tokens = (
        {cost.layer: cost.bytes for cost in each.operators if cost.operator == "feed-forward"}
        for each in (result.prefill, result.tokens[0])
    )
    assert prompts[0] == len(prompt) * tokens[0]
    written = document(result, model=MODEL, embedding="client", gelu=None, seed=0, max_abs_error=None)
    assert "prefix" in written["revealed"]


KERNEL = "llama-tiny:static+bilinear+kernel"


def right_at_first(expected: Sequence[int], behind: int) -> Callable[[Sequence[int], int], list[int]]:
    """Proposals for what follows a prompt: the first is right, the others are not, and the cache takes them back."""

    def propose(tokens: Sequence[int], count: int) -> list[int]:
        done = len(tokens) - behind
        return [expected[done], *[(each + 1) % 7 for each in expected[done + 1 : done + count]]]

    return propose


@pytest.mark.parametrize("protocol", ["semi2k-insecure", pytest.param("aby3", marks=pytest.mark.slow)])
def test_squares_of_cached_keys_come_with_a_prefix_and_go_with_what_is_taken_back(protocol: str) -> None:
    parties = local_parties(PROTOCOLS[protocol], None)
    prefix, prompt = PROMPT[:5], PROMPT[5:]
    job = PartyJob(protocol=protocol, parties=parties, rank=0, wait_seconds=120.0, embedding="client", prefix=prefix)
    kernel = folded(KERNEL, seed=0)
    expected = greedy(kernel, PROMPT, 8)
    exact = plain.logits(kernel, np.array([*PROMPT, *expected[:-1]]))[len(PROMPT) - 1 :]
    draft = right_at_first(expected, behind=len(prompt))
    with PrivateSession(job, model=KERNEL) as session:
        alone = session.ask(Request(prompt=prompt, new_tokens=8, keep_logits=True))
        drafted = session.ask(Request(prompt=prompt, new_tokens=5, keep_logits=True, draft=3), draft)
        two = session.ask(Request(prompt=prompt, others=(prompt[::-1],), new_tokens=2, keep_logits=True))
    for logits, count in ((alone.logits, 8), (drafted.logits, 5), (two.all_logits[0], 2)):
        assert logits is not None
        assert np.abs(logits - exact[:count]).max() < 1e-3
    other = plain.logits(kernel, np.array([*prefix, *prompt[::-1], *two.answers[1][:-1]]))[len(PROMPT) - 1 :]
    assert np.abs(two.all_logits[1] - other).max() < 1e-3


@pytest.mark.slow
def test_where_products_open_both_factors_a_token_opens_no_earlier_key_again(model: PrivateModel) -> None:
    """Counted in bytes, with a cache that takes tokens back; ``test_masks`` hears a dealer of the same blocks."""
    insecure = PROTOCOLS["semi2k-insecure"]
    job = PartyJob(protocol=insecure.name, parties=local_parties(insecure, None), rank=0, wait_seconds=120.0)
    expected = greedy(model, PROMPT, 9)
    exact = plain.logits(model, np.array([*PROMPT, *expected[:-1]]))[len(PROMPT) - 1 :]
    wrong = right_at_first(expected, behind=len(PROMPT))
    with PrivateSession(job, model=MODEL) as session:
        result = session.ask(Request(prompt=PROMPT, new_tokens=9, keep_logits=True))
        drafted = session.ask(Request(prompt=PROMPT, new_tokens=5, keep_logits=True, draft=3), wrong)
    for each, count in ((result, 9), (drafted, 5)):
        assert each.answer == expected[:count]
        assert each.logits is not None
        assert np.abs(each.logits - exact[:count]).max() < 5e-3
    config = model.config
    one = config.kv_heads * config.head_size * 8 * 2
    # A token's key and value are opened once each, under two masks, and the first pass opens the prompt's; the fifth
    # merges four positions' blocks, which opens them once more. A token's products then open its query and its
    # attention weights; what else they send is the truncation of their results.
    scores, values, cache = (
        [sum(c.bytes for c in each.operators if c.operator == name) // config.depth for each in result.tokens]
        for name in ("scores", "values", "cache")
    )
    assert cache == [(each + 1) * 4 * one for each in (len(PROMPT), 0, 0, 0, 4, 0, 0, 0)]
    for sent, opened in ((scores, one), (values, 0)):
        assert max(sent) < opened + config.heads * (len(PROMPT) + 9) * 2 * 8 + 8 * 2 * config.width + 512
