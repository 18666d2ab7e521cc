"""Head entropies of any causal Transformers model that takes its attention from the library's registry.

``watch(model)`` switches the model to an attention function that calls ``attention_with_entropy``, so that nothing
materialises the attention matrix; what heads did in the latest forward pass is then there to read or to penalise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

from torch import Tensor, nn

from aero.entropy.attention import attention_with_entropy
from aero.errors import AeroError

NAME = "aero_entropy"
"""Under which attention and mask function stand in the Transformers library's registries."""

_WATCH = "_aero_entropy_watch"


class EntropyWatch(Sequence[Tensor]):
    """The entropies of the latest forward pass: one [B, H, T] a layer, in nats, part of the graph that made them.

    Made by ``watch``. As a context manager it ends with the block; else ``close`` ends it. Entropies at padding that
    follows the text are 0, and ``padded`` says that there is some. With a key/value cache the T queries are the new
    tokens'.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.padded = False
        self._entropies: list[Tensor] = []
        self._former: str | None = None
        self._hooks = [model.register_forward_pre_hook(self._before, with_kwargs=True)]
        if _is_ours(model):
            self._hooks.append(model.register_forward_hook(self._after, with_kwargs=True))
        self._enabled = False
        self.enabled = True

    @property
    def enabled(self) -> bool:
        """Whether forward passes leave entropies; while False, the model computes attention as it did before."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value == self._enabled:
            return
        self._enabled = value
        if _is_ours(self.model):
            return
        if value:
            self._former = self._switch(NAME)
            for layer in _attentions(self.model):
                layer.__dict__[_WATCH] = self
        else:
            assert self._former is not None
            self._switch(self._former)
            for layer in _attentions(self.model):
                layer.__dict__.pop(_WATCH, None)

    def record(self, layer: int, entropy: Tensor, text: Tensor | None) -> None:
        """Keep the entropy [B, H, T] of ``layer``; ``text`` [B, T] is False at padding, or None without any.

        A layer that is computed a second time, as gradient checkpointing does, keeps the first.
        """
        if text is not None:
            self.padded = True
            entropy = entropy.masked_fill(~text[:, None], 0.0)
        if layer == len(self._entropies):
            self._entropies.append(entropy)

    def close(self) -> None:
        """Give the model its former attention back. The entropies stay."""
        self.enabled = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> EntropyWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._entropies)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._entropies[index]

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        self._entropies, self.padded = [], False
        if not self._enabled:
            return None
        if _is_ours(self.model):
            return args, {**kwargs, "output_entropies": True}
        return None

    def _after(self, _model: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._enabled:
            return
        if getattr(output, "entropies", None) is None:
            raise ValueError("a watched model has to return its output as an object: leave return_dict as it is")
        mask = kwargs.get("attention_mask")
        text = None if mask is None or bool(mask.all()) else mask.bool()[:, -output.entropies[0].shape[-1] :]
        for layer, entropy in enumerate(output.entropies):
            self.record(layer, entropy, text)

    def _switch(self, implementation: str) -> str:
        """Set the model's attention; returns what it was."""
        model: Any = self.model
        former: str = model.config._attn_implementation
        model.set_attn_implementation(implementation)
        return former


def watch(model: nn.Module) -> EntropyWatch:
    """Watch the attention heads of ``model``, a causal language model of the Transformers library or AERO's own.

        with watch(model) as entropies:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss = loss + regularizer(entropies)

    The outputs stay the same, and the entropies can be differentiated. Nothing but the attention function changes, and
    it is the former one again when the block or ``close`` ends the watch.
    Raises AeroError for a model whose attention cannot be exchanged or is watched already; and at the forward pass for
    attention other than causal softmax, for masks that hide more than causality does (padding before or inside the
    text, packed sequences, sliding windows, a static cache) and for dropout of attention weights, which no fused
    attention with entropy has.
    """
    if _is_ours(model):
        return EntropyWatch(model)
    exchangeable = getattr(model, "_can_set_attn_implementation", None)
    kind = type(model).__name__
    if exchangeable is None or not exchangeable():
        raise AeroError(
            f"{kind} cannot be watched: it does not take its attention from the Transformers library's registry."
        )
    layers = _attentions(model)
    if not layers:
        raise AeroError(f"{kind} has no self-attention layers to watch.")
    if any(_WATCH in layer.__dict__ for layer in layers):
        raise AeroError(f"This {kind} is watched already: end that watch first.")
    _register()
    return EntropyWatch(model)


def entropy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention function in the library's registry; shapes and meaning are the registry's.

    query [B, H, Tq, D], key and value [B, Hkv, Tk, D] -> [B, Tq, H, D] and no weights. ``attention_mask`` is what
    ``entropy_mask`` made of the model's: None, or [B, Tq], True where there is text.
    """
    kind = type(module).__name__
    if dropout:
        raise AeroError(f"{kind} drops attention weights at random: a watch in training needs attention dropout 0.")
    if not (getattr(module, "is_causal", False) and rest.get("is_causal") in (None, True)):
        raise AeroError(f"{kind} is not causal self-attention: it cannot be watched.")
    odd = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if odd:
        raise AeroError(f"{kind} is more than softmax attention ({', '.join(odd)}): it cannot be watched.")
    out, entropy = attention_with_entropy(query, key, value, scale=scaling, causal=True)
    module.__dict__[_WATCH].record(module.layer_idx, entropy, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def entropy_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """The mask function in the library's registry: None where the mask is causality alone, [B, Tq] with padding behind.

    Raises AeroError for every other mask.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function or not allow_is_causal_skip:
        raise AeroError(
            "A watch needs plain causal attention: this model's mask hides more (a window or packed texts)."
        )
    if kv_offset or int(q_offset) + q_length != kv_length:
        raise AeroError("A watch needs a key/value cache that holds the text alone: use no static or sliding cache.")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise AeroError("A watch allows padding after the text only: pad on the right, or watch texts of one length.")
    return mask[:, -q_length:]


def _register() -> None:
    """Put both functions into the library's registries; importing this file does not load the library."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, entropy_attention)
    AttentionMaskInterface.register(NAME, entropy_mask)


def _is_ours(model: nn.Module) -> bool:
    """Whether ``model`` is ``AeroForCausalLM``, which returns entropies when it is asked to."""
    return bool(getattr(getattr(model, "config", None), "model_type", None) == "aero")


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The attention layers: what has an index and is marked as causal or not."""
    found = [child for child in model.modules() if hasattr(child, "layer_idx") and hasattr(child, "is_causal")]
    return [layer for layer in found if not getattr(layer, "is_cross_attention", False)]
