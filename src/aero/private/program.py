"""The private program: a folded model's forward pass as a list of steps, each a pure JAX function of named variables.

A step is the unit of the account: one operator of one layer. Steps of the same kind and shape are compiled once and run
under other variable names, so a deep model compiles as fast as a shallow one. The same list runs in plain JAX
(``run_plain``) and on the secure engine.

Variables: ``x`` is the residual stream [rows, width]; ``k.<layer>`` and ``v.<layer>`` are the secret key/value cache
[kv_heads, keys, head_size], which outlives a pass; weights carry the names of ``PrivateConfig.shapes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aero.config import GATED, GeluForm
from aero.eliminate.private_model import Array, Norm, PrivateConfig
from aero.private import nonlinear, softmax

Rotation = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class Step:
    """One operator of one layer.

    operator: its name in the account. layer: its layer, None outside the layers.
    function: pure JAX over the inputs, in order; returns one array or a tuple, one for each output.
    """

    operator: str
    layer: int | None
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Program:
    """The steps of a folded model of this public description.

    rotation: ``PrivateModel.rotation``, public.
    one_hot: the client's tokens enter as one-hot rows that multiply the secret embedding. Otherwise the client holds
        the embedding table and enters embedded rows.
    gelu: how GELU is computed, where the model has it.
    """

    def __init__(
        self, config: PrivateConfig, rotation: Array | None, *, one_hot: bool, gelu: GeluForm = "polynomial"
    ) -> None:
        self.config = config
        self.rotation = rotation
        self.one_hot = one_hot
        self.activations = nonlinear.activations(gelu)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that the steps use, in order of first use."""
        absent = set() if self.one_hot else {"embedding", "positions"}
        return tuple(name for name in self.config.shapes() if name not in absent)

    def input_shape(self, rows: int) -> tuple[int, int]:
        """Shape of the client's input ``tokens`` for that many positions."""
        return (rows, self.config.vocab_size if self.one_hot else self.config.width)

    @property
    def cache(self) -> tuple[str, ...]:
        """Names of the key/value cache's variables."""
        return tuple(f"{kind}.{index}" for index in range(self.config.depth) for kind in "kv")

    def forward(self, past: int, rows: int, logit_rows: int = 1) -> list[Step]:
        """The pass over positions past ... past + rows - 1: input ``tokens``, output ``logits`` [logit_rows, V].

        past = 0 is the prefill; past > 0 reads the first ``past`` positions of the key/value cache, which may hold
        more, and extends them. Only the last ``logit_rows`` positions' logits are computed: nothing else chooses a
        token.
        """
        return list(self._forward(past, rows, logit_rows))

    def _forward(self, past: int, rows: int, logit_rows: int) -> Iterator[Step]:
        config = self.config
        if self.one_hot:
            inputs = ["tokens", "embedding"] + (["positions"] if config.learned_positions else [])
            yield Step("embedding", None, partial(_embed, past=past), tuple(inputs), ("x",))
        else:
            yield Step("embedding", None, _enter, ("tokens",), ("x",))
        for index in range(config.depth):
            yield from self._attention(index, past, rows)
            yield from self._branch(index)
        yield Step("last position", None, partial(_last, rows=logit_rows), ("x",), ("x",))
        last = "x"
        if config.final_norm != "none":
            yield _norm(config.final_norm, None, "final_norm", "x", "h")
            last = "h"
        yield self._linear("vocabulary", None, "head", last, "logits")

    def _attention(self, index: int, past: int, rows: int) -> Iterator[Step]:
        config, layer, prefix = self.config, self.config.layers[index], f"layers.{index}"
        read = "x"
        if layer.attention_norm != "none":
            read = "n"
            yield _norm(layer.attention_norm, index, f"{prefix}.attention_norm", "x", read)
        yield self._linear("projection", index, f"{prefix}.qkv", read, "qkv")
        cache = (f"k.{index}", f"v.{index}")
        split = partial(_split, heads=config.heads, kv_heads=config.kv_heads, head_size=config.head_size)
        yield Step("projection", index, split, ("qkv",), ("q", "k", "v"))
        if self.rotation is not None:
            turn = partial(_rotate, rotation=_constant(self.rotation[:, past : past + rows]))
            yield Step("rotary", index, turn, ("q", "k"), ("q", "k"))
        if layer.temperature:
            temper = partial(_temper, past=past)
            yield Step("temperature", index, temper, ("q", f"{prefix}.inverse_temperature"), ("q",))
        if past:
            yield Step("cache", index, partial(_extend, past=past), (cache[0], cache[1], "k", "v"), cache)
        else:
            yield Step("cache", index, _keep, ("k", "v"), cache)
        group = config.heads // config.kv_heads
        yield Step("scores", index, partial(_scores, group=group), ("q", cache[0]), ("s",))
        yield Step("softmax maximum", index, softmax.row_maximum, ("s",), ("m",))
        yield Step("softmax exponent", index, softmax.attention_weights, ("s", "m"), ("e",))
        yield Step("softmax reciprocal", index, softmax.row_reciprocal, ("e",), ("r",))
        yield Step("values", index, partial(_values, group=group), ("e", cache[1]), ("o",))
        yield Step("softmax normalise", index, _normalise, ("o", "r"), ("a",))
        yield self._linear("projection", index, f"{prefix}.out", "a", "a")
        if config.parallel:
            return
        yield Step("residual", index, _add, ("x", "a"), ("x",))

    def _branch(self, index: int) -> Iterator[Step]:
        config, layer, prefix = self.config, self.config.layers[index], f"layers.{index}"
        kind = layer.feedforward
        if kind == "dropped":
            if config.parallel:
                yield Step("residual", index, _add, ("x", "a"), ("x",))
            return
        read = "x"
        if layer.feedforward_norm != "none":
            read = "n"
            yield _norm(layer.feedforward_norm, index, f"{prefix}.feedforward_norm", "x", read)
        if kind == "matrix":
            yield self._linear("feed-forward", index, f"{prefix}.ffn", read, "x")
            return
        if kind == "linear":
            yield self._linear("feed-forward", index, f"{prefix}.ffn", read, "f")
        else:
            yield self._linear("feed-forward", index, f"{prefix}.ffn_in", read, "f")
            if kind in GATED:
                yield self._linear("feed-forward", index, f"{prefix}.ffn_gate", read, "g")
                if kind == "silu_gated":
                    yield Step("silu", index, nonlinear.silu, ("g",), ("g",))
                yield Step("gate product", index, _multiply, ("f", "g"), ("f",))
            elif kind == "leaky":
                yield Step("leaky", index, nonlinear.leaky, ("f", f"{prefix}.slope"), ("f",))
            else:
                yield Step(kind.removesuffix("_tanh"), index, self.activations[kind], ("f",), ("f",))
            yield self._linear("feed-forward", index, f"{prefix}.ffn_out", "f", "f")
        if config.parallel:
            yield Step("residual", index, _add3, ("x", "a", "f"), ("x",))
        else:
            yield Step("residual", index, _add, ("x", "f"), ("x",))

    def _linear(self, operator: str, index: int | None, name: str, source: str, target: str) -> Step:
        if name in self.config.biased:
            return Step(operator, index, _affine, (source, name, f"{name}.bias"), (target,))
        return Step(operator, index, _product, (source, name), (target,))


WORKING = frozenset({"tokens", "x", "h", "n", "qkv", "q", "k", "v", "s", "m", "e", "r", "o", "a", "f", "g"})
"""Variables that live within one pass. The rest stay: weights, the key/value cache, ``logits``."""


def freed(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """For each step, the working variables that no later step reads before writing them anew: they can be deleted."""
    needed: set[str] = set()
    result: list[tuple[str, ...]] = []
    for step in reversed(steps):
        after = needed
        needed = (needed - set(step.outputs)) | (WORKING & set(step.inputs))
        dead = WORKING & (set(step.outputs) | set(step.inputs)) - after
        result.append(tuple(sorted(dead)))
    return result[::-1]


def run_plain(steps: Sequence[Step], variables: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Run the steps in plain JAX: the same program without the engine. Returns every variable at the end."""
    state = dict(variables)
    for step in steps:
        out = step.function(*(state[name] for name in step.inputs))
        state.update(zip(step.outputs, out if isinstance(out, tuple) else (out,), strict=True))
    return state


def _norm(kind: Norm, index: int | None, name: str, source: str, target: str) -> Step:
    function = nonlinear.layernorm if kind == "layernorm" else nonlinear.rms
    return Step(kind, index, function, (source, f"{name}.eps"), (target,))


def _constant(rotation: Array) -> Rotation:
    # A tuple, not an array: a step's function is the key under which its compiled form is found again.
    return tuple(tuple(tuple(map(float, row)) for row in table) for table in rotation)


def _embed(one_hot: jax.Array, table: jax.Array, positions: jax.Array | None = None, *, past: int) -> jax.Array:
    x = one_hot @ table
    return x if positions is None else x + positions[past : past + one_hot.shape[0]]


def _enter(rows: jax.Array) -> jax.Array:
    return rows


def _last(x: jax.Array, *, rows: int) -> jax.Array:
    return x[-rows:]


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ weight


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ weight + bias


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * y


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


def _add3(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    return x + y + z


def _split(qkv: jax.Array, *, heads: int, kv_heads: int, head_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, edges = qkv.shape[0], (heads * head_size, (heads + kv_heads) * head_size)
    q, k, v = qkv[:, : edges[0]], qkv[:, edges[0] : edges[1]], qkv[:, edges[1] :]

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.transpose(x.reshape(rows, -1, head_size), (1, 0, 2))

    return by_head(q), by_head(k), by_head(v)


def _rotate(q: jax.Array, k: jax.Array, *, rotation: Rotation) -> tuple[jax.Array, jax.Array]:
    cosine, sine = (jnp.asarray(table, dtype=q.dtype) for table in rotation)
    half = cosine.shape[1]

    def turn(x: jax.Array) -> jax.Array:
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)

    return turn(q), turn(k)


def _temper(q: jax.Array, inverse: jax.Array, *, past: int) -> jax.Array:
    return q * inverse[:, past : past + q.shape[1], None]


def _keep(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return k, v


def _extend(
    old_k: jax.Array, old_v: jax.Array, k: jax.Array, v: jax.Array, *, past: int
) -> tuple[jax.Array, jax.Array]:
    return jnp.concatenate([old_k[:, :past], k], axis=1), jnp.concatenate([old_v[:, :past], v], axis=1)


def _by_query_head(x: jax.Array, group: int) -> jax.Array:
    return x if group == 1 else jnp.repeat(x, group, axis=0)


def _scores(q: jax.Array, k: jax.Array, *, group: int) -> jax.Array:
    return q @ jnp.swapaxes(_by_query_head(k, group), 1, 2)


def _values(e: jax.Array, v: jax.Array, *, group: int) -> jax.Array:
    return e @ _by_query_head(v, group)


def _normalise(o: jax.Array, reciprocal: jax.Array) -> jax.Array:
    return jnp.transpose(o * reciprocal, (1, 0, 2)).reshape(o.shape[1], -1)
