"""Loading a folder of weights, with every way in which it can be broken turned into one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from aero.config import ModelConfig
from aero.errors import AeroError
from aero.model.huggingface import AeroConfig, AeroForCausalLM
from aero.model.importers import FAMILIES, import_pretrained
from aero.shipped import located

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_pretrained(path: str | Path) -> AeroForCausalLM:
    """The model saved in the folder ``path``, in evaluation mode.

    Accepts what ``AeroForCausalLM.save_pretrained`` wrote, and checkpoints of GPT-2, GPT-NeoX and LLaMA, which are
    imported. Only safetensors are read: the older pickled format runs code.
    Raises AeroError for a folder that is missing, incomplete, damaged, of an unknown family, or that holds values which
    are not finite numbers.
    """
    folder = located(path)
    family = _family(folder)
    _check_weights(folder)
    try:
        with _no_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except AeroError as error:
        raise AeroError(f"{folder}: {error}") from None
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, OSError, SafetensorError):
        # The library's own message may be pages long or quote values; the cause is one of these.
        raise AeroError(
            f"{folder}: the weights do not fit config.json (wrong shapes or settings); restore both from the same run."
        ) from None
    model, info = loaded
    if family != AeroConfig.model_type:
        if info["missing_keys"]:
            raise AeroError(f"{folder}: the checkpoint lacks {len(info['missing_keys'])} tensors; copy it again.")
        model = import_pretrained(model)
    bad = next((name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())), None)
    if bad is not None:
        raise AeroError(
            f"{folder}: {bad} holds values that are not finite numbers; the training that wrote it diverged."
        )
    assert isinstance(model, AeroForCausalLM)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the library's progress bar, which a second's work does not need and a pipe shows as noise."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of the model saved in the folder ``path``, without its weights.

    Raises AeroError for a folder that is missing, incomplete or of an unknown family.
    """
    folder = located(path)
    family = _family(folder)
    _check_weights(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config.model_config if isinstance(config, AeroConfig) else FAMILIES[family].config(config)
    except AeroError as error:
        raise AeroError(f"{folder}: {error}") from None
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
        raise AeroError(f"{folder}/config.json does not describe a model; copy the checkpoint again.") from None


def _family(folder: Path) -> str:
    if not folder.is_dir():
        raise AeroError(f"{folder} is not a folder: name one that holds config.json and {WEIGHTS}.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AeroError(f"{folder} holds no config.json: it is not a saved model.") from None
    except (OSError, ValueError, RecursionError):
        raise AeroError(
            f"{folder}/config.json cannot be read as JSON; restore it from the run that wrote it."
        ) from None
    family = config.get("model_type") if isinstance(config, dict) else None
    known = [AeroConfig.model_type, *FAMILIES]
    if family not in known:
        raise AeroError(f"{folder}: models of type {family!r} cannot be read; known are {', '.join(known)}.")
    return str(family)


def _check_weights(folder: Path) -> None:
    """Open every weight file and read its table of contents, which states how long the file must be."""
    files = [folder / WEIGHTS]
    if not files[0].exists():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        except FileNotFoundError:
            raise AeroError(
                f"{folder} holds no {WEIGHTS}: its weights are missing or in a format that is not read."
            ) from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise AeroError(f"{folder}/{INDEX} is damaged; copy the checkpoint again.") from None
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError:
            raise AeroError(f"{file} is missing; copy the checkpoint again.") from None
        except (SafetensorError, OSError):
            raise AeroError(f"{file} is truncated or damaged; copy the checkpoint again.") from None
