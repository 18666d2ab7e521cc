"""Where a model to fold comes from: a saved folder, or random weights of a named shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aero.config import SHAPES, ModelConfig, spec
from aero.eliminate.private_model import PrivateModel
from aero.errors import AeroError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from aero.model.decoder import Decoder


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
    if not Path(model).exists():
        raise AeroError(
            f"There is no model folder {model}, and no shape of that name; shapes are {', '.join(SHAPES)}, "
            "with a row behind a colon as in gpt2-tiny:SM+ScFuFFN."
        )
    from aero.model.load import load_config

    return load_config(model)


def folded(model: str, *, seed: int, text: NDArray[Any] | None = None) -> PrivateModel:
    """Load the folder ``model``, or draw random weights of a named shape from ``seed``, and fold.

    text: held-out token ids [N, T], on which the model's attention logits must stay within their bounds; None does not
        look.
    Random weights of a static norm start at the end of its blend. Raises AeroError for a folder that cannot be read and
    for logits beyond their bound.
    """
    decoder = _decoder(model, seed)
    if text is not None:
        from aero.eliminate.bounds import check_bounds

        check_bounds(decoder, text)
    from aero.eliminate.fold import fold

    return fold(decoder)


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
