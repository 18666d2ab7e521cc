"""Causal attention with separate projections, grouped queries, rotary positions and a learnable temperature.

A layer's heads are softmax heads, whose logits training may hold within a bound, power heads or kernel heads; some of
them may be uniform, causal averages that have no queries and keys. Or all of them are shaped: alpha I + beta A -
gamma C in the place of A, the causal average C included, and no output projection (arXiv 2311.01906).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.config import LayerConfig, ModelConfig
from aero.model.cache import KeyValueCache
from aero.model.concentrated import at_keys
from aero.model.kernel import kernel_attention
from aero.model.logits import CHARGED_SAMPLE, logit_excess
from aero.model.power import power_attention
from aero.model.rotary import rotate


class Heads(NamedTuple):
    """What the heads of one layer did in one pass, as far as it was asked for.

    entropy: [B, H, T] in nats.
    penalty, largest: as ``logit_excess`` returns them, largest [H] with 0 for uniform heads; None in layers that bound
        no logits. In training of ``Attention.charged_rows`` alone.
    """

    entropy: Tensor | None = None
    penalty: Tensor | None = None
    largest: Tensor | None = None


class Attention(nn.Module):
    """Softmax(q k^T / (t sqrt(d_k))) v, or a power or a kernel in the exponential's place, projected.

    q, k, v, o: the four linears; H query heads and H_kv key/value heads of d_k channels, query head h reads
        key/value head h // (H / H_kv). q and k hold the heads that are not uniform, in order; None if all are. v is
        None where heads read their own channels as values, o in shaped layers.
    log_temperature: [active heads, T] or None; ``temperature`` is its exponential, one per head and query position
        (arXiv 2501.03489, section 4). The logarithm keeps it positive: started at 1e-2 and trained at a learning
        rate of 1e-3, a plain parameter would reach zero within ten steps.
    power_offset: [active heads], c of power attention where it is learned, or None.
    gains: [3, H]; alpha, beta and gamma of a shaped layer, or None. With queries that start at 0 and gains at 1, A is C
        and every head starts as the identity.
    active, uniform: numbers of the heads with logits and of those that average.
    share: while power attention is annealed from softmax, the power's share of the output, a scalar in [0, 1), else
        None. A schedule sets it (``anneal_power``); no checkpoint holds it.
    """

    log_temperature: nn.Parameter | None
    power_offset: nn.Parameter | None
    gains: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: LayerConfig, index: int) -> None:
        super().__init__()
        self.config = layer
        self.index = index
        self.heads = config.heads
        self.kv_heads = config.kv_heads
        self.head_size = config.head_size
        self.width = config.width
        self.uniform = layer.uniform_heads
        self.active = tuple(head for head in range(self.heads) if head not in self.uniform)
        self.group = self.heads // self.kv_heads
        self.active_kv = tuple(head // self.group for head in self.active[:: self.group])
        self.uniform_kv = tuple(head // self.group for head in self.uniform[:: self.group])
        queries, keys = len(self.active) * self.head_size, len(self.active_kv) * self.head_size
        values, merged = self.kv_heads * self.head_size, self.heads * self.head_size
        self.q = nn.Linear(config.width, queries, bias=config.attention_bias) if self.active else None
        self.k = nn.Linear(config.width, keys, bias=config.attention_bias) if self.active else None
        self.v = nn.Linear(config.width, values, bias=config.attention_bias) if layer.value_projection else None
        self.o = None if layer.shaped else nn.Linear(merged, config.width, bias=config.output_bias)
        start = torch.full((len(self.active), config.context), math.log(config.temperature_init))
        tempered = layer.temperature and bool(self.active)
        self.register_parameter("log_temperature", nn.Parameter(start) if tempered else None)
        self.powers = layer.attention == "power" and bool(self.active)
        offset = nn.Parameter(torch.full((len(self.active),), float(layer.power)))
        learned = self.powers and layer.power_offset is None
        self.register_parameter("power_offset", offset if learned else None)
        self.register_parameter("gains", nn.Parameter(torch.ones(3, self.heads)) if layer.shaped else None)
        self.share: Tensor | None = None

    @property
    def temperature(self) -> Tensor | None:
        """t, [active heads, T], positive; None where the layer has none."""
        return None if self.log_temperature is None else self.log_temperature.exp()

    def anneal_power(self, share: float) -> None:
        """Give ``share`` of the output to power attention and the rest to softmax of the same logits; 1 ends it.

        Nothing in layers without power attention. Raises ValueError outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"the share of power attention lies in [0, 1], not {share}")
        if not self.powers or self.q is None:
            return
        if share == 1.0:
            self.share = None
        elif self.share is None:
            self.share = torch.full((), share, device=self.q.weight.device)
        else:
            self.share.fill_(share)

    def forward(
        self,
        x: Tensor,
        *,
        start: int,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        with_entropy: bool,
        with_logits: bool,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Heads]:
        """x [B, T, d], from position ``start`` on -> output [B, T, d], and what was asked for of the heads.

        keys: positions [n, H, T] at which the heads of the first n rows look and nowhere else (``Concentrated``);
            uniform heads average all the same. None for no such rows.
        """
        batch, length, _ = x.shape
        v = new = self._by_head(x if self.v is None else self.v(x))
        if self.q is None or self.k is None:
            # A cache counts its tokens by their keys, so that a layer without any leaves it one number a token.
            v = v if cache is None else cache.update(v[:, :1, :, :1], v, self.index)[1]
            y, heads = self._averaged(v, length, with_entropy)
        else:
            q, k = self._queries_and_keys(x, start, rotation)
            if cache is not None:
                k, v = cache.update(k, v, self.index)
            measured = None
            if with_logits and self.config.bounds_logits:
                beside = 0 if keys is None else len(keys)
                text = x[beside:]
                charged = self.charged_rows(text) if self.training else text
                own = charged is text
                measured = (q[beside:], k[beside:]) if own else self._queries_and_keys(charged, start, rotation)
            if self.uniform:
                keys = None if keys is None else _take(keys, self.active)
                averaged, plain = self._averaged(_take(v, self.uniform_kv), length, with_entropy)
                attended, heads = self._attend(q, k, _take(v, self.active_kv), with_entropy, measured, keys)
                y = self._merge(attended, averaged)
                if heads.entropy is not None and plain.entropy is not None:
                    heads = heads._replace(entropy=self._merge(heads.entropy, plain.entropy.to(heads.entropy.dtype)))
                if heads.largest is not None:
                    none = heads.largest.new_zeros(1, len(self.uniform))
                    heads = heads._replace(largest=self._merge(heads.largest[None], none)[0])
            else:
                y, heads = self._attend(q, k, v, with_entropy, measured, keys)
        if self.gains is not None:
            alpha, beta, gamma = self.gains.to(y.dtype)[:, :, None, None]
            y = alpha * new + beta * y - gamma * causal_average(v, length)
        merged = y.transpose(1, 2).reshape(batch, length, self.heads * self.head_size)
        return merged if self.o is None else self.o(merged), heads

    def _queries_and_keys(self, x: Tensor, start: int, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Of x [B, T, d], from position ``start`` on: [B, active heads, T, d_k] and [B, ..., T, d_k]."""
        assert self.q is not None
        assert self.k is not None
        q, k = self._by_head(self.q(x)), self._by_head(self.k(x))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        temperature = self.temperature
        if temperature is not None:
            q = q / temperature[:, start : start + x.shape[1], None].to(q.dtype)
        return q, k

    def charged_rows(self, x: Tensor) -> Tensor:
        """What of x [B, T, d] training charges the logits of: of a narrow bound all; of a wide one some rows, detached.

        The charge of a wide bound then moves the matrices of queries and keys and nothing before them. One that reaches
        the stream pulls at the token whose key is the largest logit of many queries with the slopes of all of them, in
        every head; tokens that have strayed then take longer to come back. A narrow bound needs the stream's help to be
        held (docs/stability.md has both).
        """
        return x if self.config.attention == "bounded" else x[: -(-len(x) // CHARGED_SAMPLE)].detach()

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_size).transpose(1, 2)

    def _merge(self, active: Tensor, uniform: Tensor) -> Tensor:
        """Heads in their own order, [B, H, ...], from the active and from the uniform ones."""
        parts, done = [], {True: 0, False: 0}
        for averages, run in groupby(range(self.heads), key=lambda head: head in self.uniform):
            source, first = uniform if averages else active, done[averages]
            done[averages] = first + len(list(run))
            parts.append(source[:, first : done[averages]])
        return torch.cat(parts, dim=1)

    def _averaged(self, v: Tensor, queries: int, with_entropy: bool) -> tuple[Tensor, Heads]:
        """Causal averages of v [B, uniform key/value heads, Tk, d_k] for the last positions, by query head."""
        y = causal_average(v, queries).repeat_interleave(self.group, dim=1)
        if not with_entropy:
            return y, Heads()
        keys = v.shape[2]
        like = torch.promote_types(v.dtype, torch.float32)
        seen = torch.arange(keys - queries + 1, keys + 1, device=v.device, dtype=like)
        return y, Heads(entropy=seen.log().expand(*y.shape[:2], queries))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        with_entropy: bool,
        measured: tuple[Tensor, Tensor] | None,
        concentrated: Tensor | None,
    ) -> tuple[Tensor, Heads]:
        """Causal attention of q [B, active heads, Tq, d_k], the last Tq positions, over k, v [B, ..., Tk, d_k].

        measured: queries and keys whose logits are, or None.
        concentrated: [n, active heads, T], the keys of the first n rows, or None.
        """
        layer, scale = self.config, self.head_size**-0.5
        penalty = largest = entropy = None
        offset: Tensor | None = self.power_offset
        if self.powers and layer.power_offset is not None:
            offset = torch.full((len(self.active),), layer.power_offset, device=q.device)
        if measured is not None:
            kernel = layer.attention == "kernel"
            some, keys, factor = (*measured, scale) if kernel else (measured[0] * scale, measured[1], None)
            penalty, largest = logit_excess(some, keys, offset=offset, start=layer.charged_from, kernel=factor)
        if layer.attention == "kernel":
            y, entropy = kernel_attention(q, k, v, scale=scale, with_entropy=with_entropy)
        elif offset is not None:
            y, entropy = power_attention(q * scale, k, v, offset=offset, power=layer.power, with_entropy=with_entropy)
            if self.share is not None:
                share = self.share.to(y.dtype)
                y = (1 - share) * _softmax_attention(q, k, v) + share * y
        elif with_entropy:
            # Imported here so that a model which never asks for entropies does not load the kernels behind them.
            from aero.entropy.attention import attention_with_entropy

            y, entropy = attention_with_entropy(q, k, v, scale=scale, causal=True)
        else:
            y = _softmax_attention(q, k, v)
        if concentrated is not None:
            y = torch.cat([at_keys(v, concentrated).to(y.dtype), y[len(concentrated) :]])
        return y, Heads(entropy, penalty, largest)


def causal_average(v: Tensor, queries: int) -> Tensor:
    """Means of v [B, H, Tk, D] over the positions up to each of the last ``queries``: [B, H, queries, D]."""
    keys = v.shape[2]
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    sums = wide[:, :, keys - queries :].cumsum(2)
    if keys > queries:
        sums = sums + wide[:, :, : keys - queries].sum(2, keepdim=True)
    seen = torch.arange(keys - queries + 1, keys + 1, device=v.device, dtype=wide.dtype)
    return (sums / seen[:, None]).to(v.dtype)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2]
    mask: Tensor | None = None
    if 1 < queries < keys:
        # The built-in causal mask aligns the first query with the first key; here the last two meet.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=queries == keys, enable_gqa=q.shape[1] != k.shape[1]
    )


def _take(x: Tensor, heads: Sequence[int]) -> Tensor:
    """The heads [B, ...] of these rising numbers. Slices, not an index tensor, which would be built at every pass."""
    return torch.cat([x[:, first:stop] for first, stop in _runs(heads)], dim=1)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of every run of consecutive numbers."""
    for _, run in groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0]):
        members = [number for _, number in run]
        yield members[0], members[-1] + 1
