"""The model inside the Transformers library: configuration, loss, generation, saving, and every broken folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.shapes import gpt, llama, scramble, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from aero.architecture import architecture
from aero.config import LayerConfig, ModelConfig
from aero.errors import AeroError
from aero.model import AeroConfig, AeroForCausalLM, load_pretrained, set_static_blend

SAVED: dict[str, ModelConfig] = {
    "gpt": gpt(),
    "llama": llama(),
    "untied gpt": gpt(tie_embeddings=False),
    "tied llama": llama(tie_embeddings=True),
    "static": architecture("static+bilinear", gpt()),
    "scaled and pruned": architecture("SM(t)+ScFuFFN_i1", gpt()),
    "global slope": gpt(layer=LayerConfig(feedforward="leaky"), slope_scope="global"),
    "global slope, untied": llama(layer=LayerConfig(feedforward="leaky"), slope_scope="global"),
    "weight norm": architecture("SM", gpt(), weight_norm=("ffn", "q")),
    "spectral norm": architecture("SM", gpt(), spectral_norm=("ffn",)),
}


def model(config: ModelConfig | None = None) -> AeroForCausalLM:
    torch.manual_seed(0)
    made = AeroForCausalLM(AeroConfig.of(config or gpt()))
    scramble(made)
    return made.eval()


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("loader", [load_pretrained, AutoModelForCausalLM.from_pretrained])
def test_saving_and_loading_changes_nothing(
    name: str, loader: Callable[[Path], AeroForCausalLM], tmp_path: Path
) -> None:
    config = SAVED[name]
    made = model(config)
    set_static_blend(made, 1.0)
    made.save_pretrained(tmp_path)
    read = loader(tmp_path)
    assert isinstance(read, AeroForCausalLM)
    assert read.config.model_config == config
    assert AutoConfig.from_pretrained(tmp_path).model_config == config
    given = tokens(config)
    assert torch.equal(made(given).logits, read(given).logits)
    assert read.decoder.tied() == made.decoder.tied()
    assert sum(parameter.numel() for parameter in read.parameters()) == sum(p.numel() for p in made.parameters())


def test_a_loaded_model_can_be_saved_again(tmp_path: Path) -> None:
    made = model(SAVED["global slope"])
    made.save_pretrained(tmp_path / "one")
    load_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_configuration_answers_the_librarys_questions() -> None:
    config = AeroConfig.of(llama(), eos_token_id=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 4)
    assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 6, 31)
    assert (config.max_position_embeddings, config.intermediate_size, config.eos_token_id) == (10, 40, 3)
    assert not config.tie_word_embeddings
    assert AeroConfig.of(gpt()).tie_word_embeddings
    assert AeroConfig.from_dict(config.to_dict()).model_config == llama()
    with pytest.raises(ValueError, match="unknown model settings"):
        AeroConfig(model=llama().to_dict() | {"depth": 3})


def test_loss_is_next_token_cross_entropy() -> None:
    made = model().double()
    given = tokens(gpt())
    labels = given.clone()
    labels[0, :4] = -100
    losses = []
    with torch.no_grad():
        out = made(given, labels=labels)
        for row in range(2):
            for position in range(9):
                if labels[row, position + 1] != -100:
                    shares = out.logits[row, position].softmax(-1)
                    losses.append(-math.log(shares[labels[row, position + 1]].item()))
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses))
    assert made(given).loss is None


def test_entropies_on_request() -> None:
    made = model(llama())
    given = tokens(llama())
    entropies = made(given, output_entropies=True).entropies
    assert [tuple(entropy.shape) for entropy in entropies] == [(2, 4, 10)] * 2
    assert made(given).entropies is None
    assert len(made(given, output_entropies=True, return_dict=False)) == 2


@pytest.mark.parametrize("name", ["gpt", "llama", "scaled and pruned"])
def test_generation_equals_one_token_at_a_time(name: str) -> None:
    config = SAVED[name]
    made = model(config).double()
    prompt = tokens(config, length=3)
    slow = prompt
    for _ in range(7):
        slow = torch.cat([slow, made(slow).logits[:, -1:].argmax(-1)], dim=1)
    for use_cache in (True, False):
        fast = made.generate(prompt, max_new_tokens=7, do_sample=False, use_cache=use_cache)
        assert torch.equal(fast, slow)
    cached = made(prompt, use_cache=True)
    assert cached.past_key_values.get_seq_length() == 3
    following = made(slow[:, 3:5], past_key_values=cached.past_key_values)
    torch.testing.assert_close(following.logits, made(slow[:, :5]).logits[:, 3:])


def test_padding_after_the_text_is_harmless_and_before_it_refused() -> None:
    made = model()
    given = tokens(gpt())
    mask = torch.ones_like(given)
    mask[0, 7:] = 0
    torch.testing.assert_close(made(given, attention_mask=mask).logits[0, :7], made(given[:1, :7]).logits[0])
    with pytest.raises(AeroError, match="right padding"):
        made(given, attention_mask=mask.flip(1))


def test_compiled_training_step_is_one_graph() -> None:
    made = model(architecture("static+bilinear", gpt())).train()
    given = tokens(gpt())
    compiled = torch.compile(made.decoder, backend="eager", fullgraph=True)
    expected = made.decoder(given).logits
    torch.testing.assert_close(compiled(given).logits, expected)


def saved(tmp_path: Path, config: ModelConfig | None = None) -> Path:
    model(config).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(AeroError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(AeroError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AeroError, match=r"no model\.safetensors"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"model_type": "bert"}', '{"model_type": "aero", "model": {"depth": 2}}']
)
def test_damaged_configuration(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(AeroError):
        load_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(keep: int, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AeroError, match="truncated or damaged"):
        load_pretrained(folder)


def test_garbage_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(AeroError, match="truncated or damaged"):
        load_pretrained(folder)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["ffn_width"] = 44
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AeroError, match="do not fit"):
        load_pretrained(folder)


@pytest.mark.parametrize("loader", [load_pretrained, AutoModelForCausalLM.from_pretrained])
def test_missing_and_surplus_tensors(loader: Callable[[Path], object], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(folder, lambda tensors: tensors.update(surplus=torch.ones(2)))
    with pytest.raises(AeroError, match=r"unknown 1 tensors \(surplus\)"):
        loader(folder)

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["surplus"], tensors["decoder.layers.0.attention.q.weight"]

    rewrite(folder, remove)
    with pytest.raises(AeroError, match=r"lacks 1 tensors \(decoder.layers.0.attention.q.weight\)"):
        loader(folder)


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(folder, lambda tensors: tensors["decoder.final_norm.bias"].fill_(float("nan")).sum())
    with pytest.raises(AeroError, match=r"decoder\.final_norm\.bias holds values that are not finite"):
        load_pretrained(folder)


def test_folders_of_other_families(tmp_path: Path) -> None:
    small = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=4, n_positions=10)),
        "neox": GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=40, **small)),
        "llama": LlamaForCausalLM(LlamaConfig(intermediate_size=40, **small)),
    }
    given = tokens(gpt())
    for name, source in models.items():
        source.eval().save_pretrained(tmp_path / name)
        read = load_pretrained(tmp_path / name)
        torch.testing.assert_close(read(given).logits, source(given).logits)

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]

    rewrite(tmp_path / "llama", remove)
    with pytest.raises(AeroError, match="lacks 1 tensors"):
        load_pretrained(tmp_path / "llama")
