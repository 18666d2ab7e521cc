"""Learning from a teacher: its logits, its residual stream and what its heads do, beside the text.

The teacher is a trained model, most often the original whose nonlinearities the student gives up. It is read in
evaluation mode on every micro-batch and is not part of what is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aero.errors import AeroError
from aero.model import AeroForCausalLM
from aero.train.loop import AeroTrainer
from aero.train.recipes import DistillSettings


class DistillTrainer(AeroTrainer):
    """``AeroTrainer`` with a teacher; the recipe's ``distill`` weighs what is learned from it.

    teacher: of the student's vocabulary and context; with ``hidden`` also of its layers and width, with ``attention``
        of its layers and heads. Raises AeroError otherwise.
    """

    def __init__(self, model: AeroForCausalLM, *rest: Any, teacher: AeroForCausalLM, **more: Any) -> None:
        super().__init__(model, *rest, **more)
        settings = self.recipe.distill
        if settings is None:
            raise AeroError(f"The recipe {self.recipe.name} does not say what to learn from a teacher.")
        self.settings: DistillSettings = settings
        alike = ["vocab_size", "context"]
        alike += ["depth", "width"] if settings.hidden else []
        alike += ["depth", "heads"] if settings.attention else []
        ours, theirs = self.recipe.model, teacher.config.model_config
        for name in alike:
            if getattr(ours, name) != getattr(theirs, name):
                raise AeroError(
                    f"The teacher does not fit: its {name} is {getattr(theirs, name)}, the student's "
                    f"{getattr(ours, name)}."
                )
        teacher.eval()  # type: ignore[no-untyped-call]
        frozen: nn.Module = teacher.requires_grad_(False)
        self.teacher = frozen.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The base class's loss, weighted, and what the teacher adds to it."""
        settings = self.settings.at(self.state.global_step, self.args.max_steps)
        asked = {
            **inputs,
            "output_hidden_states": bool(settings.hidden),
            "output_entropies": bool(settings.attention),
        }
        loss, student = super().compute_loss(model, asked, True, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.teacher(**{name: value for name, value in asked.items() if name != "labels"})
        # The model's loss is the cross-entropy and its penalties; those keep their weight.
        labels = inputs["labels"][:, 1:].flatten()
        text = functional.cross_entropy(student.logits[:, :-1].flatten(0, 1).float(), labels)
        total = loss + (settings.text - 1.0) * text + distance(student, teacher, settings)
        return (total, student) if return_outputs else total


def distance(student: Any, teacher: Any, settings: DistillSettings) -> Tensor:
    """How far the student's output is from the teacher's, weighted; a scalar.

    student, teacher: ``AeroOutput`` with logits [B, T, V] and what ``settings`` weighs of ``hidden_states`` and
        ``entropies``, one a layer.
    """
    temperature = settings.temperature
    ours = functional.log_softmax(student.logits.float() / temperature, dim=-1).flatten(0, 1)
    theirs = functional.log_softmax(teacher.logits.float() / temperature, dim=-1).flatten(0, 1)
    total = settings.logits * temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    if settings.hidden:
        pairs = list(zip(student.hidden_states, teacher.hidden_states, strict=True))
        parts = [(a.float() - b.float()).square().mean() / b.float().square().mean() for a, b in pairs]
        total = total + settings.hidden * torch.stack(parts).mean()
    if settings.attention:
        pairs = list(zip(student.entropies, teacher.entropies, strict=True))
        total = total + settings.attention * torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
    return total
