"""The client's side of a session: it alone knows the tokens, so it alone decides which pass comes next."""

from __future__ import annotations

from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aero.errors import AeroError
from aero.private.choose import Chooser
from aero.private.inbox import Inbox
from aero.private.messages import Request
from aero.private.orders import MOST_PROMPTS, Order

if TYPE_CHECKING:
    from aero.private.session import Session


class Client:
    """Answers requests over a session whose weights are in place."""

    def __init__(self, session: Session, inbox: Inbox) -> None:
        self.session, self.inbox = session, inbox

    def serve(self) -> None:
        """Answer until the user leaves. A request that cannot be answered is refused in one sentence."""
        while True:
            try:
                request = self.inbox.next()
                if request is None:
                    break
                self._check(request)
            except AeroError as error:
                self.session.emit({"kind": "refused", "message": str(error)})
                continue
            if request.others:
                self._answer_together(request)
            else:
                self._answer(request)
        self.session.conduct(Order(do="leave"), None)

    def _check(self, request: Request) -> None:
        config, prefix = self.session.agreed.program.config, len(self.session.agreed.prefix)
        length, new_tokens = len(request.prompt), request.new_tokens
        if not request.prompt:
            raise AeroError("The prompt is empty; give at least one token.")
        check_together(request)
        if not all(0 <= token < config.vocab_size for token in chain(*request.prompts)):
            raise AeroError(f"The prompt has tokens outside the model's vocabulary of {config.vocab_size}.")
        if new_tokens < 0 or request.draft < 0 or request.choice.temperature < 0 or request.choice.top_k < 0:
            raise AeroError("A request counts nothing below zero: new tokens, drafted tokens, temperature, top-k.")
        if request.draft and request.choice.temperature > 0:
            raise AeroError("A draft model's tokens are checked against the likeliest ones: set the temperature to 0.")
        if prefix + length + max(0, new_tokens - 1) > config.context:
            before = f"{prefix} prefix tokens, " if prefix else ""
            raise AeroError(
                f"{before}{length} prompt tokens and {new_tokens} new ones do not fit the model's context of "
                f"{config.context}; shorten one of them."
            )

    def _answer(self, request: Request) -> None:
        session, chooser = self.session, Chooser(request.choice)
        past = len(session.agreed.prefix)
        entering, answer = list(request.prompt), 0
        index, drafted = 0, list[int]()
        while True:
            started = perf_counter()
            rows = [*entering, *drafted]
            logits = self._pass(index, past, rows, 1 + len(drafted))
            chosen = accept(logits, drafted, chooser)
            session.emit({"kind": "pass", "seconds": perf_counter() - started})
            if request.keep_logits:
                session.emit({"kind": "logits", "values": logits[: len(chosen)].tolist()})
            past += len(entering) + len(chosen) - 1
            over = False
            for token in chosen:
                session.emit({"kind": "token", "token": token})
                answer += 1
                over = over or answer >= request.new_tokens or token in request.stop
                if over:
                    break
            # The last token needs no pass of its own: it was chosen from the logits of the one before.
            if over or self.inbox.stopped:
                break
            entering, index = [chosen[-1]], index + 1
            drafted = self._drafted(request, request.new_tokens - answer - 1)
        session.conduct(Order(do="end"), None)

    def _answer_together(self, request: Request) -> None:
        """Several prompts in the same passes. One that is answered goes on unheard until all are."""
        session, prompts = self.session, request.prompts
        # One chooser a prompt, all of one seed: each answer is that of its prompt alone.
        choosers = [Chooser(request.choice) for _ in prompts]
        past, index = len(session.agreed.prefix), 0
        entering, open_ = [list(each) for each in prompts], dict.fromkeys(range(len(prompts)), 0)
        while True:
            started = perf_counter()
            rows = [token for each in entering for token in each]
            logits = self._pass(index, past, rows, 1, batch=len(prompts))
            chosen = [chooser.choose(values) for chooser, values in zip(choosers, logits, strict=True)]
            session.emit({"kind": "pass", "seconds": perf_counter() - started})
            past += len(entering[0])
            for place in list(open_):
                if request.keep_logits:
                    session.emit({"kind": "logits", "prompt": place, "values": [logits[place].tolist()]})
                session.emit({"kind": "token", "prompt": place, "token": chosen[place]})
                open_[place] += 1
                if open_[place] >= request.new_tokens or chosen[place] in request.stop:
                    del open_[place]
            if not open_ or self.inbox.stopped:
                break
            entering, index = [[token] for token in chosen], index + 1
        session.conduct(Order(do="end"), None)

    def _pass(self, index: int, past: int, rows: list[int], logit_rows: int, batch: int = 1) -> NDArray[np.float32]:
        phase = "prefill" if index == 0 else f"token {index}"
        order = Order(do="pass", phase=phase, past=past, rows=len(rows) // batch, logit_rows=logit_rows, batch=batch)
        self.session.conduct(order, rows)
        logits = self.session.logits
        assert logits is not None
        return logits

    def _drafted(self, request: Request, room: int) -> list[int]:
        """Tokens that may come next, at most ``room``: more could not be part of the answer."""
        count = min(request.draft, room)
        if count <= 0:
            return []
        self.session.emit({"kind": "propose", "count": count})
        vocabulary = self.session.agreed.program.config.vocab_size
        return [token for token in self.inbox.draft()[:count] if 0 <= token < vocabulary]


def check_together(request: Request) -> None:
    """Raise AeroError, which tells no more than lengths, if the prompts cannot go through the same passes."""
    lengths = sorted({len(prompt) for prompt in request.prompts})
    if len(lengths) > 1:
        raise AeroError(
            "Prompts that are answered together must have the same number of tokens; these have "
            f"{', '.join(map(str, lengths[:-1]))} and {lengths[-1]}."
        )
    if len(request.prompts) > MOST_PROMPTS:
        raise AeroError(
            f"At most {MOST_PROMPTS} prompts are answered together, not {len(request.prompts)}; ask for them in parts."
        )
    if request.others and request.draft:
        raise AeroError("A draft model proposes for one prompt; leave it out, or ask for one prompt at a time.")


def accept(logits: NDArray[np.float32], drafted: list[int], chooser: Chooser) -> list[int]:
    """The tokens that a pass over the last chosen token and ``drafted`` ones yields: at least one, all of them exact.

    logits: [1 + len(drafted), V], row i after the first i drafted tokens. A drafted token stands while it is the one
    that the row before it chooses; the first row that chooses otherwise ends the answer so far with its own choice.
    """
    chosen: list[int] = []
    for row, values in enumerate(logits):
        chosen.append(chooser.choose(values))
        if row < len(drafted) and chosen[-1] != drafted[row]:
            break
    return chosen
