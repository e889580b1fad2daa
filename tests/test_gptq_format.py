"""The GPTQ v2 export against an independent reading of its packed words, and what is refused before any work."""

import json

import numpy as np
import pytest
import torch
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from safetensors.numpy import load_file

from lit_actreg.artifact import read_artifact
from lit_actreg.cli import one_line
from lit_actreg.config import SITES, ModelConfig, QuantConfig
from lit_actreg.huggingface import BLOCK_PREFIX, LINEARS, join_rows
from lit_actreg.model import Decoder
from lit_actreg.quantize import quantize_model


def decoder(style="llama", width=64, mlp_width=96):
    torch.manual_seed(0)
    config = ModelConfig(
        style=style,
        num_layers=2,
        width=width,
        num_heads=2,
        num_kv_heads=1 if style == "llama" else None,
        mlp_width=mlp_width,
        context=32,
        init_std=0.2,
    )
    return Decoder(config, QuantConfig(), 256).requires_grad_(False)


def fields(words, bits, axis):
    """The unsigned b-bit fields of int32 words, first field in the lowest bits, along ``axis``."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    parts = [(unsigned >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    stacked = np.stack(parts, axis + 1)
    shape = list(words.shape)
    shape[axis] *= 32 // bits
    return stacked.reshape(shape)


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "mlp_width", "group_size"), [(64, 96, 32), (128, 256, 128)])  # 2 and 3, 1 and 2
def test_an_independent_reading_gives_the_weights(style, bits, symmetric, width, mlp_width, group_size, tmp_path):
    """Layers of several groups a row, and of exactly one."""
    model = decoder(style, width, mlp_width)
    quantizer = RTN(bits, group_size=group_size, symmetric=symmetric)
    with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
        quantize_model(model, quantizer, [], tmp_path / "gptq", format="gptq_v2")
    quantize_model(model, quantizer, [], tmp_path / "ours")
    ours = read_artifact(tmp_path / "ours")
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    described = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (described["quant_method"], described["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (described["bits"], described["group_size"], described["sym"]) == (bits, group_size, symmetric)
    for index, block in enumerate(ours.blocks):
        for site in SITES:
            parts = {}
            for leaf in LINEARS[style][site]:
                prefix = f"{BLOCK_PREFIX[style]}.{index}.{leaf}"
                q_KN = fields(stored.pop(f"{prefix}.qweight"), bits, 0)
                group_K = stored.pop(f"{prefix}.g_idx")
                z_KN = fields(stored.pop(f"{prefix}.qzeros"), bits, 1)[group_K]
                s_KN = stored.pop(f"{prefix}.scales")[group_K].astype(np.float32)
                parts[leaf] = torch.tensor(((q_KN - z_KN) * s_KN).T).float()
                assert (f"{prefix}.bias" in stored) == (style == "neox")
            expected = block.get_submodule(site).dequantized_weight()
            # half a unit in the last of float16's 11 bits
            torch.testing.assert_close(join_rows(model.config, site, parts), expected, rtol=2**-11, atol=0)
    assert not [name for name in stored if "weight_scale" in name or "input_scale" in name]


def test_weights_are_fitted_to_inputs_off_the_grid(tmp_path):
    ids = [torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))]
    model = decoder()
    with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
        quantize_model(model, GPTQ(group_size=32), ids, tmp_path / "as_static", format="gptq_v2")
    model.set_activations(QuantConfig(activations="none"))
    with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
        quantize_model(model, GPTQ(group_size=32), ids, tmp_path / "as_none", format="gptq_v2")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("as_static", "as_none")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("model", "quantizer", "line"),
    [
        ({}, RTN(3, group_size=32), "written for 4 or 8 bits, not 3"),
        ({}, RTN(4), "takes groups of 32 or 128, not one scale an output channel"),
        ({}, RTN(4, group_size=16), "takes groups of 32 or 128, not groups of 16"),
        ({}, RTN(4, group_size=128), "group_size 128 does not divide the 64 input columns"),
        ({"mlp_width": 48}, RTN(4, group_size=32), "the 48 outputs of mlp.gate_proj are not a multiple of 32"),
        ({"width": 36}, RTN(4, group_size=32), "the 36 inputs of self_attn.q_proj are not a multiple of 32"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(model, quantizer, line, tmp_path):
    with pytest.raises(ValueError, match=line) as error:
        quantize_model(decoder(**model), quantizer, [], tmp_path / "out", format="gptq_v2", dry_run=True)
    assert one_line(str(error.value)) == str(error.value)
    assert not list(tmp_path.iterdir())


def test_it_is_an_export_that_is_not_read_back(tmp_path):
    with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
        quantize_model(decoder(), RTN(group_size=32), [], tmp_path / "out", format="gptq_v2")
    with pytest.raises(ValueError, match='quant_method "gptq" is an export'):
        read_artifact(tmp_path / "out")
