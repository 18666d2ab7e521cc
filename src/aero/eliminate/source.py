"""Where a model to fold comes from: a saved folder, or random weights of a named shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aero.architecture import spec
from aero.config import SHAPES, ModelConfig
from aero.eliminate.private_model import PrivateModel
from aero.errors import AeroError
from aero.shipped import AERO, BASELINE, located

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aero.model.decoder import Decoder


RECORD = "training.json"
"""What a training run leaves beside the weights."""


def is_spec(model: str) -> bool:
    """Whether ``model`` names a shape (``gpt2-small`` or ``gpt2-small:SM+ScFuFFN``) and not a folder."""
    return model.partition(":")[0] in SHAPES and not Path(model).exists()


def describe(model: str) -> ModelConfig:
    """The configuration of a folder or a named shape, without its weights. Raises AeroError if there is none."""
    if is_spec(model):
        try:
            return spec(model)
        except ValueError as error:
            raise AeroError(f"{error}.") from None
    if not located(model).exists():
        raise AeroError(
            f"There is no model folder {model}, and no shape of that name; shapes are {', '.join(SHAPES)}, "
            f"with a row behind a colon as in gpt2-tiny:SM+ScFuFFN, and the models that come with AERO are {AERO} and "
            f"{BASELINE}."
        )
    from aero.model.load import load_config

    return load_config(model)


def folded(model: str, *, seed: int, text: NDArray[Any] | None = None) -> PrivateModel:
    """Load the folder ``model``, or draw random weights of a named shape from ``seed``, and fold.

    text: held-out token ids [N, T], on which the model's attention logits must stay within their bounds; None takes the
        word of the training, where the folder holds its record.
    Random weights of a static norm start at the end of its blend. Raises AeroError for a folder that cannot be read and
    for logits beyond their bound.
    """
    decoder = _decoder(model, seed)
    if text is not None:
        from aero.eliminate.bounds import check_bounds

        check_bounds(decoder, text)
    elif not is_spec(model):
        _check_record(located(model), decoder.config)
    from aero.eliminate.fold import fold

    return fold(decoder)


def _check_record(folder: Path, config: ModelConfig) -> None:
    """Refuse a model whose own training measured logits beyond a bound: privately it would err in silence."""
    try:
        tops = json.loads((folder / RECORD).read_text(encoding="utf-8"))["largest_logits"] or []
        # A number that is none counts as the largest.
        reached = [max(math.inf if value != value else value for value in top or [0.0]) for top in tops]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for index, (top, layer) in enumerate(zip(reached, config.layers, strict=False)):
        if layer.bounds_logits and not top <= layer.logit_bound:
            raise AeroError(
                f"On held-out text the training of {folder.name} measured attention logits up to {top:.3g} in layer "
                f"{index}, beyond the bound of {layer.logit_bound:g} that private inference relies on; train it "
                "further, or give the layer a larger bound."
            )


def _decoder(model: str, seed: int) -> Decoder:
    if not is_spec(model):
        from aero.model.load import load_pretrained

        return load_pretrained(model).decoder
    import torch

    from aero.model.decoder import Decoder
    from aero.model.norm import set_static_blend

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(describe(model))
    set_static_blend(decoder, 1.0)
    return decoder
