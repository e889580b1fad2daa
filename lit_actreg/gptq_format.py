"""The GPTQ v2 export: weights only, for programs that read what GPTQModel writes.

Every linear [N, K] with b-bit codes and groups of g input columns becomes

    qweight   int32 [K·b/32, N]      codes + 2^(b−1), packed along K, first in the lowest bits
    qzeros    int32 [K/g, N·b/32]    zero points + 2^(b−1), packed along N
    scales    float16 [K/g, N]
    g_idx     int32 [K]              k // g: the group of a column

    Ŵᵀ[k, n] = (qweight − qzeros) · scales

Version 2 stores the zero point z, version 1 stored z − 1. Scales are rounded to float16, so Ŵ differs from the
artifact's by up to 2⁻¹¹ of itself (by more for scales below 2⁻¹⁴, where float16 has fewer bits).

There is no place for activation scales: whoever loads the folder computes with 16-bit activations, and `quantize` says
so. Its weights are therefore fitted to inputs that are not on the activation grid.

Offered are groups of 32 and 128, which is what was seen to load on a CPU with GPTQModel 7.7 (one scale a row was seen
to fail there), and widths that fill whole words.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from lit_actreg.compressed_tensors import pack_int32
from lit_actreg.config import SITES
from lit_actreg.huggingface import split_rows
from lit_actreg.model import Decoder

BITS, GROUP_SIZES, WIDTH_STEP = (4, 8), (32, 128), 32


def check_gptq(model: Decoder, bits: int, group_size: int | None) -> None:
    """Refuses with one line what the format, or its readers, cannot hold."""
    if bits not in BITS:
        raise ValueError(f'format "gptq_v2" is written for 4 or 8 bits, not {bits}: change bits, or choose "auto"')
    if group_size not in GROUP_SIZES:
        found = "one scale an output channel" if group_size is None else f"groups of {group_size}"
        raise ValueError(f'format "gptq_v2" takes groups of 32 or 128, not {found}: set group_size, or choose "auto"')
    for site in SITES:
        weight = getattr(model.blocks[0], site).weight.to("meta")
        for leaf, rows in split_rows(model.config, site, weight).items():
            for what, size in (("inputs", rows.shape[1]), ("outputs", rows.shape[0])):
                if size % WIDTH_STEP:
                    raise ValueError(
                        f'format "gptq_v2" packs whole words: the {size} {what} of {leaf} are not a multiple of '
                        f'{WIDTH_STEP}: choose "auto"'
                    )


def to_gptq(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """One linear's tensors in the "int-quantized" form (:func:`.compressed_tensors.linear_to_file`) as GPTQ v2's.

    Names keep their prefix; what is not a quantized weight (a bias) passes as it is.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, part = name.rpartition(".")
        if part == "weight":
            scale_NG = tensors[f"{prefix}.weight_scale"]
            zero_NG = tensors.get(f"{prefix}.weight_zero_point", torch.zeros_like(scale_NG, dtype=torch.int8))
            columns, groups = tensor.shape[1], scale_NG.shape[1]
            # one group, [N, 1], is contiguous both ways round, and contiguous() would leave it strides that cannot be
            # viewed as wider words
            zero_GN = zero_NG.t().clone(memory_format=torch.contiguous_format)
            result |= {
                f"{prefix}.qweight": pack_int32(tensor, bits).t().contiguous(),
                f"{prefix}.qzeros": pack_int32(zero_GN, bits),
                f"{prefix}.scales": scale_NG.t().to(torch.float16).contiguous(),
                f"{prefix}.g_idx": (torch.arange(columns) // (columns // groups)).to(torch.int32),
            }
        elif part not in ("weight_scale", "weight_zero_point"):
            result[name] = tensor
    return result


def gptq_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """config.json's "quantization_config". Codes lie in the order of the columns, however they were found."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"lit-actreg:{version('lit-actreg')}"]},
    }
