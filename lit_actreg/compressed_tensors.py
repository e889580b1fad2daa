"""Quantized linears in compressed-tensors' form: names, dtypes, packing and config.json's "quantization_config".

Weights are stored in one of two formats, Ŵ = (q − z) · s in both:

- "pack-quantized" (symmetric 4 or 8 bits): ``weight_packed`` int32 [N, ⌈K·b/32⌉], code − code_min in b bits, lowest
  first, with ``weight_shape`` int64 [2]. Stock readers fail on its asymmetric form.
- "int-quantized" (all others): ``weight`` int8 [N, K], with ``weight_zero_point`` int8 [N, G] if asymmetric.

Both have ``weight_scale`` float32 [N, G]. Inputs: "static" stores ``input_scale`` float32 [1] and
``input_zero_point`` int8 [1]; "token" stores nothing (its strategy is ``TOKEN``, or ``GROUP`` for groups of a token's
columns); "none" has no ``input_activations`` in its group and so is a weights-only layer, whoever loads it.

Both strategies are our dynamic grids, but for one corner: a token whose range is below 15e-8 (4 bits) has scale 1e-8
here and its own there. Both give values below 1e-7 of a normal input's.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lit_actreg_kernels.grid import code_range
from torch import Tensor

from lit_actreg.config import SITES, ModelConfig, QuantConfig, Site
from lit_actreg.contracts import QuantizedWeight
from lit_actreg.huggingface import BLOCK_PREFIX, LINEARS, join_rows, split_rows
from lit_actreg.quant.quantized_linear import QuantizedLinear

WeightFormat = Literal["auto", "int-quantized", "pack-quantized", "gptq_v2"]


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K] of 4 or 8 bits → int32 [N, ⌈K·bits/32⌉], first code in the lowest bits, rows zero-padded."""
    offset = 1 << (bits - 1)  # in two's complement, adding it is turning the sign bit
    unsigned = (codes.view(torch.uint8) ^ offset) & (2 * offset - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (32 // bits))).contiguous()
    if bits == 4:  # the two bytes of an int16 are two codes, the first below the second
        pairs = unsigned.view(torch.int16)
        unsigned = (pairs | (pairs >> 4)).to(torch.uint8)
    return unsigned.view(torch.int32)


def unpack_int32(packed: Tensor, bits: int, num_columns: int) -> Tensor:
    """Inverse of :func:`pack_int32`: int8 [N, K]."""
    unsigned = (packed.to(torch.int64)[..., None] >> (torch.arange(32 // bits) * bits)) & ((1 << bits) - 1)
    return (unsigned.flatten(1)[:, :num_columns] + code_range(bits)[0]).to(torch.int8)


def choose_format(bits: int, symmetric: bool, wanted: WeightFormat = "auto") -> str:
    """The format that stock readers load for such weights; refuses a wish that they cannot load."""
    can_pack = symmetric and bits in (4, 8)
    if wanted == "pack-quantized" and not can_pack:
        kind = "symmetric" if symmetric else "asymmetric"
        raise ValueError(
            f'format "pack-quantized" holds symmetric weights of 4 or 8 bits, not {kind} ones of {bits}: choose "auto"'
        )
    return ("pack-quantized" if can_pack else "int-quantized") if wanted == "auto" else wanted


def quantization_config(
    config: ModelConfig, quant: QuantConfig, weight: QuantizedLinear, format: str
) -> dict[str, Any]:
    """config.json's "quantization_config"; one group for every way in which inputs are treated.

    ``weight`` stands for all layers: they share bits, symmetry and group size.
    """
    groups_a_row = weight.weight_scale.shape[1]
    weights: dict[str, Any] = {
        "num_bits": weight.weight_bits,
        "type": "int",
        "symmetric": weight.weight_zero_point is None,
        "strategy": "channel" if groups_a_row == 1 else "group",
        "dynamic": False,
    }
    if groups_a_row > 1:
        weights["group_size"] = weight.in_features // groups_a_row
    groups: dict[str, Any] = {}
    for mode in ("static", "token", "none"):
        sites = [site for site in SITES if quant.mode(site) == mode]
        if sites:
            leaves = "|".join(name.split(".")[-1] for site in sites for name in LINEARS[config.style][site])
            inputs = {
                "num_bits": quant.activation_bits,
                "type": "int",
                "symmetric": False,
                "strategy": "token" if mode == "token" else "tensor",
                "dynamic": mode == "token",
            }
            if mode == "token" and quant.token_group_size is not None:
                inputs |= {"strategy": "group", "group_size": quant.token_group_size}
            groups[f"group_{len(groups)}"] = {
                "targets": ["Linear"] if len(sites) == len(SITES) else [f"re:.*\\.({leaves})$"],
                "format": format,
                "weights": weights,
                "input_activations": None if mode == "none" else inputs,
                "output_activations": None,
            }
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ["lm_head", "embed_out"],  # the head's name in Llama, and in GPT-NeoX before transformers 5
        "config_groups": groups,
    }


def read_quantization_config(theirs: Mapping[str, Any], style: str, source: Path) -> tuple[QuantConfig, dict[str, Any]]:
    """How inputs are quantized, and the weights' scheme, of a "quantization_config" that we wrote."""
    if theirs.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f'{source}: quant_method "{theirs.get("quant_method")}" is an export that lit-actreg does not read back: '
            "name the artifact in compressed-tensors' form, or the checkpoint"
        )
    if not theirs.get("config_groups"):
        raise ValueError(f"{source}: its quantization_config has no config_groups: write the artifact again")
    weights, bits, group_size = {}, 4, None
    sites: dict[str, list[Site]] = {"static": [], "token": []}
    for group in theirs["config_groups"].values():
        weights, inputs = group["weights"], group["input_activations"]
        if inputs is not None:
            pattern = ".*" if group["targets"] == ["Linear"] else group["targets"][0].removeprefix("re:")
            found = [site for site in SITES if re.match(pattern, LINEARS[style][site][0])]
            sites["token" if inputs["dynamic"] else "static"] += found
            bits, group_size = inputs["num_bits"], inputs.get("group_size") or group_size
    quantized = [site for site in SITES if site in sites["static"] + sites["token"]]
    activations: Literal["static", "token", "none"] = "token" if quantized else "none"
    per_token: list[Site] = []
    if sites["static"]:
        activations, per_token = "static", sites["token"]
    quant = QuantConfig(activations, bits, sites=quantized, per_token_sites=per_token, token_group_size=group_size)
    return quant, weights


def empty_linear(
    num_rows: int, num_columns: int, bias: bool, quant: QuantConfig, site: Site, weights: Mapping[str, Any]
) -> QuantizedLinear:
    """A layer of the right shapes and dtypes on the meta device, to be filled."""
    mode = quant.mode(site)
    groups = num_columns // weights["group_size"] if weights["strategy"] == "group" else 1
    with torch.device("meta"):
        codes, scale = torch.empty(num_rows, num_columns, dtype=torch.int8), torch.empty(num_rows, groups)
        zero_point = None if weights["symmetric"] else torch.empty(num_rows, groups, dtype=torch.int8)
        return QuantizedLinear(
            QuantizedWeight(codes, scale, zero_point, weights["num_bits"]),
            torch.empty(num_rows) if bias else None,
            mode,
            quant.activation_bits,
            torch.empty(1) if mode == "static" else None,
            torch.empty(1, dtype=torch.int8) if mode == "static" else None,
            quant.token_group_size if mode == "token" else None,
        )


# Our buffers with one row an output channel, and their names in the file; the other two are one number a layer.
ROW_PARTS = {
    "codes": "weight",
    "weight_scale": "weight_scale",
    "weight_zero_point": "weight_zero_point",
    "bias": "bias",
}
INPUT_PARTS = ("input_scale", "input_zero_point")


def linear_to_file(
    config: ModelConfig, index: int, site: Site, linear: QuantizedLinear, format: str
) -> dict[str, Tensor]:
    """The tensors of the file that one of our linears becomes."""
    buffers = {name: tensor.cpu() for name, tensor in linear.named_buffers()}
    prefix = f"{BLOCK_PREFIX[config.style]}.{index}"
    tensors: dict[str, Tensor] = {}
    for ours, theirs in ROW_PARTS.items():
        if ours in buffers:
            for leaf, rows in split_rows(config, site, buffers[ours]).items():
                tensors[f"{prefix}.{leaf}.{theirs}"] = rows
    for leaf in LINEARS[config.style][site]:
        tensors |= {f"{prefix}.{leaf}.{part}": buffers[part].clone() for part in INPUT_PARTS if part in buffers}
        if format == "pack-quantized":
            codes = tensors.pop(f"{prefix}.{leaf}.weight")
            tensors[f"{prefix}.{leaf}.weight_packed"] = pack_int32(codes, linear.weight_bits)
            tensors[f"{prefix}.{leaf}.weight_shape"] = torch.tensor(codes.shape)
    return tensors


def linear_from_file(
    config: ModelConfig, index: int, site: Site, linear: QuantizedLinear, format: str, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Inverse of :func:`linear_to_file`: takes the tensors of ``linear``'s buffers out of ``found``.

    ``linear`` says which buffers there are; it may live on the meta device. A missing tensor is a ``KeyError``, one
    that cannot be unpacked or joined a ``RuntimeError`` or ``TypeError``.
    """
    prefix = f"{BLOCK_PREFIX[config.style]}.{index}"
    leaves = LINEARS[config.style][site]
    if format == "pack-quantized":
        for leaf in leaves:
            packed, shape = (found.pop(f"{prefix}.{leaf}.weight_{part}") for part in ("packed", "shape"))
            if packed.dtype != torch.int32:
                raise TypeError(f"{prefix}.{leaf}.weight_packed is {packed.dtype}")
            found[f"{prefix}.{leaf}.weight"] = unpack_int32(packed, linear.weight_bits, int(shape[1]))
    buffers = {}
    for name, _ in linear.named_buffers():
        parts = {leaf: found.pop(f"{prefix}.{leaf}.{ROW_PARTS.get(name, name)}") for leaf in leaves}
        # Linears that we fuse have one input, so one grid for it.
        buffers[name] = parts[leaves[0]] if name in INPUT_PARTS else join_rows(config, site, parts)
    return buffers
