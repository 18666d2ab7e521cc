"""The private program: a folded model's forward pass as a list of steps, each a pure JAX function of named variables.

A step is the unit of the account: one operator of one layer. Steps of the same kind and shape are compiled once and run
under other variable names, so a deep model compiles as fast as a shallow one. The same list runs in plain JAX
(``run_plain``) and on the secure engine.

Several prompts of one length can go through together (``batch``): every step then does for all what it does for one, in
the same rounds.

Variables: ``x`` is the residual stream [rows, width]; ``k.<layer>`` and ``v.<layer>`` are the secret key/value cache
[kv_heads, keys, head_size], which outlives a pass, keys only where a head has logits, and with kernel attention
``kk.<layer>``, the keys' squared norms [kv_heads, keys, 1], is part of it; weights carry the names of
``PrivateConfig.shapes``, in the layout of ``layout.Layout``. In a batch rows and heads lie prompt behind prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from aero.config import GATED, GeluForm
from aero.eliminate.private_model import Array, Norm, PrivateConfig
from aero.private import attention, blocks, nonlinear, softmax
from aero.private.attention import Rotation
from aero.private.blocks import Block, Plan
from aero.private.exponent import exponential_for, kernel_exponential
from aero.private.layout import Layout
from aero.private.protocols import ALONE, Together
from aero.private.softmax import Triangle


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
    together: which heads share a product (``Protocol.together``).
    largest_product: how many multiplications a product with a weight has at most (``Protocol.largest_product``).
    """

    def __init__(
        self,
        config: PrivateConfig,
        rotation: Array | None,
        *,
        one_hot: bool,
        gelu: GeluForm = "polynomial",
        together: Together = ALONE,
        largest_product: int | None = None,
    ) -> None:
        self.config = config
        self.rotation = rotation
        self.one_hot = one_hot
        self.together = together
        self.most = largest_product
        self.layout = Layout(config)
        self.activations = nonlinear.activations(gelu)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weights that the steps use, in order of first use."""
        absent = set() if self.one_hot else {"embedding", "positions"}
        return tuple(name for name in self.layout.shapes() if name not in absent)

    def input_shape(self, rows: int, batch: int = 1) -> tuple[int, int]:
        """Shape of the client's input ``tokens`` for that many positions of each prompt."""
        return (batch * rows, self.config.vocab_size if self.one_hot else self.config.width)

    @property
    def cache(self) -> tuple[str, ...]:
        """Names of the key/value cache's variables."""
        return tuple(name for index in range(self.config.depth) for name in self._cache(index))

    def cache_shape(self, name: str, keys: int) -> tuple[int, int, int]:
        """Shape of the cache's variable ``name`` when it holds that many positions."""
        kind, index = name.split(".")
        heads = self.config.value_heads(int(index)) if kind == "v" else self.config.active_heads(int(index))[1]
        return (heads, keys, 1 if kind == "kk" else self.config.head_size)

    def _cache(self, index: int) -> tuple[str, ...]:
        if not self.config.active_heads(index)[0]:
            return (f"v.{index}",)
        squares = (f"kk.{index}",) if self.config.layers[index].attention == "kernel" else ()
        return (f"k.{index}", f"v.{index}", *squares)

    def block_variables(self, block: Block) -> list[str]:
        """Names of the variables of a block of the cache."""
        layers = range(self.config.depth)
        names = [name for index in layers for name in (block.keys(index), block.values(index))]
        return names + [block.squares(index) for index in layers if f"kk.{index}" in self._cache(index)]

    def forward(
        self, past: int, rows: int, logit_rows: int = 1, plan: Plan | None = None, *, batch: int = 1
    ) -> list[Step]:
        """The pass over positions past ... past + rows - 1: input ``tokens``, output ``logits`` [batch logit_rows, V].

        past = 0 is the prefill; past > 0 reads the first ``past`` positions of the key/value cache, which may hold
        more, and extends them. Only the last ``logit_rows`` positions' logits are computed: nothing else chooses a
        token. With a ``plan`` the cache lies in masked blocks. batch: how many prompts, all of one length.
        """
        return list(self._forward(past, rows, logit_rows, plan, batch))

    def _forward(self, past: int, rows: int, logit_rows: int, plan: Plan | None, batch: int) -> Iterator[Step]:
        config = self.config
        if self.one_hot:
            inputs = ["tokens", "embedding"] + (["positions"] if config.learned_positions else [])
            yield Step("embedding", None, partial(_embed, past=past, batch=batch), tuple(inputs), ("x",))
        else:
            yield Step("embedding", None, _enter, ("tokens",), ("x",))
        for index in range(config.depth):
            last = index == config.depth - 1
            yield from self._attention(index, past, rows, logit_rows if last else rows, plan, batch)
            yield from self._branch(index)
        read = "x"
        if config.final_norm != "none":
            yield _norm(config.final_norm, None, "final_norm", "x", "h")
            read = "h"
        bias = ("head.bias",) if "head" in config.biased else ()
        yield Step("vocabulary", None, partial(_vocabulary, most=self.most), (read, "head", *bias), ("logits",))

    def _attention(
        self, index: int, past: int, rows: int, queries: int, plan: Plan | None, batch: int
    ) -> Iterator[Step]:
        """queries: how many of the rows, the last ones, anybody reads after this layer's keys and values."""
        config, layer, prefix = self.config, self.config.layers[index], f"layers.{index}"
        heads, kv_heads = config.active_heads(index)
        read = "x"
        # Without a skip attention takes the stream's place, unless a parallel branch has yet to read that.
        target = "a" if config.parallel or layer.attention_skip else "x"
        if layer.attention_norm != "none":
            read = "n"
            yield _norm(layer.attention_norm, index, f"{prefix}.attention_norm", "x", read)
        yield self._linear("projection", index, f"{prefix}.qkv", read, "qkv")
        if queries < rows:
            names = ("x", "n") if read == "n" and config.parallel else ("x",)
            yield Step("last position", index, partial(_last, rows=queries, batch=batch), names, names)
        cache = self._cache(index)
        new = tuple(name.split(".")[0] for name in cache)
        split = partial(
            attention.split,
            heads=heads,
            kv_heads=kv_heads,
            value_heads=config.value_heads(index),
            own_heads=config.own_heads(index),
            head_size=config.head_size,
            queries=queries,
            batch=batch,
        )
        kept = ("w",) if layer.shaped else ()
        yield Step("projection", index, split, ("qkv",), ("q", "k", "v", *kept) if heads else ("v",))
        if self.rotation is not None and heads:
            turn = partial(attention.rotate, rotation=_constant(self.rotation[:, past : past + rows]))
            yield Step("rotary", index, turn, ("q", "k"), ("q", "k"))
        if layer.temperature:
            temper = partial(attention.temper, first=past + rows - queries)
            yield Step("temperature", index, temper, ("q", f"{prefix}.inverse_temperature"), ("q",))
        if layer.attention == "kernel" and plan is None:
            yield self._squares(index, past, queries, batch)
        if plan is not None:
            yield from _in_blocks(index, cache, new, plan)
        elif past:
            yield Step("cache", index, partial(attention.extend, past=past), (*cache, *new), cache)
        else:
            yield Step("cache", index, attention.keep, new, cache)
        group = config.heads // config.kv_heads
        averaged: tuple[str, ...] = ()
        if layer.uniform_heads or layer.shaped:
            average = partial(attention.averages, first=kv_heads, queries=queries, group=group, batch=batch)
            averaged, read_values = ("u",), [f"v.{index}"]
            if plan is not None:
                average = partial(attention.block_averages, kv_heads=batch * config.value_heads(index), average=average)
                read_values = [block.values(index) for block in plan.read]
            operator = "shaped attention" if layer.shaped else "uniform heads"
            yield Step(operator, index, average, tuple(read_values), averaged)
        if heads:
            yield from self._weigh(index, queries, past, rows, plan, batch)
            if plan is None:
                mix = partial(
                    attention.values, kv_heads=kv_heads, batch=batch, **self.together.arguments(queries, batch)
                )
                yield Step("values", index, mix, ("e", f"v.{index}"), ("o",))
            else:
                mix = partial(attention.block_values, kv_heads=kv_heads, head_size=config.head_size, batch=batch)
                yield Step("values", index, mix, ("e", *(block.values(index) for block in plan.read)), ("o",))
            merge, whole = (attention.shaped, target) if layer.shaped else (attention.normalise, "a")
            yield Step("softmax normalise", index, partial(merge, batch=batch), ("o", "r", *averaged, *kept), (whole,))
        else:
            yield Step("uniform heads", index, partial(attention.side_by_side, batch=batch), averaged, ("a",))
        if not layer.shaped:
            yield self._linear("projection", index, f"{prefix}.out", "a", target)
        if layer.attention_skip and not config.parallel:
            yield Step("residual", index, _add, ("x", "a"), ("x",))

    def _squares(self, index: int, past: int, queries: int, batch: int) -> Step:
        """Squared norms of the queries and of the new keys; where one opening serves both, the scores as well."""
        if self._at_once(past):
            together = self.together.arguments(queries, batch)["together"]
            product = partial(attention.distances_at_once, together=together)
            return Step("scores", index, product, ("q", "k"), ("s", "kk"))
        return Step("squared norms", index, attention.squares, ("q", "k"), ("qq", "kk"))

    def _at_once(self, past: int) -> bool:
        """Whether a pass without blocks remembers masks: all its keys are new, and heads share what was opened."""
        return self.together.crossed and past == 0

    def _scores(self, index: int, past: int, queries: int, plan: Plan | None, batch: int) -> Iterator[Step]:
        kernel = self.config.layers[index].attention == "kernel"
        if plan is not None:
            read = tuple(block.keys(index) for block in plan.read)
            if kernel:
                read += tuple(block.squares(index) for block in plan.read)
            in_blocks = attention.block_distances if kernel else attention.block_scores
            yield Step("scores", index, in_blocks, ("q", *read), ("s",))
        elif not kernel or not self._at_once(past):
            squares = ("qq", f"kk.{index}") if kernel else ()
            product = partial(
                attention.distances if kernel else attention.scores, **self.together.arguments(queries, batch)
            )
            yield Step("scores", index, product, ("q", f"k.{index}", *squares), ("s",))

    def _weigh(self, index: int, queries: int, past: int, rows: int, plan: Plan | None, batch: int) -> Iterator[Step]:
        """From queries and keys to unnormalised attention weights and one over each row's sum."""
        layer, triangle = self.config.layers[index], Triangle(queries, past + rows)
        yield from self._scores(index, past, queries, plan, batch)
        if layer.attention == "kernel":
            assert layer.logit_bound is not None
            kernel = kernel_exponential(layer.logit_bound)
            raised = partial(softmax.bounded_weights, triangle=triangle, form=kernel)
            yield Step("kernel", index, raised, ("s",), ("e",))
            inverse = partial(softmax.kernel_reciprocal, form=kernel)
            yield Step("softmax reciprocal", index, inverse, ("e",), ("r",))
            return
        if layer.attention == "power":
            assert layer.power is not None
            assert layer.logit_bound is not None
            raised = partial(softmax.power_weights, triangle=triangle, power=layer.power, bound=layer.logit_bound)
            yield Step("power", index, raised, ("s", f"layers.{index}.power_offset"), ("e",))
            ends = softmax.power_ends(layer.logit_bound, layer.power)
        elif layer.attention == "bounded" and (form := exponential_for(layer.logit_bound)) is not None:
            raised = partial(softmax.bounded_weights, triangle=triangle, form=form)
            yield Step("softmax exponent", index, raised, ("s",), ("e",))
            ends = softmax.bounded_ends(form)
        else:
            yield Step("softmax maximum", index, partial(softmax.packed_maximum, triangle=triangle), ("s",), ("m",))
            raised = partial(softmax.attention_weights, triangle=triangle)
            yield Step("softmax exponent", index, raised, ("s", "m"), ("e",))
            yield Step("softmax reciprocal", index, softmax.row_reciprocal, ("e",), ("r",))
            return
        inverse = partial(softmax.bounded_reciprocal, ends=ends)
        yield Step("softmax reciprocal", index, inverse, ("e",), ("r",))

    def _branch(self, index: int) -> Iterator[Step]:
        config, layer, prefix = self.config, self.config.layers[index], f"layers.{index}"
        kind = layer.feedforward
        skip = ("x",) if layer.attention_skip or not config.parallel else ()
        if kind == "dropped":
            if config.parallel:
                yield _sum(index, *skip, "a")
            return
        read = "x"
        if layer.feedforward_norm != "none":
            read = "n"
        # In a parallel layer both norms are of the same stream: what is affine in them has been folded away.
        if read == "n" and not (config.parallel and layer.attention_norm == layer.feedforward_norm):
            yield _norm(layer.feedforward_norm, index, f"{prefix}.feedforward_norm", "x", read)
        if kind == "matrix":
            yield self._linear("feed-forward", index, f"{prefix}.ffn", read, "x")
            return
        if kind == "linear":
            yield self._linear("feed-forward", index, f"{prefix}.ffn", read, "f")
        else:
            yield self._linear("feed-forward", index, f"{prefix}.ffn_in", read, "f")
            if kind in GATED:
                yield Step("feed-forward", index, _halves, ("f",), ("f", "g"))
                if kind == "silu_gated":
                    yield Step("silu", index, nonlinear.silu, ("g",), ("g",))
                yield Step("gate product", index, _multiply, ("f", "g"), ("f",))
            elif kind == "leaky":
                yield Step("leaky", index, nonlinear.leaky, ("f", f"{prefix}.slope"), ("f",))
            else:
                yield Step(kind.removesuffix("_tanh"), index, self.activations[kind], ("f",), ("f",))
            yield self._linear("feed-forward", index, f"{prefix}.ffn_out", "f", "f")
        yield _sum(index, *skip, *(("a",) if config.parallel else ()), "f")

    def _linear(self, operator: str, index: int | None, name: str, source: str, target: str) -> Step:
        if name in self.config.biased:
            return Step(operator, index, partial(_affine, most=self.most), (source, name, f"{name}.bias"), (target,))
        return Step(operator, index, partial(_product, most=self.most), (source, name), (target,))


WORKING = frozenset(
    {"tokens", "x", "h", "n", "qkv", "q", "k", "v", "qq", "kk", "s", "m", "e", "r", "o", "u", "w", "a", "f", "g"}
)
"""Variables that live within one pass. The rest stay: weights, the key/value cache, ``logits``."""


def is_double(name: str) -> bool:
    """Whether a variable has twice the fraction bits (``ring``): squared norms, which are only added to products."""
    return name.split(".")[0] in ("qq", "kk")


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


def _in_blocks(index: int, cache: tuple[str, ...], new: tuple[str, ...], plan: Plan) -> Iterator[Step]:
    """Bring the cache and the pass's own keys and values into the plan's blocks."""
    squared = len(cache) == 3
    if len(cache) == 1:
        cache, new = (cache[0], cache[0]), (new[0], new[0])

    def names(block: Block) -> tuple[str, ...]:
        return (block.keys(index), block.values(index), block.squares(index))[: len(cache)]

    if plan.base is not None:
        yield Step("cache", index, blocks.masked, cache, names(plan.base))
    if plan.cut is not None:
        old, left = plan.cut
        yield Step("cache", index, partial(blocks.first_positions, size=left.size), names(old), names(left))
    if plan.merged is not None:
        members, one = plan.merged
        parts = tuple(name for each in zip(*map(names, members), strict=True) for name in each)
        yield Step("cache", index, partial(blocks.together, count=len(members)), parts, names(one))
    yield Step("cache", index, blocks.masked_and_squared if squared else blocks.masked, new[:2], names(plan.new))


def _norm(kind: Norm, index: int | None, name: str, source: str, target: str) -> Step:
    function = nonlinear.layernorm if kind == "layernorm" else nonlinear.rms
    return Step(kind, index, function, (source, f"{name}.eps"), (target,))


def _sum(index: int, *terms: str) -> Step:
    """The layer's output as the sum of these."""
    return Step("residual", index, (_enter, _add, _add3)[len(terms) - 1], terms, ("x",))


def _constant(rotation: Array) -> Rotation:
    # A tuple, not an array: a step's function is the key under which its compiled form is found again.
    return tuple(tuple(tuple(map(float, row)) for row in table) for table in rotation)


def _embed(
    one_hot: jax.Array, table: jax.Array, positions: jax.Array | None = None, *, past: int, batch: int
) -> jax.Array:
    x = one_hot @ table
    if positions is None:
        return x
    entering = positions[past : past + one_hot.shape[0] // batch]
    return x + (entering if batch == 1 else jnp.concatenate([entering] * batch))


def _enter(rows: jax.Array) -> jax.Array:
    return rows


def _last(*each: jax.Array, rows: int, batch: int) -> tuple[jax.Array, ...]:
    return tuple(attention.last_rows(x, rows=rows, batch=batch) for x in each)


def _product(x: jax.Array, weight: jax.Array, *, most: int | None) -> jax.Array:
    parts = [x @ weight[:, first:end] for first, end in _parts(weight.shape[1], x.size, most)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array, *, most: int | None) -> jax.Array:
    return _product(x, weight, most=most) + bias


def _vocabulary(x: jax.Array, head: jax.Array, bias: jax.Array | None = None, *, most: int | None) -> jax.Array:
    # A wide matrix from the left: the engine is two to eight times as fast as with a few rows from the left.
    parts = [head[first:end] @ x.T for first, end in _parts(head.shape[0], x.size, most)]
    logits: jax.Array = (parts[0] if len(parts) == 1 else jnp.concatenate(parts)).T
    return logits if bias is None else logits + bias


def _parts(columns: int, each: int, most: int | None) -> list[tuple[int, int]]:
    """Even parts of a weight's columns, first and last + 1, so that none takes more than ``most`` multiplications.

    each: multiplications of one column, the smallest part there is.
    """
    count = 1 if most is None else -(-columns // max(1, most // each))
    edges = [columns * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * y


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y


def _add3(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    return x + y + z


def _halves(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    middle = both.shape[1] // 2
    return both[:, :middle], both[:, middle:]
