"""What the commands do with a checkpoint, and with one that does not fit: one line, and nothing written.

``main`` is called in this process; each test has a working directory of its own.
"""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from cli_checks import QUIET, mistake, written
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import save_file
from small_fit import CONTEXT, VOCAB_SIZE, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_actreg.artifact import read_artifact
from lit_actreg.checkpoint import load_decoder, read_checkpoint_info
from lit_actreg.cli import main
from lit_actreg.config import SITES, as_plain
from lit_actreg.huggingface import huggingface_config, to_huggingface

pytestmark = pytest.mark.usefixtures("one_thread")
NORM = "model.norm.weight"
TABLE = "table --checkpoints='{{a: {checkpoint}}}' --quantizers='[{{class_path: RTN}}]'"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A corpus, a checkpoint of two steps and its artifact."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_corpus(folder / "corpus")
    data = f"--data.source={corpus} --data.cache_dir={folder}/cache --data.context={CONTEXT} --data.batch_size=4"
    data += f" --data.valid_share=0.1 --data.num_workers=0 {QUIET}"
    shape = "--model.shape='{num_layers: 1, width: 32, num_heads: 2}'"
    schedule = "--trainer.max_steps=2 --trainer.limit_val_batches=1 --outliers.num_tokens=64"
    main(
        shlex.split(f"fit {data} --data.vocab_size={VOCAB_SIZE} {shape} {schedule} --trainer.default_root_dir={folder}")
    )
    checkpoint = next(folder.glob("**/last.ckpt"))
    main(shlex.split(f"quantize {data} --quantizer=RTN --ckpt_path={checkpoint} --output={folder}/artifact"))
    return {"corpus": corpus, "checkpoint": checkpoint, "artifact": folder / "artifact", "folder": folder}


def interrupted_as_lightning_is() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def terminated_as_lightning_is() -> None:
    raise SIGTERMException


@pytest.mark.parametrize(
    ("end", "status", "line"),
    [(interrupted_as_lightning_is, 130, "lit-actreg: interrupted\n"), (terminated_as_lightning_is, 143, "")],
)
def test_a_command_that_a_signal_ends_has_its_status(monkeypatch, made, capsys, end, status, line):
    monkeypatch.setattr("lit_actreg.trainer.quantize_model", lambda *_, **__: end())
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"quantize --quantizer RTN --ckpt_path {made['checkpoint']} --output out"))
    assert exit.value.code == status
    assert capsys.readouterr().err.endswith(line)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "quantize --quantizer RTN --quantizer.bits 9 --ckpt_path {checkpoint} --output out",
            "weight bits 9 is out of",
        ),
        (
            "quantize --quantizer RTN --quantizer.group_size 7 --ckpt_path {checkpoint} --output out",
            "group_size 7 does",
        ),
        ("quantize --quantizer RTN --ckpt_path {corpus}/000.txt --output out", "is not a checkpoint of lit-actreg"),
        ("quantize --quantizer RTN --ckpt_path {corpus} --output out", "config.json"),
        ("validate --ckpt_path {checkpoint}/../..", "checkpoints/last.ckpt"),
        ("table --checkpoints {checkpoint} --quantizers RTN", "expected names and values, '{name: …}'"),
        (f"{TABLE} --model.quant.activation_bits 8", "brings its own quantization: leave model.quant out"),
        (f"{TABLE} --trainer.precision bf16-true", "a table is computed in float32"),
        ("quantize --quantizer RTN --ckpt_path {artifact} --output out", "is quantized already"),
        (
            "quantize --quantizer RTN --ckpt_path {checkpoint} --model.init_from {artifact} --output out",
            "are two models: leave one out",
        ),
        ("quantize --quantizer RTN --ckpt_path {checkpoint} --output {artifact}", "already holds a quantized"),
        ("quantize --quantizer RTN --ckpt_path {checkpoint} --output {corpus}", "is not a quantized checkpoint"),
        ("validate --trainer.plugins W4A4Precision --ckpt_path {checkpoint}", "found no quantized linear"),
        (
            "validate --trainer.plugins W4A4Precision --trainer.precision bf16-mixed --ckpt_path {checkpoint}",
            "and `plugins=W4A4Precision`. Choose one.",
        ),
        ("predict --ckpt_path {checkpoint}", "data.prompts is empty: give the texts to continue"),
        ("fit --ckpt_path {artifact}", "has no optimizer state to resume from"),
        ("fit --model.init_from {corpus}", "config.json"),
        ("fit --model.init_from {artifact}", "is quantized, a fit starts from others: name the checkpoint that it was"),
        ("validate --ckpt_path {artifact} --model.quant.activations none", "is quantized, its activations are part of"),
    ],
)
def test_a_wrong_path_is_one_line_and_writes_nothing(made, command, line, capsys):
    before = {path: path.read_bytes() for path in made["folder"].rglob("*") if path.is_file()}
    where = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache --data.valid_share=0.1"
    where += f" --data.context={CONTEXT} --data.batch_size=4 --data.num_workers=0 {QUIET}"
    found = mistake(capsys, f"{command.format(**made)} {where}")
    assert line in found
    assert not list(Path().iterdir())
    assert {path: path.read_bytes() for path in made["folder"].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda c: c["state_dict"].update({NORM: torch.ones(31)}),
            rf"{NORM} is \[31\], not \[32\]: .* hyper-parameters",
        ),
        (lambda c: c["state_dict"].pop(NORM), rf"lacks 1 tensors \({NORM}\)"),
        (lambda c: c["state_dict"].update({"model.more": torch.ones(1)}), r"unexpected 1 tensors \(model.more\)"),
        (lambda c: c["hyper_parameters"]["shape"].update(colour="red"), "hyper-parameters make no model"),
        (lambda c: c.update(evil=Path("pickled")), "is not a checkpoint of lit-actreg"),
        (lambda c: c.update(tokenizer_json="nonsense"), "is not a tokenizer.json"),
    ],
)
@pytest.mark.parametrize("command", ["quantize --quantizer RTN --output out", "validate"])
def test_a_checkpoint_that_contradicts_itself(made, change, line, command, capsys):
    checkpoint = torch.load(made["checkpoint"], weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, "x.ckpt")
    found = mistake(capsys, f"{command} --ckpt_path x.ckpt --data.source {made['corpus']} {QUIET}")
    assert re.search(line, found), found
    assert written() == [Path("x.ckpt")]


def test_an_output_that_cannot_be_written(made, capsys):
    Path("file").write_text("")
    found = mistake(capsys, f"quantize --quantizer RTN --ckpt_path {made['checkpoint']} --output file/out {QUIET}")
    assert found.startswith("cannot write file/out.work (Not a directory): ")


def test_rtn_reads_no_text(made):
    data = f"--data.source=no_such_file.txt --data.cache_dir={made['folder']}/cache"
    main(shlex.split(f"quantize --quantizer=RTN --ckpt_path={made['checkpoint']} --output=out {data} {QUIET}"))
    assert Path("out/model.safetensors").read_bytes() == (made["artifact"] / "model.safetensors").read_bytes()
    assert Path("out/tokenizer.json").is_file()


def test_sites_without_learned_clips_are_not_given_any(made, capsys):
    checkpoint = torch.load(made["checkpoint"], weights_only=True)
    checkpoint["hyper_parameters"]["quant"]["per_token_sites"] = ["mlp_proj"]
    torch.save(checkpoint, "x.ckpt")
    command = f"--ckpt_path x.ckpt --data.source {made['corpus']} --model.quant.per_token_sites [] {QUIET}"
    for subcommand in ("validate", "quantize --quantizer RTN --output out"):
        found = mistake(capsys, f"{subcommand} {command}")
        assert found.startswith(
            "x.ckpt has no clips at ['mlp_proj'], it was trained with clips at ['qkv', 'attn_proj', "
        )
        assert found.endswith('use model.quant.activations "token", or quantize with calibrate')


@pytest.mark.parametrize("in_a_file", [False, True])
def test_an_override_of_one_field_leaves_the_checkpoints_others(made, in_a_file):
    checkpoint = torch.load(made["checkpoint"], weights_only=True)
    checkpoint["hyper_parameters"]["quant"] |= {"per_token_sites": ["mlp_proj"], "token_group_size": 8}
    torch.save(checkpoint, "x.ckpt")
    Path("bits.yaml").write_text("model: {quant: {activation_bits: 6}}")
    override = "--config bits.yaml" if in_a_file else "--model.quant.activation_bits 6"
    data = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache"
    main(shlex.split(f"quantize --quantizer=RTN --ckpt_path=x.ckpt --output=out {override} {data} {QUIET}"))
    quant = read_artifact(Path("out")).quant
    expected = checkpoint["hyper_parameters"]["quant"] | {"activation_bits": 6}
    assert as_plain(quant) == expected


def hub(made, folder: Path) -> None:
    """Writes the model, without its clips, as a Hugging Face folder."""
    model = load_decoder(made["checkpoint"])
    folder.mkdir()
    state = {name: tensor.clone() for name, tensor in to_huggingface(model.config, model.state_dict()).items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(huggingface_config(model.config, model.vocab_size)))
    shutil.copyfile(made["artifact"] / "tokenizer.json", folder / "tokenizer.json")


def test_a_model_without_clips_is_not_given_any(made, capsys):
    folder = Path("hub")
    hub(made, folder)
    command = f"quantize --quantizer=RTN --ckpt_path=hub {QUIET} --data.source={made['corpus']}"
    command += f" --data.context={CONTEXT} --data.batch_size=4 --data.valid_share=0.1"
    found = mistake(capsys, f"{command} --output=static --model.quant.activations=static")
    assert "hub has no learned clips" in found
    (folder / "tokenizer.json").rename("elsewhere.json")
    main(shlex.split(f"{command} --output=untold"))  # RTN reads no text
    without = command.replace("RTN", "GPTQ") + " --output=x", f"validate --ckpt_path=hub {QUIET}"
    for needs_text in without:
        assert "hub has no tokenizer.json: name its tokenizer with --data.tokenizer" in mistake(capsys, needs_text)
    command += " --data.tokenizer=elsewhere.json"
    made_up = f"validate --ckpt_path=hub --data.tokenizer=elsewhere.json --model.quant.activations=static {QUIET}"
    assert "hub has no clips at" in mistake(capsys, made_up)
    for output, option, activations in (("token", "", "token"), ("static", "--calibrate=mse", "static")):
        main(shlex.split(f"{command} --output={output} {option}"))
        assert json.loads(Path(output, "report.json").read_text())["activations"] == activations


@pytest.mark.parametrize("begun_from", ["ckpt", "hub"])
def test_a_fit_that_began_from_others_weights_is_resumed(made, begun_from, capsys):
    """Its shape is theirs, not the configuration's; and it knows the longer of the two contexts."""
    if begun_from == "hub":
        hub(made, Path("hub"))
    start = made["checkpoint"] if begun_from == "ckpt" else "hub"
    command = f"fit --model.init_from={start} --data.source={made['corpus']} --data.context=48 {QUIET}"
    command += " --data.batch_size=4 --data.valid_share=0.2"
    command += " --checkpoint.every_n_steps=2 --outliers.every_n_steps=0 --trainer.limit_val_batches=1"
    command += " --trainer.logger=TensorBoardLogger --trainer.logger.save_dir=runs --data.num_workers=0"
    main(shlex.split(f"{command} --trainer.max_steps=2"))
    main(shlex.split(f"{command} --trainer.max_steps=4 --ckpt_path=last"))
    (last,) = Path("runs").glob("*/version_1/checkpoints/step=4.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 4
    assert saved["hyper_parameters"]["shape"]["context"] == 48 > CONTEXT
    assert saved["hyper_parameters"]["shape"]["width"] == 32


def test_fit_quantize_validate_is_what_the_fixture_ran(made, capsys):
    report = json.loads((made["artifact"] / "report.json").read_text())
    assert [layer["bits"] for layer in report["layers"]] == [4] * 4
    where = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache --data.valid_share=0.1"
    main(shlex.split(f"validate --ckpt_path={made['artifact']} {where} --data.context={CONTEXT} {QUIET}"))
    assert "val/perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("option", ["", "--model.quant.per_token_sites=[mlp_proj]", "--model.quant.activations=none"])
def test_an_artifact_is_what_it_holds_at_any_precision(made, precision, option, capsys):
    """Grids and biases stay float32 where Lightning casts a module: the same perplexity but for what is between."""
    data = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache --data.valid_share=0.1"
    data += f" --data.context={CONTEXT} --data.batch_size=4 --data.num_workers=0 {QUIET}"
    main(shlex.split(f"quantize --quantizer=RTN --ckpt_path={made['checkpoint']} --output=out {option} {data}"))
    found = []
    for given in (precision, "32-true"):
        capsys.readouterr()
        main(shlex.split(f"validate --ckpt_path=out --trainer.precision={given} {data}"))
        found.append(float(re.search(r"val/perplexity\D+([\d.]+)", capsys.readouterr().out)[1]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    model = read_artifact(Path("out")).to(torch.bfloat16)
    stored = read_artifact(Path("out")).blocks[0].qkv
    assert model.embedding.weight.dtype == torch.bfloat16
    assert all(torch.equal(kept, stored.get_buffer(name)) for name, kept in model.blocks[0].qkv.named_buffers())


@pytest.mark.parametrize("num_tokens", [CONTEXT, CONTEXT + 1])
def test_sequences_longer_than_those_of_training_are_said(made, num_tokens, recwarn):
    where = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache --data.valid_share=0.1"
    command = f"validate --ckpt_path={made['checkpoint']} --data.batch_size=4 {where} {QUIET}"
    main(shlex.split(f"{command} --data.context={num_tokens} --trainer.limit_val_batches=1"))
    said = f"data.context {num_tokens} is more than the {CONTEXT} tokens that"
    assert any(str(warning.message).startswith(said) for warning in recwarn) == (num_tokens > CONTEXT)


def test_the_monitor_sees_an_artifacts_inputs_on_integer_kernels(made):
    """Fused blocks hand codes from kernel to kernel; who looks at inputs must see numbers."""
    where = f"--data.source={made['corpus']} --data.cache_dir={made['folder']}/cache --data.valid_share=0.1"
    logger = "--trainer.logger=TensorBoardLogger --trainer.logger.save_dir=runs"
    options = f"--data.context={CONTEXT} --trainer.accelerator=cpu --trainer.plugins=W4A4Precision"
    main(shlex.split(f"validate --ckpt_path={made['artifact']} {where} {options} {logger}"))
    events = EventAccumulator(str(next(Path("runs").rglob("events.*")).parent)).Reload()
    for site in SITES:
        assert events.Scalars(f"outliers_{site}/largest_ratio_00")[0].value > 1


def test_a_checkpoints_tokenizer_is_unpacked_once_and_mended(made, tmp_path):
    """Ranks and commands read the one file at the same time: it must not be emptied and written again."""
    unpacked = read_checkpoint_info(made["checkpoint"], tmp_path).tokenizer
    text, inode = unpacked.read_bytes(), unpacked.stat().st_ino
    assert read_checkpoint_info(made["checkpoint"], tmp_path).tokenizer.stat().st_ino == inode
    unpacked.write_bytes(text[:50] + b"\xc3")
    read_checkpoint_info(made["checkpoint"], tmp_path)
    assert [path.read_bytes() for path in unpacked.parent.iterdir()] == [text]


def test_another_tokenizer_is_refused_and_prompts_do_not_matter(made, capsys):
    tokenizer = json.loads((made["artifact"] / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (name for name, index in vocabulary.items() if index in (40, 41))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path("other.json").write_text(json.dumps(tokenizer))
    command = f"validate --ckpt_path={made['checkpoint']} --data.source={made['corpus']} --data.valid_share=0.1"
    command += f" --data.context={CONTEXT} --data.num_workers=0 {QUIET}"
    found = mistake(capsys, f"{command} --data.tokenizer=other.json")
    assert "data.tokenizer other.json gives other ids than that of" in found
    same = made["artifact"] / "tokenizer.json"
    main(shlex.split(f"{command} --data.tokenizer={same} --data.prompts '[My fellow]'"))


def test_sigterm_ends_predict_after_the_prompt_at_hand(made, monkeypatch):
    read = []

    def generate(model, batch, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        read.append(batch)
        return batch

    monkeypatch.setattr("lit_actreg.module.generate", generate)
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"predict --ckpt_path={made['checkpoint']} --data.cache_dir=c --data.prompts=[a,b,c] {QUIET}"))
    assert (exit.value.code, len(read)) == (143, 1)


def test_one_process_of_several_quantizes(made, monkeypatch, tmp_path, capsys):
    """torchrun starts the command on every rank."""
    monkeypatch.setenv("RANK", "1")
    where = f"--data.cache_dir={made['folder']}/cache --output={tmp_path}/out"
    main(shlex.split(f"quantize --quantizer=RTN --ckpt_path={made['checkpoint']} {where} {QUIET}"))
    assert not (tmp_path / "out").exists()
    assert "rank 1 of the launcher has nothing to do: rank 0 does it all" in capsys.readouterr().out
