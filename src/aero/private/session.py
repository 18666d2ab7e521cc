"""One party's side of a session: weights in once, then one request after another until goodbye.

All parties walk the same public schedule: who they are, weights, set-up, then what the client orders, pass by pass. Who
holds what: rank 0 the weights, rank 1 the prompts and everything that is generated, a third party nothing.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from aero.eliminate.private_model import PrivateConfig, PrivateModel
from aero.errors import AeroError
from aero.private.blocks import Block, Blocks
from aero.private.client import Client
from aero.private.dealer.link import DealerLink
from aero.private.engine import Engine
from aero.private.held import read
from aero.private.inbox import Inbox
from aero.private.memory import peak
from aero.private.messages import Event, PartyJob, role_of
from aero.private.orders import Order
from aero.private.precision import fraction_bits_of
from aero.private.prefix import enter_prefix, prefix_step
from aero.private.program import Program, Step
from aero.private.protocols import CLIENT, MODEL, Protocol, protocol_named
from aero.private.traffic import tcp_traffic
from aero.private.watch import Watch


@dataclass(frozen=True)
class Agreed:
    """What all parties know once they have met.

    program: the steps of a pass. prefix: the public tokens before every prompt; their keys and values are in the cache
    before a request begins.
    """

    program: Program
    prefix: tuple[int, ...]


class Session:
    """A party from meeting the others to saying goodbye.

    emit: told every event. lost: called from another thread, with one sentence, when another party is gone; it must
    end the process, because the engine waits in native code for a message that will not come.
    inbox: the client's requests; None at the other parties.
    """

    def __init__(
        self,
        job: PartyJob,
        inbox: Inbox | None,
        emit: Callable[[Event], None],
        lost: Callable[[int | None, str], None],
    ) -> None:
        self.job, self.inbox, self.emit = job, inbox, emit
        self.protocol: Protocol = protocol_named(job.protocol)
        self.role = role_of(self.protocol.roles, job.rank)
        self.at = "the start"
        self.held, self.batch, self.blocks = 0, 1, Blocks()
        self._ahead: threading.Thread | None = None
        self._tables: dict[str, NDArray[np.float64]] = {}
        self._end = lost
        self.watch = Watch(job.rank, job.parties, self.protocol.roles, self._lost)
        # The model's party alone talks to the dealer, and passes it the others' encrypted seeds.
        talks = job.dealer is not None and job.rank == MODEL
        self.dealer: DealerLink | None = DealerLink(job.dealer) if job.dealer is not None and talks else None

    def run(self) -> None:
        """Everything. Raises AeroError for what the user can mend."""
        job = self.job
        if self.protocol.dealer and job.dealer is None:
            raise AeroError(f"Protocol {job.protocol} needs a dealer: name it with --dealer and --dealer-key.")
        if self.dealer is not None:
            self.dealer.connect(job.wait_seconds, self._lost_dealer)
        model = self._load() if self.role == "model" else None
        self.watch.connect(job.wait_seconds)
        addresses = [str(address) for address in job.parties]
        self.engine = Engine(
            self.protocol,
            job.rank,
            addresses,
            job.threads,
            connect_seconds=job.wait_seconds,
            dealer=job.dealer,
            dealt=int if self.dealer is None else self.dealer.total,
        )
        self.agreed = self._agree(model)
        self._enter_weights(model)
        del model
        self.engine.barrier()
        self.emit({"kind": "ready"})
        if self.inbox is not None:
            Client(self, self.inbox).serve()
        else:
            while self.conduct(None, None).do != "leave":
                pass
        self.at = "saying goodbye"
        self.engine.barrier()
        self.engine.close()
        if self.dealer is not None:
            self.dealer.close()
        # Last: whoever leaves while another one's final message is unanswered makes that one fail.
        self.watch.close()

    def _load(self) -> PrivateModel:
        if self.job.held is not None:
            return read(self.job.held)
        if self.job.model is None:
            raise AeroError("The model's party was given no model; name a folder or a shape.")
        # The model's own libraries are loaded by its owner alone.
        from aero.eliminate.source import folded

        return folded(self.job.model, seed=self.job.weight_seed)

    def _agree(self, model: PrivateModel | None) -> Agreed:
        """The model's party tells the others the public description."""
        data = None
        if model is not None:
            check_tokens(self.job.prefix, model.config, "prefix")
            rotation = None if model.rotation is None else model.rotation.astype("<f8")
            public = {
                "config": model.config.to_dict(),
                "gelu": self.job.gelu,
                "rotation": None if rotation is None else base64.b64encode(rotation.tobytes()).decode(),
                "prefix": self.job.prefix,
                "fraction_bits": self.job.fraction_bits or fraction_bits_of(model.config),
                "dealer": None if self.job.dealer is None else self.job.dealer.public_key,
            }
            data = json.dumps(public).encode()
        public = json.loads(self.engine.tell_all("public facts", MODEL, data))
        if self.job.dealer is not None and public["dealer"] != self.job.dealer.public_key:
            raise AeroError("The parties were given different public keys of the dealer; ask its owner for the key.")
        self.engine.start(public["fraction_bits"])
        config = PrivateConfig.from_dict(public["config"])
        table = None
        if public["rotation"] is not None:
            flat = np.frombuffer(base64.b64decode(public["rotation"]), "<f8")
            table = flat.reshape(2, config.context, config.rotary_size // 2)
        if self.job.rank == CLIENT:
            told = {"parameters": config.parameters, "fraction_bits": public["fraction_bits"]}
            self.emit({"kind": "model", "description": config.to_dict(), **told})
        program = Program(
            config,
            table,
            one_hot=self.job.embedding == "private",
            gelu=public["gelu"],
            together=self.protocol.together,
            largest_product=self.protocol.largest_product,
        )
        return Agreed(program, tuple(public["prefix"]))

    def _enter_weights(self, model: PrivateModel | None) -> None:
        program, prefix = self.agreed.program, self.agreed.prefix
        names, shapes = program.weights, program.layout.shapes()
        self._phase("weights", len(names))
        if prefix:
            self.at = "computing the prefix"
            enter_prefix(self.engine, program, prefix, model)
        for done, name in enumerate(names):
            self.at = f"sharing {name}"
            # Taken out of the model one by one: shares and weights need not both fit.
            value = None if model is None else program.layout.take(name, model.weights)
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
                self._tables[name] = flat.reshape(config.shapes()[name]).astype(np.float64)

    def conduct(self, order: Order | None, tokens: list[int] | None) -> Order:
        """Do what the client orders: it alone gives ``order``, and with a pass the ``tokens`` that enter.

        Of several prompts the tokens come one prompt after another. After a pass the client finds its logits in
        ``logits``, [batch logit_rows, V].
        """
        self.at = "waiting for a request" if self.held == 0 else "waiting for the next pass"
        config = self.agreed.program.config
        told = self.engine.tell_all("schedule", CLIENT, None if order is None else order.to_bytes())
        order = Order.from_bytes(
            told,
            held=max(self.held, len(self.agreed.prefix)),
            context=config.context,
            batch=self.batch if self.held else None,
        )
        if order.do == "pass":
            self.logits = self._pass(order, tokens)
        elif order.do == "end":
            self._forget()
        self._costs(order.phase)
        if order.do == "end":
            self.emit({"kind": "answered"})
        return order

    def _pass(self, order: Order, tokens: list[int] | None) -> NDArray[np.float32] | None:
        """One forward pass; the logits [batch logit_rows, V] at the client, None elsewhere."""
        program, plan = self.agreed.program, None
        if order.past == 0:
            self._forget()
            self.blocks.plain = order.rows
        elif self.held == 0:
            self.engine.run([prefix_step(name, order.batch) for name in program.cache])
            self.blocks.plain = order.past
        self.batch = order.batch
        if order.past and self.protocol.weights == "cached":
            plan = self.blocks.plan(order.past, order.rows)
        steps = program.forward(order.past, order.rows, order.logit_rows, plan, batch=order.batch)
        shape = program.input_shape(order.rows, order.batch)
        self.at = "compiling"
        # Nothing is sent meanwhile, and whoever waits for bytes shall know why.
        self.emit({"kind": "compiling", "going": True})
        if self._ahead is not None:
            self._ahead.join()
        new = self.engine.prepare((steps, {"tokens": shape}))
        self.emit({"kind": "compiling", "going": False})
        if new:
            self.engine.barrier()
        self._compile_ahead(order, steps)
        self._phase(order.phase, len(steps))
        value = None if tokens is None else self._rows(order.past, tokens)
        self.engine.enter("tokens", shape, CLIENT, value)
        done = 0

        def before(step: Step) -> None:
            nonlocal done
            self.at = step.operator if step.layer is None else f"{step.operator} of layer {step.layer}"
            self._step_done(done)
            done += 1

        self.engine.run(steps, before=before)
        self.held = order.past + order.rows
        if plan is not None:
            self._delete_blocks(plan.gone)
            if plan.base is not None:
                self._delete_plain()
        self.at = "revealing the logits"
        logits = self.engine.open_to("logits", CLIENT)
        self.engine.delete("logits")
        return logits

    def _compile_ahead(self, order: Order, steps: list[Step]) -> None:
        """While this pass waits for messages, compile what most likely comes next: one position more."""
        program, past = self.agreed.program, order.past + order.rows
        if past >= program.config.context:
            return
        # The names of blocks play no part in what is compiled, so a copy of their layout will do.
        blocks = copy.deepcopy(self.blocks)
        plan = blocks.plan(past, 1) if self.protocol.weights == "cached" else None
        passes = (
            (steps, {"tokens": program.input_shape(order.rows, order.batch)}),
            (
                program.forward(past, 1, 1, plan, batch=order.batch),
                {"tokens": program.input_shape(1, order.batch)},
            ),
        )
        self._ahead = threading.Thread(target=self.engine.prepare, args=passes, daemon=True)
        self._ahead.start()

    def _rows(self, past: int, tokens: list[int]) -> NDArray[np.float64]:
        program = self.agreed.program
        if program.one_hot:
            value = np.zeros(program.input_shape(len(tokens)))
            value[np.arange(len(tokens)), tokens] = 1.0
            return value
        rows = self._tables["embedding"][tokens]
        if "positions" in self._tables:
            entering = self._tables["positions"][past : past + len(tokens) // self.batch]
            rows = rows + np.tile(entering, (self.batch, 1))
        return rows

    def _forget(self) -> None:
        """Delete every secret of this request: its keys and values."""
        if self.blocks.plain:
            self._delete_plain()
        self._delete_blocks(self.blocks.blocks)
        self.blocks = Blocks(made=self.blocks.made)
        self.held = 0

    def _delete_plain(self) -> None:
        for name in self.agreed.program.cache:
            self.engine.delete(name)

    def _delete_blocks(self, gone: Iterable[Block]) -> None:
        for block in gone:
            for name in self.agreed.program.block_variables(block):
                self.engine.delete(name)

    def _phase(self, name: str, steps: int) -> None:
        if self.job.rank == CLIENT:
            self.emit({"kind": "phase", "name": name, "steps": steps})

    def _step_done(self, done: int) -> None:
        if self.job.rank == CLIENT:
            self.emit({"kind": "step", "done": done})

    def _costs(self, phase: str) -> None:
        dealer = None if self.job.dealer is None else self.job.dealer.port
        counted = tcp_traffic(without_ports=self.watch.ports(), without_peer=dealer)
        costs = [asdict(cost) for cost in self.engine.take_costs()]
        system = None if counted is None else counted.bytes_sent
        self.emit({"kind": "costs", "phase": phase, "costs": costs, "system": system, "peak": peak()})

    def _lost(self, rank: int) -> None:
        name, address = self.protocol.roles[rank], self.job.parties[rank]
        self._end(rank, f"Party {name} ({address}) is gone; the run ended at {self.at}. Start all parties again.")

    def _lost_dealer(self) -> None:
        assert self.dealer is not None
        self._end(None, self.dealer.gone(self.at))


def check_tokens(tokens: tuple[int, ...], config: PrivateConfig, name: str) -> None:
    """Raise AeroError if a token is none of the model's, or if there are more than it reads."""
    if not all(0 <= token < config.vocab_size for token in tokens):
        raise AeroError(f"The {name} has tokens outside the model's vocabulary of {config.vocab_size}.")
    if len(tokens) > config.context:
        raise AeroError(f"The {name} has {len(tokens)} tokens, the model's context is {config.context}; shorten it.")
