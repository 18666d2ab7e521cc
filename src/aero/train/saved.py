"""In which precision a trained model is kept: its matrices may be rounded to bfloat16, which halves the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from aero.model import AeroForCausalLM
    from aero.train.recipes import Precision


@torch.no_grad()
def round_weights(model: AeroForCausalLM, precision: Precision) -> None:
    """Give the matrices of ``model`` the values that ``precision`` can hold, in place; their type stays float32.

    Vectors (biases, norms, constants of static norms, slopes) keep every bit: they are few.
    """
    if precision == "bf16":
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(parameter.bfloat16())


def save_model(model: AeroForCausalLM, folder: Path, precision: Precision) -> None:
    """``save_pretrained`` with matrices in ``precision``; what is read from the folder is computed in float32."""
    matrices = {name for name, value in model.named_parameters(remove_duplicate=False) if value.ndim >= 2}
    state = model.state_dict()
    if precision == "bf16":
        # A matrix that two names share stays one, or it would be written twice.
        rounded = {value.data_ptr(): value.bfloat16() for name, value in state.items() if name in matrices}
        state = {name: rounded[value.data_ptr()] if name in matrices else value for name, value in state.items()}
    model.save_pretrained(folder, state_dict=state)
