"""How far private answers drift over many tokens: largest logit error, and whether every greedy token is plaintext's.

    python benchmarks/drift.py --model runs/demo/demo-aero --corpus runs/demo/corpus --json out.json

One session answers prompt after prompt of held-out text, each to the end of the model's context. Plaintext is the
folded model in double precision. Every answer is written as soon as it is complete, and a later run with the same file
goes on behind it, so that a long measurement can be taken in pieces (``--minutes``).

With ``--draft-tokens`` the plaintext model itself proposes tokens, and one private pass decides several of them: the
same logits in fewer passes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from aero import provenance
from aero.eliminate import plain
from aero.eliminate.private_model import PrivateModel
from aero.eliminate.source import folded
from aero.files import write_json
from aero.private.launch import PrivateSession, local_parties
from aero.private.messages import PartyJob, Request
from aero.private.protocols import protocol_named
from aero.train.corpus import load_manifest
from aero.train.evaluate import spread
from aero.train.tokenizer import load_sequences, load_tokenizer


def proposer(model: PrivateModel) -> Any:
    """The plaintext model's own greedy continuation."""

    def propose(tokens: Sequence[int], count: int) -> list[int]:
        text = list(tokens)
        for _ in range(count):
            text.append(int(plain.logits(model, np.array(text, dtype=np.int64))[-1].argmax()))
        return text[len(tokens) :]

    return propose


def compare(session: PrivateSession, model: PrivateModel, prompt: list[int], draft_tokens: int) -> dict[str, Any]:
    """One answer to the end of the context, against plaintext."""
    new_tokens = model.config.context - len(prompt) + 1
    request = Request(prompt=tuple(prompt), new_tokens=new_tokens, keep_logits=True, draft=draft_tokens)
    result = session.ask(request, proposer(model) if draft_tokens else None)
    text = np.array([*prompt, *result.answer[:-1]], dtype=np.int64)
    exact = plain.logits(model, text)[len(prompt) - 1 :]
    assert result.logits is not None
    errors = np.abs(exact - result.logits).max(axis=1)
    ordered = np.sort(exact, axis=1)
    return {
        "tokens": len(result.answer),
        "passes": 1 + len(result.tokens),
        "max_abs_error": float(errors.max()),
        "max_abs_error_first_quarter": float(errors[: len(errors) // 4].max()),
        "max_abs_error_last_quarter": float(errors[-(len(errors) // 4) :].max()),
        "largest_logit": float(np.abs(exact).max()),
        "smallest_margin": float((ordered[:, -1] - ordered[:, -2]).min()),
        "tokens_identical": exact.argmax(1).tolist() == result.answer,
        "bytes": sum(each.total_bytes for each in [result.prefill, *result.tokens]),
        "seconds": sum(result.seconds),
    }


def main(argv: list[str]) -> None:
    """Answer, compare, write, until there are enough tokens or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--protocol", default="aby3")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--draft-tokens", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args(argv)
    done = json.loads(arguments.json.read_text(encoding="utf-8"))["answers"] if arguments.json.is_file() else []
    model = folded(str(arguments.model), seed=0)
    tokenizer = load_tokenizer(arguments.model)
    held_out = load_sequences(
        arguments.corpus, load_manifest(arguments.corpus), "holdout_packages", tokenizer, model.config.context
    )
    each = model.config.context - arguments.prompt_tokens + 1
    prompts = [
        sequence[: arguments.prompt_tokens].tolist()
        for sequence in spread(cast(Any, held_out), -(-arguments.tokens // each))
    ]
    job = PartyJob(
        protocol=arguments.protocol,
        parties=local_parties(protocol_named(arguments.protocol), None),
        rank=0,
        wait_seconds=300.0,
    )
    deadline = time.monotonic() + 60 * arguments.minutes
    with PrivateSession(job, model=str(arguments.model)) as session:
        for prompt in prompts[len(done) :]:
            answer = compare(session, model, prompt, arguments.draft_tokens)
            done.append({**answer, "draft_tokens": arguments.draft_tokens, "commit": provenance.commit()})
            print(done[-1], flush=True)
            write_json(arguments.json, report(arguments, done, session))
            if time.monotonic() > deadline:
                break


def report(arguments: argparse.Namespace, answers: list[dict[str, Any]], session: PrivateSession) -> dict[str, Any]:
    """All answers so far."""
    return {
        "program": "benchmarks/drift.py",
        "command": "python " + " ".join(shlex.quote(word) for word in sys.argv),
        "date": provenance.now(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "seed": 0,
        "model": arguments.model.name,
        "parameters": session.parameters,
        "fraction_bits": session.fraction_bits,
        "protocol": arguments.protocol,
        "trust_model": session.protocol.trust.to_dict(),
        "network": "loopback",
        "tokens": sum(each["tokens"] for each in answers),
        "max_abs_error": max(each["max_abs_error"] for each in answers),
        "answers_with_identical_tokens": sum(each["tokens_identical"] for each in answers),
        "largest_logit": max(each["largest_logit"] for each in answers),
        "smallest_margin": min(each["smallest_margin"] for each in answers),
        "answers": answers,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
