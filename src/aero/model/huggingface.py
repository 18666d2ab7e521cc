"""The decoder in the Transformers library's clothes: configuration, causal language model, registration as "aero"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from aero.config import ModelConfig
from aero.errors import AeroError
from aero.model.concentrated import Concentrated, concentrated_rows
from aero.model.decoder import Decoder
from aero.model.logits import PENALTY_STRENGTH
from aero.model.norm import static_deviation, sync_static


class AeroConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A ModelConfig that the Transformers library can save and load.

    model: ``ModelConfig.to_dict()``; the one place where shape and choices are kept. The names that the library looks
        for (``hidden_size``, ``num_hidden_layers``, ...) are read from it.
    """

    model_type: ClassVar[str] = "aero"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    model: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        config = ModelConfig() if self.model is None else ModelConfig.from_dict(self.model)
        self.model = _plain(config.to_dict())
        self.tie_word_embeddings = config.tie_embeddings
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> AeroConfig:
        """The configuration that holds ``config``; ``kwargs`` are token ids and the library's own settings."""
        return cls(model=config.to_dict(), **kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The shape and choices."""
        assert self.model is not None
        return ModelConfig.from_dict(self.model)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.model_config.width

    @property
    def intermediate_size(self) -> int:
        """Hidden size of the feed-forward branch."""
        return self.model_config.ffn_width

    @property
    def num_hidden_layers(self) -> int:
        """L."""
        return self.model_config.depth

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.model_config.heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads."""
        return self.model_config.kv_heads

    @property
    def head_dim(self) -> int:
        """d_k."""
        return self.model_config.head_size

    @property
    def max_position_embeddings(self) -> int:
        """T."""
        return self.model_config.context


@dataclass
class AeroOutput(CausalLMOutputWithPast):
    """The library's output, and what else was asked for.

    entropies: every head's attention entropy, one [B, H, T] a layer, in nats.
    logit_penalty, largest_logits: as in ``DecoderOutput``.
    """

    entropies: tuple[Tensor, ...] | None = None
    logit_penalty: Tensor | None = None
    largest_logits: tuple[Tensor | None, ...] | None = None


class AeroForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """``Decoder`` with a loss, generation, saving and loading.

    logit_strength, deviation_strength: factors in the loss on ``DecoderOutput.logit_penalty`` and on the static norms'
        ``static_deviation``. They act in training only. A schedule (``aero.eliminate.anneal``) sets them.
    concentrated: the share of rows that join a batch in training for the sake of the deviation (``concentrated_rows``).
        What is returned is of the batch alone. A schedule sets it too.
    """

    config_class = AeroConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: AeroConfig) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.model_config)
        self.logit_strength = PENALTY_STRENGTH
        self.deviation_strength = 0.0
        self.concentrated = 0.0
        # Which names share a tensor depends on the choices (tied head, global slope), so it is found on the instance.
        self._tied_weights_keys = {f"decoder.{name}": f"decoder.{first}" for name, first in self.decoder.tied().items()}
        self._bounds_logits = any(layer.bounds_logits for layer in self.decoder.config.layers)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_entropies: bool = False,
        output_largest_logits: bool = False,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> AeroOutput | tuple[Any, ...]:
        """Logits, and the mean next-token cross-entropy in nats if ``labels`` are given.

        In training the loss of a model that bounds its attention logits also holds ``logit_strength`` times their
        penalty, and that of one with static norms ``deviation_strength`` times their deviation; in evaluation it never
        does.

        input_ids [B, T] or inputs_embeds [B, T, d]; labels [B, T], -100 where no loss is wanted, not shifted.
        attention_mask [B, T]: padding may only follow the text, where causal attention never sees it.
        output_entropies: also return every head's attention entropy per query.
        output_largest_logits: also return the largest attention logit of every head that bounds its own.
        output_hidden_states: also return the residual stream after every layer, [B, T, d] each.
        Raises AeroError for padding before or inside the text and for texts longer than the context.
        """
        _require_right_padding(attention_mask)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        penalised = labels is not None and self.training and self._bounds_logits
        joined = labels is not None and self.training and self.concentrated > 0 and self.deviation_strength > 0
        beside: Concentrated | None = None
        if joined and input_ids is not None:
            beside = concentrated_rows(input_ids, self.config.model_config.vocab_size, self.concentrated)
        out = self.decoder(
            input_ids,
            embeddings=inputs_embeds,
            cache=past_key_values,
            with_entropy=output_entropies,
            with_logits=output_largest_logits or penalised,
            with_states=bool(output_hidden_states),
            keep=0 if labels is not None else logits_to_keep,
            concentrated=beside,
        )
        loss: Tensor | None = None
        if labels is not None:
            logits = out.logits[:, :-1].flatten(0, 1)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            loss = functional.cross_entropy(wide, labels[:, 1:].flatten().to(wide.device))
            if penalised and out.logit_penalty is not None:
                loss = loss + self.logit_strength * out.logit_penalty.to(loss.dtype)
            if self.training and self.deviation_strength:
                deviation = static_deviation(self.decoder)
                if deviation is not None:
                    loss = loss + self.deviation_strength * deviation.to(loss.dtype)
        result = AeroOutput(
            loss=loss,
            logits=out.logits,
            past_key_values=past_key_values,
            hidden_states=out.states,
            entropies=out.entropies,
            logit_penalty=out.logit_penalty,
            largest_logits=out.largest_logits,
        )
        return result.to_tuple() if return_dict is False else result

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The library's loader; a checkpoint that lacks a tensor raises AeroError instead of leaving it random."""
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem, keys in (("lacks", info["missing_keys"]), ("holds unknown", info["unexpected_keys"])):
            if keys:
                first = min(str(key) for key in keys)
                raise AeroError(
                    f"The checkpoint {problem} {len(keys)} tensors ({first}): it does not fit its config.json."
                )
        sync_static(model)
        return (model, info) if wanted else model

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:  # noqa: ARG002
        """Name -> first name of every shared parameter, whatever the library's own switch for a tied head says."""
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        assert isinstance(value, nn.Embedding)
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        """The vocabulary projection."""
        return self.decoder.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the vocabulary projection."""
        assert isinstance(new_embeddings, nn.Linear)
        self.decoder.head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder draws its own weights, and a loaded model never has a missing one."""


def _require_right_padding(mask: Tensor | None) -> None:
    # Reading the mask's values would break a compiled graph, and what is compiled is training on packed text.
    if mask is None or torch.compiler.is_compiling():
        return
    if mask.ndim != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise AeroError("Padding may only follow the text: use right padding, and generate from prompts of one length.")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what the same value looks like after a round trip through JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


AutoConfig.register(AeroConfig.model_type, AeroConfig)
AutoModelForCausalLM.register(AeroConfig, AeroForCausalLM)
