"""Calibration sees what the layers will see: inputs on the grid, and quantized blocks before them."""

import pytest
import torch
from small_models import small_decoder, text_ids

from lit_actreg.config import SITES
from lit_actreg.quant.calibration import advance, calibrate_clips, embed_tokens, input_hessians

CPU = torch.device("cpu")


@pytest.mark.parametrize("style", ["neox", "llama"])
def test_hessians_are_the_mean_outer_product_of_inputs_on_the_grid(style):
    model = small_decoder(style)
    batches = list(text_ids(6).split([4, 2]))  # batches of unequal size
    inputs = {site: [] for site in SITES}
    for site in SITES:
        linear = model.blocks[1].get_submodule(site)
        linear.register_forward_pre_hook(lambda module, args, site=site: inputs[site].append(args[0]))
    for ids in batches:
        model(ids)
    hidden = embed_tokens(model, batches)
    advance(model.blocks[0], hidden, CPU)
    hessians = input_hessians(model.blocks[1], "blocks.1", hidden, CPU)
    for site in SITES:
        quantizer = model.blocks[1].get_submodule(site).input_quantizer
        x_hat = torch.cat([quantizer(x).flatten(0, 1) for x in inputs[site][:2]]).double()
        expected = (x_hat.T @ x_hat / len(x_hat)).float()
        torch.testing.assert_close(hessians[site], expected, rtol=1e-5, atol=1e-6)  # float32 sums of 384 tokens
        levels = torch.cat([quantizer(x).flatten() for x in inputs[site][:2]]).unique()
        assert len(levels) <= 16


def test_advancing_through_all_blocks_is_the_model():
    model = small_decoder("llama")
    ids = text_ids(4)
    hidden = embed_tokens(model, ids.split(2))
    for block in model.blocks:
        advance(block, hidden, CPU)
    torch.testing.assert_close(model.norm(torch.cat(hidden)), model(ids)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_activation_names_the_layer(value):
    model = small_decoder("neox")
    model.blocks[1].norm_2.weight.data[5] = value
    hidden = embed_tokens(model, [text_ids(2)])
    advance(model.blocks[0], hidden, CPU)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp_in: its input has NaN or infinite values"):
        input_hessians(model.blocks[1], "blocks.1", hidden, CPU)


def test_hooks_do_not_stay():
    model = small_decoder("neox")
    input_hessians(model.blocks[0], "blocks.0", embed_tokens(model, [text_ids(2)]), CPU)
    assert not any(module._forward_hooks for module in model.modules())


def test_clips_are_set_from_inputs_behind_the_grids_before_them():
    model = small_decoder("llama")
    block = model.blocks[0]
    x_BTD = embed_tokens(model, [text_ids(2)])[0]
    calibrate_clips(block, x_BTD, "minmax", CPU)
    clips = {site: getattr(block, site).input_quantizer for site in SITES}
    clips = {site: (quantizer.low.item(), quantizer.high.item()) for site, quantizer in clips.items()}
    seen = {}
    for site in SITES:
        getattr(block, site).register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0]}))
    block(x_BTD, None, *model.rotary(text_ids(2)))
    assert clips == {site: (x.min().item(), x.max().item()) for site, x in seen.items()}
