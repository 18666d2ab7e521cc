"""One party as a process: ``python -m aero.private.party``, its job on standard input, its events on standard output.

All parties walk the same public schedule: weights in, set-up, prefill, one pass a token. Who holds what: rank 0 the
weights, rank 1 the prompt and everything that is generated, a third party nothing.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import sys
import threading
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from aero.eliminate.private_model import PrivateConfig, PrivateModel
from aero.errors import AeroError
from aero.private.choose import Chooser
from aero.private.engine import Engine
from aero.private.messages import Event, PartyJob, role_of
from aero.private.program import Program, Step
from aero.private.protocols import CLIENT, MODEL, Protocol, protocol_named
from aero.private.traffic import tcp_traffic
from aero.private.watch import Watch

_speaking = threading.Lock()


def emit(event: Event) -> None:
    """Write one event, whole, from whatever thread."""
    with _speaking:
        print(json.dumps(event), flush=True)


class Session:
    """One run of one party, from meeting the others to saying goodbye."""

    def __init__(self, job: PartyJob) -> None:
        self.job = job
        self.protocol: Protocol = protocol_named(job.protocol)
        self.role = role_of(self.protocol.roles, job.rank)
        self.at = "the start"
        self.watch = Watch(job.rank, job.parties, self.protocol.roles, self._lost)
        self._weights: dict[str, NDArray[np.float64]] = {}

    def run(self) -> None:
        """Everything. Raises AeroError for what the user can mend."""
        job = self.job
        model = self._load() if self.role == "model" else None
        self.watch.connect(job.wait_seconds)
        addresses = [str(address) for address in job.parties]
        self.engine = Engine(self.protocol, job.rank, addresses, job.threads, connect_seconds=job.wait_seconds)
        program = self._agree(model)
        length, new_tokens = self._plan(program.config)
        self._enter_weights(program, model)
        del model
        tokens = list(job.prompt or ())
        chooser = Chooser(job.choice)
        past = 0
        for index in range(new_tokens + 1):
            rows = length if index == 0 else 1
            logits = self._pass(program, "prefill" if index == 0 else f"token {index}", past, rows, tokens[past:])
            past += rows
            if logits is not None:
                if job.keep_logits:
                    emit({"kind": "logits", "values": logits.tolist()})
                tokens.append(chooser.choose(logits))
                emit({"kind": "token", "token": tokens[-1]})
            # The last token needs no pass of its own: it was chosen from the logits of the one before.
            if index + 1 >= max(1, new_tokens):
                break
        self._report_traffic()
        self.engine.barrier()
        self.engine.close()
        # Last: whoever leaves while another one's final message is unanswered makes that one fail.
        self.watch.close()

    def _load(self) -> PrivateModel:
        if self.job.model is None:
            raise AeroError("The model's party was given no model; name a folder or a shape.")
        # The model's own libraries are loaded by its owner alone.
        from aero.eliminate.source import folded

        return folded(self.job.model, seed=self.job.weight_seed)

    def _agree(self, model: PrivateModel | None) -> Program:
        """The model's party tells the others the public description."""
        data = None
        if model is not None:
            rotation = None if model.rotation is None else model.rotation.astype("<f8")
            public = {
                "config": model.config.to_dict(),
                "gelu": self.job.gelu,
                "rotation": None if rotation is None else base64.b64encode(rotation.tobytes()).decode(),
            }
            data = json.dumps(public).encode()
        public = json.loads(self.engine.tell_all("public facts", MODEL, data))
        config = PrivateConfig.from_dict(public["config"])
        table = None
        if public["rotation"] is not None:
            flat = np.frombuffer(base64.b64decode(public["rotation"]), "<f8")
            table = flat.reshape(2, config.context, config.rotary_size // 2)
        if self.job.rank == CLIENT:
            emit({"kind": "model", "description": config.to_dict(), "parameters": config.parameters})
        return Program(config, table, one_hot=self.job.embedding == "private", gelu=public["gelu"])

    def _plan(self, config: PrivateConfig) -> tuple[int, int]:
        """The client tells the others how long its prompt is and how many tokens it wants."""
        data = None
        if self.job.rank == CLIENT:
            prompt = self.job.prompt or ()
            if not prompt:
                raise AeroError("The prompt is empty; give at least one token.")
            if not all(0 <= token < config.vocab_size for token in prompt):
                raise AeroError(f"The prompt has tokens outside the model's vocabulary of {config.vocab_size}.")
            data = json.dumps([len(prompt), self.job.new_tokens]).encode()
        length, new_tokens = json.loads(self.engine.tell_all("public facts", CLIENT, data))
        if length + max(0, new_tokens - 1) > config.context:
            raise AeroError(
                f"{length} prompt tokens and {new_tokens} new ones do not fit the model's context of {config.context}; "
                "shorten one of them."
            )
        return length, new_tokens

    def _enter_weights(self, program: Program, model: PrivateModel | None) -> None:
        names, shapes = program.weights, program.config.shapes()
        self._phase("weights", len(names))
        for done, name in enumerate(names):
            self.at = f"sharing {name}"
            # Taken out of the model one by one: shares and weights need not both fit.
            value = None if model is None else model.weights.pop(name)
            self.engine.enter(name, shapes[name], MODEL, value)
            self.engine.hold(name)
            self._step_done(done + 1)
        self.engine.warm_up()
        if not program.one_hot:
            self._give_tables(program.config, model)
        self._costs("weights")

    def _give_tables(self, config: PrivateConfig, model: PrivateModel | None) -> None:
        for name in ("embedding", "positions"):
            if name not in config.shapes():
                continue
            data = None if model is None else model.weights.pop(name).astype("<f4").tobytes()
            told = self.engine.tell("embedding table", MODEL, CLIENT, data)
            if told is not None:
                flat = np.frombuffer(told, "<f4")
                self._weights[name] = flat.reshape(config.shapes()[name]).astype(np.float64)

    def _pass(
        self, program: Program, phase: str, past: int, rows: int, tokens: list[int]
    ) -> NDArray[np.float32] | None:
        """One forward pass over the next ``rows`` positions; the logits [V] at the client, None elsewhere."""
        steps = program.forward(past, rows)
        shape = program.input_shape(rows)
        self.engine.prepare(steps, {"tokens": shape})
        self.engine.barrier()
        self._phase(phase, len(steps))
        value = self._rows(program, past, tokens) if self.job.rank == CLIENT else None
        self.engine.enter("tokens", shape, CLIENT, value)
        done = 0

        def before(step: Step) -> None:
            nonlocal done
            self.at = step.operator if step.layer is None else f"{step.operator} of layer {step.layer}"
            self._step_done(done)
            done += 1

        self.engine.run(steps, before=before)
        self.at = "revealing the logits"
        logits = self.engine.open_to("logits", CLIENT)
        self.engine.delete("logits")
        self._costs(phase)
        return None if logits is None else logits[0]

    def _rows(self, program: Program, past: int, tokens: list[int]) -> NDArray[np.float64]:
        if program.one_hot:
            value = np.zeros(program.input_shape(len(tokens)))
            value[np.arange(len(tokens)), tokens] = 1.0
            return value
        rows = self._weights["embedding"][tokens]
        if "positions" in self._weights:
            rows = rows + self._weights["positions"][past : past + len(tokens)]
        return rows

    def _phase(self, name: str, steps: int) -> None:
        if self.job.rank == CLIENT:
            emit({"kind": "phase", "name": name, "steps": steps})

    def _step_done(self, done: int) -> None:
        if self.job.rank == CLIENT:
            emit({"kind": "step", "done": done})

    def _costs(self, phase: str) -> None:
        emit({"kind": "costs", "phase": phase, "costs": [asdict(cost) for cost in self.engine.take_costs()]})

    def _report_traffic(self) -> None:
        counted = tcp_traffic(without_ports=self.watch.ports())
        emit({"kind": "traffic", "system": None if counted is None else asdict(counted)})

    def _lost(self, rank: int) -> None:
        name, address = self.protocol.roles[rank], self.job.parties[rank]
        emit(
            {
                "kind": "error",
                "lost": rank,
                "message": f"Party {name} ({address}) is gone; the run ended at {self.at}. Start all parties again.",
            }
        )
        # The engine waits in native code for a message that will not come; there is no way to end but at once.
        os._exit(2)


def main() -> None:
    """Run the job on standard input; exit code 0, or 2 with an ``error`` event."""
    # A core dump would hold shares and weights.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    session: Session | None = None
    try:
        job = PartyJob.from_json(sys.stdin.readline())
        if job.attended:
            threading.Thread(target=_end_with_launcher, daemon=True).start()
        session = Session(job)
        session.run()
        emit({"kind": "done"})
    except AeroError as error:
        emit({"kind": "error", "message": str(error)})
        _leave(2)
    except Exception as error:
        # A traceback or the engine's own text could quote values: only the place and the kind of error are told.
        at = "the start" if session is None else session.at
        who = "" if session is None else f" of party {session.role}"
        emit({"kind": "error", "message": f"The engine{who} failed at {at} ({type(error).__name__}); run it again."})
        _leave(2)
    _leave(0)


def _leave(code: int) -> None:
    # Native threads may still wait for messages of parties that left; do not wait for them.
    sys.stdout.flush()
    os._exit(code)


def _end_with_launcher() -> None:
    sys.stdin.read()
    os._exit(2)


if __name__ == "__main__":
    main()
