"""Names and configs both ways, against transformers' own models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import VOCAB_SIZE, small_decoder, text_ids

from lit_actreg.config import QuantConfig
from lit_actreg.huggingface import from_huggingface, huggingface_config, load_huggingface, model_config, to_huggingface
from lit_actreg.model import Decoder

transformers = pytest.importorskip("transformers")

FLOAT = QuantConfig(activations="none")


def their_config(style, tie):
    config = huggingface_config(small_decoder(style, FLOAT, tie).config, VOCAB_SIZE)
    return transformers.AutoConfig.for_model(**config)


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_checkpoint_of_transformers_gives_its_logits(style, tie, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config(style, tie)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    config, vocab_size, state = load_huggingface(tmp_path)
    assert (config.style, config.tie_embeddings, vocab_size) == (style, tie, VOCAB_SIZE)
    ours = Decoder(config, FLOAT, vocab_size)
    result = ours.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all("input_quantizer" in key for key in result.missing_keys)
    ids = text_ids(4)
    with torch.no_grad():
        # float32 in another order of operations; the claim is 1e-4
        torch.testing.assert_close(ours.logits(ours(ids)[0]), theirs(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("tie", [True, False])
def test_names_and_config_round_trip(style, tie, tmp_path):
    model = small_decoder(style, FLOAT, tie)
    state = to_huggingface(model.config, model.state_dict())
    back = from_huggingface(model.config, state)
    for name, tensor in model.state_dict().items():
        if "input_quantizer" not in name:
            assert torch.equal(back[name], tensor), name
    config, vocab_size = model_config(huggingface_config(model.config, VOCAB_SIZE), tmp_path)
    assert (config, vocab_size) == (model.config, VOCAB_SIZE)


def saved(folder, style="llama", **changes):
    model = small_decoder(style, FLOAT)
    save_file(to_huggingface(model.config, model.state_dict()), folder / "model.safetensors")
    config = huggingface_config(model.config, VOCAB_SIZE) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sharded_checkpoints_and_bfloat16(tmp_path):
    folder = saved(tmp_path)
    state = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    names = sorted(state)
    save_file({name: state[name] for name in names[:5]}, folder / "model-1.safetensors")
    save_file({name: state[name] for name in names[5:]}, folder / "model-2.safetensors")
    (folder / "model.safetensors").unlink()
    _, _, loaded = load_huggingface(folder)
    assert loaded["blocks.0.qkv.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model_type": "gpt2"}, 'model_type "gpt2" is not "gpt_neox" or "llama"'),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear' is not supported"),
        ({"head_dim": 128}, "head_dim 128 is not supported, only 6"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"quantization_config": {}}, "it is already quantized"),
        ({"num_hidden_layers": 3}, "it lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "it has unexpected 9 tensors"),
        ({"vocab_size": 300}, r"embed_tokens.weight is \[256, 36\], not \[300, 36\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, line, tmp_path):
    with pytest.raises(ValueError, match=line) as error:
        load_huggingface(saved(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_parallel_residual_and_partial_rotary_are_refused(tmp_path):
    for key, value in (("use_parallel_residual", True), ("rotary_pct", 0.25)):
        with pytest.raises(ValueError, match=f"{key} {value} is not supported"):
            load_huggingface(saved(tmp_path, "neox", **{key: value}))


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_huggingface(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it has no config"):
        load_huggingface(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="convert its weights to safetensors"):
        load_huggingface(tmp_path)
