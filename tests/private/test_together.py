"""Several prompts in the same passes: every answer is that of its prompt alone, in the rounds of one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

import jax.numpy as jnp
from numpy.typing import NDArray
from tests.private.compiled import run_compiled

from aero.architecture import architecture
from aero.cli.prompts import prompt_texts
from aero.config import gpt2_tiny
from aero.eliminate import plain
from aero.eliminate.outline import outline
from aero.eliminate.private_model import PrivateModel
from aero.eliminate.source import describe, folded
from aero.errors import AeroError
from aero.private.blocks import Blocks
from aero.private.document import document
from aero.private.estimate.forecast import forecast
from aero.private.launch import PrivateSession, local_parties
from aero.private.messages import Choice, PartyJob, Request
from aero.private.modes import answer
from aero.private.orders import MOST_PROMPTS, Order
from aero.private.program import Program
from aero.private.protocols import PROTOCOLS, SEMI2K, protocol_named

MODEL = "gpt2-tiny:static+bilinear+bounded"
PROMPTS = ((3, 1401, 59, 265, 35), (897, 932, 384, 7, 7), (11, 12, 13, 14, 1500))


def opened(protocol: str, model: str = MODEL, prefix: tuple[int, ...] = ()) -> PrivateSession:
    parties = local_parties(protocol_named(protocol), None)
    job = PartyJob(protocol=protocol, parties=parties, rank=0, wait_seconds=120.0, embedding="client", prefix=prefix)
    return PrivateSession(job, model=model)


@pytest.fixture(scope="module")
def session() -> Iterator[PrivateSession]:
    with opened("semi2k-insecure") as session:
        yield session


def test_every_answer_is_that_of_its_prompt_alone(session: PrivateSession) -> None:
    together = session.ask(Request(prompt=PROMPTS[0], others=PROMPTS[1:], new_tokens=2, keep_logits=True))
    alone = [session.ask(Request(prompt=prompt, new_tokens=2, keep_logits=True)) for prompt in PROMPTS]
    assert together.answers == [each.answer for each in alone]
    assert together.answer == together.answers[0]
    exact = folded(MODEL, seed=0)
    for prompt, tokens, logits in zip(PROMPTS, together.answers, together.all_logits, strict=True):
        text = np.array([*prompt, *tokens[:-1]])
        assert np.abs(plain.logits(exact, text)[len(prompt) - 1 :] - logits).max() < 2e-3


@pytest.mark.parametrize("protocol", ["semi2k-insecure", pytest.param("aby3", marks=pytest.mark.slow)])
def test_rounds_of_one_prompt_and_bytes_of_all(protocol: str, session: PrivateSession) -> None:
    def ask(session: PrivateSession, prompts: tuple[tuple[int, ...], ...]) -> Any:
        return session.ask(Request(prompt=prompts[0], others=prompts[1:], new_tokens=2))

    if protocol == "aby3":
        with opened(protocol) as other:
            one, three = ask(other, PROMPTS[:1]), ask(other, PROMPTS)
    else:
        one, three = ask(session, PROMPTS[:1]), ask(session, PROMPTS)
    expected = [
        forecast(
            outline(describe(MODEL)),
            PROTOCOLS[protocol],
            tokens=len(PROMPTS[0]),
            new_tokens=2,
            embedding="client",
            gelu="polynomial",
            prompts=count,
        )
        for count in (1, 3)
    ]
    passes = [
        ([result.prefill, *result.tokens], [each.prefill, *each.tokens])
        for result, each in zip((one, three), expected, strict=True)
    ]
    for accounts, works in passes:
        for account, work in zip(accounts, works, strict=True):
            assert account.total_bytes == sum(each.bytes for each in work)
    for first, second in zip(passes[0][0], passes[1][0], strict=True):
        assert second.rounds == (first.rounds if protocol != "aby3" else pytest.approx(first.rounds, rel=0.1))
        # Less than three times the bytes: what is opened of a weight or told to all is there once.
        assert 2.5 * first.total_bytes < second.total_bytes <= 3 * first.total_bytes
    written = document(three, model=MODEL, embedding="client", gelu=None, seed=0, max_abs_error=None)
    assert (written["prompts"], written["tokens"], written["new_tokens"]) == (3, 5, 2)
    later = sum(each.total_bytes for each in three.tokens)
    assert written["per_token"]["total_bytes"] == pytest.approx(later / 3, abs=1)


def test_an_answer_that_stops_leaves_the_others_as_they_are(session: PrivateSession) -> None:
    whole = session.ask(Request(prompt=PROMPTS[0], others=PROMPTS[1:], new_tokens=2))
    stop = whole.answers[1][0]
    expected = [each[: each.index(stop) + 1] if stop in each else each for each in whole.answers]
    assert len({len(each) for each in expected}) > 1
    result = session.ask(Request(prompt=PROMPTS[0], others=PROMPTS[1:], new_tokens=2, stop=(stop,)))
    assert result.answers == expected


@pytest.mark.slow
def test_sampling_is_that_of_a_prompt_alone(session: PrivateSession) -> None:
    choice = Choice(temperature=1.0, top_k=50, seed=3)
    together = session.ask(Request(prompt=PROMPTS[0], others=PROMPTS[1:], new_tokens=2, choice=choice))
    assert together.answers[2] == session.ask(Request(prompt=PROMPTS[2], new_tokens=2, choice=choice)).answer


@pytest.mark.slow
def test_a_prefix_comes_before_every_prompt() -> None:
    with opened("aby3", prefix=(5, 6, 7)) as session:
        result = session.ask(Request(prompt=PROMPTS[0], others=PROMPTS[1:], new_tokens=2, keep_logits=True))
    exact = folded(MODEL, seed=0)
    for prompt, tokens, logits in zip(PROMPTS, result.answers, result.all_logits, strict=True):
        text = np.array([5, 6, 7, *prompt, *tokens[:-1]])
        assert np.abs(plain.logits(exact, text)[-2:] - logits).max() < 5e-3


REFUSED = [
    (Request(prompt=(1, 2), others=((1, 2, 3),)), "same number of tokens; these have 2 and 3"),
    (Request(prompt=(1, 2), others=((1, 2),) * MOST_PROMPTS), "At most 64 prompts"),
    (Request(prompt=(1, 2), others=((1, 2),), draft=2), "A draft model proposes for one prompt"),
    (Request(prompt=(1, 2), others=((1, 10**6),)), "outside the model's vocabulary"),
]


@pytest.mark.parametrize(("request_", "sentence"), REFUSED)
def test_what_cannot_go_together_is_refused_and_the_session_goes_on(
    request_: Request, sentence: str, session: PrivateSession
) -> None:
    with pytest.raises(AeroError, match=sentence):
        session.ask(request_)
    assert len(session.ask(Request(prompt=PROMPTS[0])).answer) == 1


def test_an_order_for_other_prompts_than_the_cache_holds_is_refused() -> None:
    order = Order(do="pass", phase="token 1", past=4, rows=1, logit_rows=1, batch=3)
    assert Order.from_bytes(order.to_bytes(), held=4, context=9, batch=3) == order
    assert Order.from_bytes(order.to_bytes(), held=4, context=9, batch=None) == order
    for wrong, batch in ((order, 2), (replace(order, batch=0), None), (replace(order, batch=MOST_PROMPTS + 1), None)):
        with pytest.raises(AeroError, match="check its version"):
            Order.from_bytes(wrong.to_bytes(), held=4, context=9, batch=batch)


def with_a_uniform_head() -> PrivateModel:
    from aero.eliminate.fold import fold
    from aero.model.decoder import Decoder
    from aero.model.norm import set_static_blend

    config = architecture("static+bilinear+bounded", gpt2_tiny())
    decoder = Decoder(replace(config, layers=tuple(replace(layer, uniform_heads=(1,)) for layer in config.layers)))
    set_static_blend(decoder, 1.0)
    return fold(decoder)


# Steps that read heads and positions in every way there is.
MIXED = (
    "llama-tiny",
    "gpt2-tiny:SM(t)+ScFuFFN",
    "gpt2-tiny:SAS-P(SM+ScFuFFN)",
    "gpt2-tiny:static+bilinear+power",
    "llama-tiny:static+bilinear+kernel",
    "",
)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_in_plain_arithmetic_a_batch_is_its_prompts(name: str, in_blocks: bool) -> None:
    model = folded(name, seed=0) if name else with_a_uniform_head()
    together = SEMI2K.together if in_blocks else PROTOCOLS["aby3"].together
    program = Program(model.config, model.rotation, one_hot=True, together=together)
    weights = {name: jnp.asarray(each, jnp.float32) for name, each in program.layout.pack(model.weights).items()}
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 7))

    def run(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        batch, state, found, blocks = len(rows), dict(weights), [], Blocks()
        blocks.plain = 5
        for past, end in ((0, 5), (5, 7)):
            plan = blocks.plan(past, end - past) if in_blocks and past else None
            entering = np.eye(model.config.vocab_size, dtype=np.float32)[rows[:, past:end].reshape(-1)]
            steps = program.forward(past, end - past, 2, plan, batch=batch)
            state = run_compiled(steps, state | {"tokens": jnp.asarray(entering)})
            found.append(np.asarray(state["logits"]).reshape(batch, 2, -1))
        return np.concatenate(found, axis=1)

    np.testing.assert_allclose(run(tokens), np.concatenate([run(each[None]) for each in tokens]), atol=2e-4)


def test_prompts_come_from_the_command_line_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n")
    assert prompt_texts(["one", "two"], None, None) == prompt_texts(None, None, file) == ["one", "two"]
    assert prompt_texts(None, file, None) == ["one\ntwo\n"]
    for prompts, whole, many, sentence in (
        (["x"], None, file, "with one of --prompt"),
        (None, file, file, "with one of --prompt"),
        (["x", "y"], file, None, "either --prompt or"),
        (["x", ""], None, None, "prompt is empty"),
        (None, None, None, "either --prompt or"),
    ):
        with pytest.raises(AeroError, match=sentence):
            prompt_texts(prompts, whole, many)


def test_other_modes_take_one_prompt() -> None:
    job = PartyJob(protocol="aby3", parties=local_parties(protocol_named("aby3"), None), rank=0, wait_seconds=1.0)
    with pytest.raises(AeroError, match="one prompt at a time"):
        answer("plaintext", job, Request(prompt=(1,), others=((2,),)), model=MODEL)
