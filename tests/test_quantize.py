"""The function behind the subcommand: what it reports, how it resumes, what it refuses before any work."""

import importlib.util
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from lit_actreg_plugins.gptq import GPTQ
from lit_actreg_plugins.rtn import RTN
from small_models import small_decoder, text_ids

from lit_actreg.artifact import read_artifact
from lit_actreg.config import SITES, QuantConfig
from lit_actreg.plan import plan_layers, stored_quant_config
from lit_actreg.quantize import quantize_model
from lit_actreg.work_folder import described

CALIBRATION = list(text_ids(16).split(4))


class Interrupted(Exception):
    pass


class DiesAfter(GPTQ):
    """Raises at its ``calls``-th layer, as a process is killed."""

    calls = 10**9

    def quantize_weight(self, weight, hessian):
        DiesAfter.calls -= 1
        if DiesAfter.calls < 0:
            raise Interrupted
        return super().quantize_weight(weight, hessian)


class Empty(RTN):
    def quantize_weight(self, weight, hessian):
        return None


def test_a_torn_block_is_made_again_and_an_empty_work_folder_is_nobodys(tmp_path):
    model = small_decoder("neox")
    DiesAfter.calls = 5  # the second block's second layer
    with pytest.raises(Interrupted):
        quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "out")
    block = tmp_path / "out.work" / "block_0000.safetensors"
    block.write_bytes(block.read_bytes()[:1000])  # as a machine leaves it whose disk was not told to write
    DiesAfter.calls = 10**9
    quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "out")
    (tmp_path / "whole.work").mkdir()
    quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match=r"blocks\.0\.qkv: Empty gave NoneType, not a QuantizedWeight"):
        quantize_model(model, Empty(), [], tmp_path / "none")


@pytest.mark.parametrize("style", ["neox", "llama"])
@pytest.mark.parametrize("died_at_layer", [2, 5])
def test_resumes_where_it_stopped_and_gives_the_same_bytes(style, died_at_layer, tmp_path):
    model = small_decoder(style)
    DiesAfter.calls = 10**9
    quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "whole")
    DiesAfter.calls = died_at_layer
    with pytest.raises(Interrupted):
        quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    DiesAfter.calls = 8 - died_at_layer // 4 * 4  # enough for the unfinished blocks, not for the finished one
    quantize_model(model, DiesAfter(), CALIBRATION, tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_unfinished_work_of_another_job_is_refused_and_kept(tmp_path):
    DiesAfter.calls = 5
    with pytest.raises(Interrupted):
        quantize_model(small_decoder("neox"), DiesAfter(), CALIBRATION, tmp_path / "out")
    DiesAfter.calls = 10**9
    for change in (
        lambda: quantize_model(small_decoder("neox"), DiesAfter(3), CALIBRATION, tmp_path / "out"),
        lambda: quantize_model(small_decoder("neox"), DiesAfter(), CALIBRATION[1:], tmp_path / "out"),
        lambda: quantize_model(small_decoder("llama"), DiesAfter(), CALIBRATION, tmp_path / "out"),
    ):
        with pytest.raises(FileExistsError, match="unfinished work of another model or other options"):
            change()
    assert (tmp_path / "out.work" / "block_0000.safetensors").exists()
    quantize_model(small_decoder("neox"), DiesAfter(3), CALIBRATION, tmp_path / "out", overwrite=True)
    assert read_artifact(tmp_path / "out").blocks[0].qkv.weight_bits == 3


def test_a_mended_quantizer_is_another_one(tmp_path):
    """Or half of the artifact would have its old codes."""
    seen = []
    for line in ("# as first written", "# mended"):
        (tmp_path / "mine.py").write_text(
            f"from lit_actreg_plugins.rtn import RTN\nclass Mine(RTN):\n    {line}\n    pass\n"
        )
        spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["mine"] = module
        spec.loader.exec_module(module)
        seen += [described(module.Mine()), described(module.Mine(3))]
    del sys.modules["mine"]
    assert all(seen.count(found) == 1 for found in seen)
    assert seen[0]["class"] == seen[2]["class"] == "mine.Mine"


class Answers(RTN):
    """RTN, whose answer for the second block's qkv is changed."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self._change, self._layers = change, 0

    def quantize_weight(self, weight, hessian):
        result = super().quantize_weight(weight, hessian)
        self._layers += 1
        return replace(result, **self._change(result)) if self._layers == 5 else result


@pytest.mark.parametrize(
    ("change", "options", "fault"),
    [
        (lambda r: {"codes": r.codes + 5}, {}, "codes outside -8 to 7"),
        (lambda r: {"codes": r.codes.int()}, {}, "codes torch.int32 [108, 36], not torch.int8 [108, 36]"),
        (lambda r: {"codes": r.codes.t()}, {}, "codes torch.int8 [36, 108], not torch.int8 [108, 36]"),
        (lambda r: {"scale": r.scale.half()}, {}, "scale torch.float16 [108, 1], not torch.float32 [108, 1]"),
        (lambda r: {"scale": r.scale[:, 0]}, {}, "scale torch.float32 [108], not torch.float32 [108, 1]"),
        (lambda r: {"scale": r.scale * torch.nan}, {}, "a scale that is not finite"),
        (lambda r: {"scale": None}, {"group_size": 9}, "scale None, not torch.float32 [108, 4]"),
        (lambda r: {"bits": 8}, {}, "bits 8, where all layers have the quantizer's 4"),
        (lambda r: {"zero_point": r.scale.char()}, {}, "zero points given, symmetric is True"),
        (
            lambda r: {"zero_point": r.scale},
            {"symmetric": False},
            "zero_point torch.float32 [108, 1], not torch.int8 [108, 1]",
        ),
    ],
)
def test_a_wrong_answer_of_a_quantizer_is_refused(tmp_path, change, options, fault):
    with pytest.raises(ValueError, match=re.escape(f"blocks.1.qkv: Answers gave {fault}")):
        quantize_model(small_decoder("neox"), Answers(change, **options), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize_model(small_decoder("neox"), Answers(lambda r: {}, **options), [], tmp_path / "out", overwrite=True)


def test_options_of_a_quantizer_are_plain_values(tmp_path):
    quantizer = RTN()
    quantizer.generator = torch.Generator()
    with pytest.raises(ValueError, match=r"RTN\.generator is a Generator, which no JSON file holds"):
        quantize_model(small_decoder("neox"), quantizer, [], tmp_path / "out")


@pytest.mark.parametrize("style", ["neox", "llama"])
def test_report(style, tmp_path, capsys):
    model = small_decoder(style)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize_model(model, GPTQ(), CALIBRATION, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report["stage_seconds"].pop("artifact") > 0  # known after the file is written
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert [line["layer"] for line in report["layers"]] == [f"blocks.{i}.{site}" for i in (0, 1) for site in SITES]
    assert report["worse_than_rtn"] == []
    assert report["fallbacks"] == []
    first = report["layers"][0]
    assert 0 < first["error"] < first["rtn_error"]
    assert first["clip_low"] == pytest.approx(model.blocks[0].qkv.input_quantizer.low.item())
    assert first["damping"] == 0.01
    screen = capsys.readouterr().out
    assert "blocks.1.mlp_proj" in screen
    assert "int4" in screen


def test_fallbacks_are_named(tmp_path, capsys):
    class Fails(GPTQ):
        def quantize_weight(self, weight, hessian):
            return super().quantize_weight(weight, -hessian if weight.shape[1] == 45 else hessian)

    report = quantize_model(small_decoder("neox"), Fails(), CALIBRATION, tmp_path / "out")
    assert report["fallbacks"] == ["blocks.0.mlp_proj", "blocks.1.mlp_proj"]
    assert "2 layers fell back to another method: blocks.0.mlp_proj" in capsys.readouterr().out


def test_dry_run_writes_nothing_and_refuses_what_cannot_work(tmp_path, capsys):
    model = small_decoder("llama")
    report = quantize_model(model, GPTQ(3, group_size=9), CALIBRATION, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report["layers"][3] == {
        "layer": "blocks.0.mlp_proj",
        "shape": [36, 45],
        "bits": 3,
        "groups": 5,
        "activations": "static",
        "kernel": "int4",
    }
    assert report["memory_bytes"]["host_hidden_states"] == 4 * 1024 * 36
    assert report["memory_bytes"]["device_hessians"] == 4 * (3 * 36**2 + 45**2)
    assert "expected memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp_proj: group_size 12 does not divide the 45 input columns"):
        quantize_model(model, GPTQ(group_size=12), CALIBRATION, tmp_path / "out", dry_run=True)


def test_plan_of_grids_that_follow_tokens():
    quant = QuantConfig(per_token_sites=["mlp_proj"], token_group_size=15)
    model = small_decoder("llama", quant)
    kernels = [[line["kernel"] for line in plan_layers(model, RTN(group_size=g), quant)[:4]] for g in (None, 9)]
    assert kernels == [["int4"] * 4, ["int4"] * 3 + ["float"]]  # 3 groups of a token, 5 of a weight's row
    with pytest.raises(ValueError, match="token_group_size 8 does not divide the 45 input columns"):
        small_decoder("llama", replace(quant, token_group_size=8))
    with pytest.raises(ValueError, match="token_group_size 0 is no number of columns"):
        replace(quant, token_group_size=0)
    everywhere = QuantConfig(per_token_sites=list(SITES), zero_point="real")
    assert stored_quant_config(everywhere, False, "auto", None) == (everywhere, [])
    with pytest.raises(ValueError, match='calibrate "mse" has no site whose clips it could set'):
        stored_quant_config(everywhere, False, "auto", "mse")


def test_no_calibration_unless_a_quantizer_wants_it(tmp_path):
    def no_tokens():
        raise AssertionError("looked at")
        yield

    quantize_model(small_decoder("neox"), RTN(), no_tokens(), tmp_path / "out")
    with pytest.raises(ValueError, match="the calibration has no tokens"):
        quantize_model(small_decoder("neox"), GPTQ(), [], tmp_path / "gptq")


def test_few_tokens_are_warned_about(tmp_path):
    with pytest.warns(
        UserWarning, match="32 calibration tokens are fewer than the largest layer.s 45 inputs: use more"
    ):
        quantize_model(small_decoder("neox"), GPTQ(), [text_ids(1, 32)], tmp_path / "out")


def test_a_real_zero_point_needs_consent(tmp_path):
    model = small_decoder("neox", QuantConfig(zero_point="real"))
    with pytest.raises(ValueError, match='zero_point "real", which no checkpoint format can hold'):
        quantize_model(model, RTN(), [], tmp_path / "out")
    with pytest.warns(UserWarning, match="zero points were rounded"):
        report = quantize_model(model, RTN(), [], tmp_path / "out", round_zero_point=True)
    assert report["messages"]
    assert read_artifact(tmp_path / "out").blocks[0].qkv.input_zero_point.dtype == torch.int8


def test_weights_only_is_said_loudly(tmp_path, capsys):
    model = small_decoder("neox", QuantConfig(activations="clamp"))
    with pytest.warns(UserWarning, match="WEIGHTS ONLY"):
        report = quantize_model(model, RTN(), [], tmp_path / "out")
    assert report["activations"] == "none"
    assert "WEIGHTS ONLY" in report["messages"][0]
    assert "WEIGHTS ONLY" in capsys.readouterr().out


def test_a_bad_weight_names_the_layer(tmp_path):
    model = small_decoder("neox")
    model.blocks[1].qkv.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks\.1\.qkv: the weight has NaN"):
        quantize_model(model, RTN(), [], tmp_path / "out")


def test_a_model_without_clips_gets_calibrated_ones(tmp_path, capsys):
    model = small_decoder("llama", QuantConfig(activations="none"))
    with pytest.warns(UserWarning, match='clips were calibrated by "minmax"'):
        quantize_model(model, RTN(), CALIBRATION, tmp_path / "out", calibrate="minmax")
    assert "clips were calibrated" in capsys.readouterr().out
    read = read_artifact(tmp_path / "out")
    assert read.quant.activations == "static"
    scales = [block.get_submodule(site).input_scale.item() for block in read.blocks for site in SITES]
    assert len(set(scales)) == 8


def test_clips_cannot_be_calibrated_for_an_export_without_activations(tmp_path):
    with pytest.raises(ValueError, match="has no place for clips"):
        quantize_model(small_decoder("neox"), RTN(), CALIBRATION, tmp_path / "out", format="gptq_v2", calibrate="mse")


def test_a_dry_run_tells_the_time_of_the_job(tmp_path, capsys):
    model = small_decoder("neox", layers=6)
    dry = quantize_model(model, GPTQ(), CALIBRATION, tmp_path / "out", dry_run=True)
    assert "expected time" in capsys.readouterr().out
    done = quantize_model(model, GPTQ(), CALIBRATION, tmp_path / "out")
    assert 0.2 * done["seconds"] < dry["expected_seconds"] + 0.1 < 5 * done["seconds"] + 0.5  # busy machines
