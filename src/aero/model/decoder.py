"""The decoder, built from a ModelConfig alone: GPT-2's family and that of GPT-NeoX and LLaMA from the same parts."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from aero.config import LayerConfig, ModelConfig
from aero.errors import AeroError
from aero.model.attention import Attention, Heads
from aero.model.cache import KeyValueCache
from aero.model.concentrated import Concentrated
from aero.model.feedforward import make_feedforward
from aero.model.init import constrain, initialise, start_alpha
from aero.model.norm import at_edge, make_norm
from aero.model.rotary import rotation


class DecoderOutput(NamedTuple):
    """What one forward pass gives.

    logits: [B, T, V], or the last ``keep`` positions of it.
    entropies: one [B, H, T] a layer, in nats, or None if they were not asked for.
    stream: [B, T, d], the residual stream after the final norm.
    logit_penalty: scalar; the sum over layers of what ``logit_excess`` charges for attention logits near their bound,
        or None if it was not asked for or no layer bounds them.
    largest_logits: one [H] a layer, the largest |attention logit| of each head, None in layers that bound none; or None
        if they were not asked for.
    states: one [B, T, d] a layer, the residual stream after it, or None if they were not asked for.
    """

    logits: Tensor
    entropies: tuple[Tensor, ...] | None
    stream: Tensor
    logit_penalty: Tensor | None = None
    largest_logits: tuple[Tensor | None, ...] | None = None
    states: tuple[Tensor, ...] | None = None


class Layer(nn.Module):
    """One pre-norm layer (arXiv 2501.03489, equations 1 and 8).

    Sequential:  s = x + attention(norm(x));  x_out = beta * s + feedforward(norm(s)) / alpha
    Parallel:    x_out = beta * (x + attention(norm(x))) + feedforward(norm(x)) / alpha
    Without the skip around attention "x +" is not there: SAS and SAS-P of arXiv 2311.01906. Shaped layers have gain
    times the branch in the place of its quotient by alpha, as that paper's code does: 1 / alpha of an alpha that starts
    at 10 would take a hundred times as many steps to grow.

    alpha, beta, gain: scalar parameters, or None for 1. A dropped branch has neither a norm nor an alpha or a gain; its
        beta stays.
    """

    alpha: nn.Parameter | None
    beta: nn.Parameter | None
    gain: nn.Parameter | None

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        layer = config.layers[index]
        self.config: LayerConfig = layer
        self.parallel = config.parallel
        self.dropped = layer.feedforward == "dropped"
        self.attention_norm = make_norm(layer.attention_norm, config.width, config.norm_eps)
        self.attention = Attention(config, layer, index)
        kind = "none" if self.dropped else layer.feedforward_norm
        self.feedforward_norm = make_norm(kind, config.width, config.norm_eps)
        self.feedforward = make_feedforward(config, layer)
        start = float(start_alpha(config)) if layer.scaled and not self.dropped else None
        self._scalar("alpha", None if layer.shaped else start)
        self._scalar("gain", 1 / start if start is not None and layer.shaped else None)
        self._scalar("beta", float(config.beta_init) if layer.scaled else None)

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
        """x [B, T, d] -> the stream after the layer [B, T, d], and what was asked for of its heads.

        keys: as in ``Attention.forward``.
        """
        rows = 0 if keys is None else len(keys)
        x, read = at_edge(self.attention_norm, x, rows)
        attended, heads = self.attention(
            read,
            start=start,
            rotation=rotation,
            cache=cache,
            with_entropy=with_entropy,
            with_logits=with_logits,
            keys=keys,
        )
        stream = x + attended if self.config.attention_skip else attended
        branch: Tensor | None = None
        if not self.dropped:
            moved, read = at_edge(self.feedforward_norm, x if self.parallel else stream, rows)
            stream = stream if self.parallel else moved
            branch = self.feedforward(read)
            branch = branch if self.alpha is None else branch / self.alpha
            branch = branch if self.gain is None else self.gain * branch
        out = stream if self.beta is None else self.beta * stream
        return out if branch is None else out + branch, heads

    def _scalar(self, name: str, start: float | None) -> None:
        self.register_parameter(name, None if start is None else nn.Parameter(torch.tensor(start)))


class Decoder(nn.Module):
    """Tokens in, logits out.

    embedding: [V, d]; positions: [T, d], or None with rotary positions; layers: one ``Layer`` each; final_norm;
    head: a linear without bias, whose weight is the embedding's own if tied.
    Weights are drawn from torch's generator: seed it for the same model twice.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.depth))
        self.final_norm = make_norm(config.final_norm, config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if config.slope_scope == "global":
            self._share_slope()
        initialise(self)
        constrain(self)

    def blocks(self) -> list[Layer]:
        """The layers, typed."""
        return [cast(Layer, layer) for layer in self.layers]

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        cache: KeyValueCache | None = None,
        start: int | None = None,
        with_entropy: bool = False,
        with_logits: bool = False,
        with_states: bool = False,
        keep: int = 0,
        concentrated: Concentrated | None = None,
    ) -> DecoderOutput:
        """Logits of the next token at every position.

        tokens [B, T] integers, or embeddings [B, T, d] in their place (positions are added and the configuration's
            ``embedding_scale`` applied either way).
        cache: keys and values of the tokens before these; extended in place.
        start: position of the first token; None means the length of the cache, or 0 without one.
        with_entropy: also return every head's attention entropy per query.
        with_logits: also measure the attention logits of the layers that bound them.
        with_states: also return the residual stream after every layer.
        keep: compute logits of the last ``keep`` positions only; 0 means all.
        concentrated: rows that go before those of ``tokens`` and whose heads look at one token each; without a cache.
            In training every static norm puts them at its edge (``StaticNorm.at_edge``); what is returned is of
            ``tokens`` alone.
        Raises AeroError if the text is longer than the model's context, ValueError for neither or both inputs.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens or embeddings")
        before = 0
        if concentrated is not None:
            if tokens is None or cache is not None:
                raise ValueError("concentrated rows join tokens, without a cache")
            tokens, before = torch.cat([concentrated.tokens, tokens]), len(concentrated.tokens)
        x: Tensor = self.embedding(tokens) if embeddings is None else embeddings
        length = x.shape[1]
        first = start if start is not None else cache.get_seq_length() if cache is not None else 0
        if first + length > self.config.context:
            limit = self.config.context
            raise AeroError(
                f"The text is {first + length} tokens long and this model reads at most {limit}; shorten it."
            )
        turn: tuple[Tensor, Tensor] | None = None
        if self.positions is not None:
            x = x + self.positions.weight[first : first + length]
        else:
            turn = rotation(first, length, size=self.config.rotary_size, base=self.config.rotary_base, like=x)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        heads: list[Heads] = []
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, seen = layer(
                x,
                start=first,
                rotation=turn,
                cache=cache,
                with_entropy=with_entropy,
                with_logits=with_logits,
                keys=None if concentrated is None else concentrated.keys(index, self.config.heads),
            )
            heads.append(seen)
            if with_states:
                states.append(x[before:])
        stream = at_edge(self.final_norm, x, before)[1][before:]
        logits = self.head(stream[:, -keep:] if keep else stream)
        penalties = [each.penalty for each in heads if each.penalty is not None]
        return DecoderOutput(
            logits=logits,
            entropies=tuple(each.entropy[before:] for each in heads if each.entropy is not None)
            if with_entropy
            else None,
            stream=stream,
            logit_penalty=torch.stack(penalties).sum() if penalties else None,
            largest_logits=tuple(each.largest for each in heads) if with_logits else None,
            states=tuple(states) if with_states else None,
        )

    def tied(self) -> dict[str, str]:
        """Names of the parameters that are another one under a second name, each with the first name."""
        first: dict[int, str] = {}
        second: dict[str, str] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                second[name] = first[id(parameter)]
            else:
                first[id(parameter)] = name
        return second

    def _share_slope(self) -> None:
        slopes = [block.feedforward for block in self.blocks() if block.feedforward.slope is not None]
        for branch in slopes[1:]:
            branch.slope = slopes[0].slope
