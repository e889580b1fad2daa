"""Names and configurations of our decoder in Hugging Face terms, both ways.

Block style "neox" is GPT-NeoX with ``use_parallel_residual: false``, "llama" is Llama. Two of our linears are fused,
and only the order of their rows differs:

    ours                       GPT-NeoX                                   Llama
    qkv: rows of q, k, v       query_key_value: per head its q, k, v      q_proj, k_proj, v_proj
    mlp_in                     dense_h_to_4h                              gate_proj, up_proj (gate's rows first)

Whatever has one row an output channel (weights, codes, scales, zero points, biases) is split and joined alike.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_actreg.config import SITES, ModelConfig, QuantConfig, Site
from lit_actreg.model import Decoder

# Prefix of block i is "<prefix>.<i>."; the rest are names below it, or whole names.
BLOCK_PREFIX = {"neox": "gpt_neox.layers", "llama": "model.layers"}
LINEARS: dict[str, dict[Site, tuple[str, ...]]] = {
    "neox": {
        "qkv": ("attention.query_key_value",),
        "attn_proj": ("attention.dense",),
        "mlp_in": ("mlp.dense_h_to_4h",),
        "mlp_proj": ("mlp.dense_4h_to_h",),
    },
    "llama": {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_proj": ("self_attn.o_proj",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_proj": ("mlp.down_proj",),
    },
}
NORMS = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
OUTSIDE_BLOCKS = {
    "neox": {"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    "llama": {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}


def split_rows(config: ModelConfig, site: Site, rows: Tensor) -> dict[str, Tensor]:
    """One of our linears' tensors [N, ...] as the tensors of the Hugging Face linears that it is there."""
    names = LINEARS[config.style][site]
    if config.style == "neox":
        if site == "qkv":  # [3, H, E, ...] → [H, 3, E, ...]
            rows = rows.unflatten(0, (3, config.num_heads, config.head_width)).transpose(0, 1).flatten(0, 2)
        return {names[0]: rows.contiguous()}
    sizes = [rows.shape[0] // len(names)] * len(names)
    if site == "qkv":
        sizes = [heads * config.head_width for heads in (config.num_heads, config.kv_heads, config.kv_heads)]
    return {name: part.contiguous() for name, part in zip(names, rows.split(sizes), strict=True)}


def join_rows(config: ModelConfig, site: Site, parts: Mapping[str, Tensor]) -> Tensor:
    """Inverse of :func:`split_rows`."""
    rows = torch.cat([parts[name] for name in LINEARS[config.style][site]])
    if config.style == "neox" and site == "qkv":
        rows = rows.unflatten(0, (config.num_heads, 3, config.head_width)).transpose(0, 1).flatten(0, 2)
    return rows


def outside_names(config: ModelConfig) -> dict[str, str]:
    """Our names of all tensors that are not linears inside blocks → Hugging Face names; a tied head is left out."""
    parts = ("weight", "bias") if config.style == "neox" else ("weight",)
    outside = OUTSIDE_BLOCKS[config.style]
    names = {"embedding.weight": f"{outside['embedding']}.weight"}
    names |= {f"norm.{part}": f"{outside['norm']}.{part}" for part in parts}
    if not config.tie_embeddings:
        names["head.weight"] = f"{outside['head']}.weight"
    for i in range(config.num_layers):
        for ours, theirs in NORMS.items():
            prefix = f"{BLOCK_PREFIX[config.style]}.{i}.{theirs}"
            names |= {f"blocks.{i}.{ours}.{part}": f"{prefix}.{part}" for part in parts}
    return names


def to_huggingface(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of our float decoder → that of the Hugging Face model (clips have no place there)."""
    result = {theirs: state[ours] for ours, theirs in outside_names(config).items()}
    for i in range(config.num_layers):
        for site in SITES:
            for part in ("weight", "bias") if config.style == "neox" else ("weight",):
                split = split_rows(config, site, state[f"blocks.{i}.{site}.{part}"])
                result |= {f"{BLOCK_PREFIX[config.style]}.{i}.{name}.{part}": rows for name, rows in split.items()}
    return result


def from_huggingface(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`to_huggingface`; the clips are absent from the result. A missing tensor is a ``KeyError``."""
    result = {ours: state[theirs] for ours, theirs in outside_names(config).items()}
    if config.tie_embeddings:
        result["head.weight"] = result["embedding.weight"]
    for i in range(config.num_layers):
        for site in SITES:
            for part in ("weight", "bias") if config.style == "neox" else ("weight",):
                prefix = f"{BLOCK_PREFIX[config.style]}.{i}"
                rows = {name: state[f"{prefix}.{name}.{part}"] for name in LINEARS[config.style][site]}
                result[f"blocks.{i}.{site}.{part}"] = join_rows(config, site, rows)
    return result


def huggingface_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """``config.json`` of the decoder (the older rotary keys: transformers 4.57 and 5 both read them)."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.style == "neox":
        return common | {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "layer_norm_eps": config.norm_eps,
            "use_parallel_residual": False,
            "attention_bias": True,
            "rotary_pct": 1.0,
            "rotary_emb_base": config.rope_theta,
        }
    return common | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
    }


def model_config(theirs: Mapping[str, Any], source: Path) -> tuple[ModelConfig, int]:
    """Our configuration and the vocabulary size of a ``config.json``; refuses what our decoder does not compute."""
    style = {"gpt_neox": "neox", "llama": "llama"}.get(theirs.get("model_type", ""))
    if style is None:
        found = theirs.get("model_type")
        raise ValueError(f'{source}: model_type "{found}" is not "gpt_neox" or "llama": choose a model of these two')
    for key in SHAPE_KEYS:
        if not isinstance(theirs.get(key), int):
            raise ValueError(f"{source}: config.json has no number {key}, but {theirs.get(key)!r}: download it again")
    rope = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or rope
    wanted: dict[str, tuple[Any, Any]] = {
        "rope type": (scaling.get("rope_type", scaling.get("type", "default")), "default")  # "type" in older files
    }
    heads = theirs["num_attention_heads"]
    if style == "neox":
        wanted["use_parallel_residual"] = (theirs.get("use_parallel_residual", True), False)
        wanted["rotary_pct"] = (rope.get("partial_rotary_factor", theirs.get("rotary_pct", 0.25)), 1.0)
        wanted["attention_bias"] = (theirs.get("attention_bias", True), True)
        wanted["hidden_act"] = (theirs.get("hidden_act", "gelu"), "gelu")
        theta = rope.get("rope_theta", theirs.get("rotary_emb_base", 10000.0))
        kv_heads, eps = None, theirs.get("layer_norm_eps", 1e-5)
    else:
        wanted["attention_bias"] = (theirs.get("attention_bias", False), False)
        wanted["mlp_bias"] = (theirs.get("mlp_bias", False), False)
        wanted["hidden_act"] = (theirs.get("hidden_act", "silu"), "silu")
        wanted["head_dim"] = (theirs.get("head_dim") or theirs["hidden_size"] // heads, theirs["hidden_size"] // heads)
        theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
        kv_heads, eps = theirs.get("num_key_value_heads"), theirs.get("rms_norm_eps", 1e-6)
    for key, (found, supported) in wanted.items():
        if found != supported:
            raise ValueError(f"{source}: {key} {found!r} is not supported, only {supported!r}: choose another model")
    config = ModelConfig(
        style=style,  # type: ignore[arg-type]
        num_layers=theirs["num_hidden_layers"],
        width=theirs["hidden_size"],
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        mlp_width=theirs["intermediate_size"],
        context=theirs["max_position_embeddings"],
        rope_theta=float(theta),
        norm_eps=eps,
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        init_std=theirs.get("initializer_range", 0.02),
    )
    return config, theirs["vocab_size"]


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a local Hugging Face folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: name a local Hugging Face checkpoint")
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        last = [file for file in (path / "last.ckpt", path / "checkpoints/last.ckpt") if file.exists()]
        what = last[0] if last else "a local Hugging Face checkpoint"
        raise FileNotFoundError(f"{path}: it has no config.json: name {what}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}/config.json is not JSON ({error}): download it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}/config.json is not an object with keys: download it again")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files. Pickled weights are not read: they can run code."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: it has no *.safetensors file: convert its weights to safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): write or download it again") from None
    return state


def check_tensors(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], described_by: str = "config.json"
) -> None:
    """Refuses missing, unexpected and misshapen tensors, and codes that are no integers, with one line.

    ``expected`` may live on the meta device; ``described_by`` names what it was made from.
    """
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(f"{path}: it {problem} {len(names)} tensors ({shown}): it does not fit its {described_by}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, not {list(tensor.shape)}"
            raise ValueError(f"{path}: {name} is {shapes}: it does not fit its {described_by}")
        if found[name].dtype != tensor.dtype and not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {found[name].dtype}, not {tensor.dtype}: write it again")


def load_huggingface(path: Path) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """Configuration, vocabulary size and float32 state dict (without clips) of an unquantized local checkpoint.

    Load it with ``Decoder(config, quant, vocab_size).load_state_dict(state, strict=False)``.
    """
    theirs = read_config(path)
    if "quantization_config" in theirs:
        raise ValueError(f"{path}: it is already quantized: name the checkpoint that it was made from")
    config, vocab_size = model_config(theirs, path)
    found = {
        name: tensor.float()
        for name, tensor in read_tensors(path).items()
        # Buffers that old checkpoints carry, and the copy of a tied head
        if not name.endswith(("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"))
        and not (config.tie_embeddings and name in ("lm_head.weight", "embed_out.weight"))
    }
    if config.style == "neox" and "lm_head.weight" in found:  # as transformers 5 names it
        found["embed_out.weight"] = found.pop("lm_head.weight")
    expected = to_huggingface(config, _meta_state(config, vocab_size))
    check_tensors(path, found, expected)
    return config, vocab_size, from_huggingface(config, found)


def _meta_state(config: ModelConfig, vocab_size: int) -> dict[str, Tensor]:

    with torch.device("meta"):
        return dict(Decoder(config, QuantConfig(activations="none"), vocab_size).state_dict())
