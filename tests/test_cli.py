"""The command line: help, overrides, and one line for every mistake, with nothing written.

``main`` is called in this process; each test has a working directory of its own, which must stay empty but for the
cache where a mistake shows only after data were read.
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
SUBCOMMANDS = ("fit", "validate", "test", "predict", "quantize", "table")
QUIET = "--trainer.accelerator=cpu --trainer.devices=1 --trainer.logger=false --trainer.enable_progress_bar=false"


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


def mistake(capsys, command: str) -> str:
    """The one line on stderr beside Lightning's and the tokenizer's progress."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(command))
    assert exit.value.code == 2
    progress = ("Seed set", "Generating", "Downloading", "holding documents out", "tokenizing")
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(progress)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("lit-actreg: ")
    return lines[0].removeprefix("lit-actreg: ")


def written() -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("", "subcommand"),
        ("train", "invalid choice: 'train'"),
        ("fit --bogus 1", "Unrecognized arguments: --bogus 1"),
        ("fit --config missing.yaml", "File does not exist: .*missing.yaml"),
        ("fit --trainer.devices 0", "devices"),
        ("fit --data.batch_size many", 'Parser key "data.batch_size": Expected a <class .int.>. Got value: many'),
        ("fit --data.context 0", r"data\.context 0 is too small: use 1 or more"),
        ("fit --data.source missing.txt", "the cosine schedule has no end: set trainer.max_steps or optim.decay_steps"),
        ("fit --optim.beta1 1.5 --trainer.max_steps 1", "optim.beta1 1.5 is out of range"),
        ("fit --optim.decay_steps -5", "optim.decay_steps -5 is too small: use 1 or more, or null"),
        ("fit --optim.warmup_steps -5 --trainer.max_steps 1", "optim.warmup_steps -5 is negative"),
        ("fit --data.seed -1 --trainer.max_steps 1", "data.seed -1 is too small: use 0 or more"),
        ("fit --trainer.gradient_clip_val -1 --trainer.max_steps 1", "trainer.gradient_clip_val -1: use 0"),
        (
            f"fit {QUIET} --trainer.max_steps 1 --trainer.strategy ModelParallelStrategy "
            "--trainer.strategy.data_parallel_size 2 --trainer.strategy.tensor_parallel_size 1",
            "size × tensor_parallel_size 2 × 1, which is not trainer.devices × num_nodes, 1: make them equal",
        ),
        ("fit --ckpt_path best --trainer.max_steps 1", 'ckpt_path "best": a fit keeps its newest checkpoints'),
        ("fit --data.source missing.txt --trainer.max_steps 1", "'missing.txt' does not exist: name a file"),
        ("fit --data.source '' --trainer.max_steps 1", "data.source '' names nothing: name a source"),
        ("fit --model.shape.width 33", "width 33 does not split into 4 heads"),
        ("fit --model.shape.style gpt", r'"model\.shape\.style": Expected .*neox.*Got value: gpt'),
        ("fit --model.quant.activation_bits 9", "activation_bits 9 is out of range: choose 2 to 8"),
        ("fit --model.quant.sites [qkv,head]", "Got value: head"),
        ("fit --model.shape.num_layers 0", "num_layers 0 is too small: use 1 or more"),
        ("fit --model.shape.width 0", "width 0 is too small"),
        ("fit --model.shape.num_kv_heads 0 --model.shape.style llama", "num_kv_heads 0 is too small"),
        ("fit --outliers.num_tokens 0", r"outliers\.num_tokens 0 is too small"),
        ("fit --kurtosis.every_nth_token 0", r"kurtosis\.every_nth_token 0 is too small: use 1"),
        ("fit --kurtosis.warmup_steps -5", r"kurtosis\.warmup_steps -5 is negative: use 0 or more"),
        ("fit --weight_penalty.warmup_steps -5", r"weight_penalty\.warmup_steps -5 is negative: use 0 or more"),
        ("fit --clips.tail 0.9", r"clips\.tail 0\.9 is out of range: choose a share"),
        ("fit --clips.freeze_step -1", r"clips\.freeze_step -1 is negative: use 0 or more"),
        ("fit --clips.calibrate_steps [0,-3]", r"clips\.calibrate_steps -3 is negative"),
        (
            "fit --clips.from_checkpoint no.ckpt --trainer.max_steps 1",
            r"clips\.from_checkpoint no\.ckpt does not exist",
        ),
        ("fit --outliers.every_n_steps -1", r"outliers\.every_n_steps -1 is negative"),
        (
            "fit --trainer.gradient_clip_algorithm value --trainer.max_steps 1",
            "gradient_clip_algorithm value: use norm",
        ),
        ("fit --trainer.log_every_n_steps 0 --trainer.max_steps 1", r"trainer\.log_every_n_steps 0: use 1 or more"),
        ("fit --model.shape.norm_eps 0", "norm_eps 0.0 is too small: use more than 0"),
        ("fit --clips.momentum 1.5", r"clips\.momentum 1\.5 is out of range: choose 0 to below 1"),
        ("fit --clips.constant -4", r"clips\.constant -4\.0 leaves no range"),
        ("fit --clips.lr -1", r"clips\.lr -1\.0 is negative: use 0"),
        ("fit --throughput.peak_tflops -1", r"throughput\.peak_tflops -1\.0 is not positive: name"),
        ("fit --clips.bits '{0: 1}'", r"clips\.bits \[1\] are out of range"),
        ("fit --kurtosis.weight -1", r"kurtosis\.weight -1\.0 is negative"),
        ("fit --weight_penalty.weight -1", r"weight_penalty\.weight -1\.0 is negative"),
        ("fit --weight_penalty.kind l3", r'"weight_penalty\.kind": Expected .*linf.*Got value: l3'),
        ("fit --ckpt_path missing.ckpt", r"missing\.ckpt does not exist"),
        ("fit --model.init_from missing", r"model\.init_from missing does not exist"),
        ("validate --ckpt_path missing.ckpt", r"missing\.ckpt does not exist"),
        ("validate", "validate needs a trained model: name one with --ckpt_path"),
        ("predict", "predict needs a trained model: name one with --ckpt_path"),
        ("quantize --quantizer RTN --output out", "quantize needs a trained model: name one with --ckpt_path"),
        ("table --checkpoints {} --quantizers []", "table needs a trained model: name one with --checkpoints"),
        ("quantize --output out", "quantizer. is required"),
        ("quantize --output out --quantizer Magic", r'"quantizer": .* Magic \(or one of .*GPTQ, .*RTN'),
        ("quantize --output out --quantizer RTN --quantizer.speed 9", "Option 'speed' is not accepted"),
        ("quantize --output out --quantizer RTN --ckpt_path missing.ckpt", r"missing\.ckpt does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(command, line, capsys):
    found = mistake(capsys, command)
    assert re.search(line, found), found
    assert not list(Path().iterdir())


def test_an_unknown_key_in_a_file(capsys):
    Path("fit.yaml").write_text("data: {sauce: sotu}\n")
    assert "sauce" in mistake(capsys, "fit --config fit.yaml")
    assert list(Path().iterdir()) == [Path("fit.yaml")]


def test_a_corpus_shorter_than_a_block(tmp_path, capsys):
    write_corpus(tmp_path / "corpus", 3, 5)
    line = mistake(
        capsys, f"fit --data.source corpus --data.vocab_size 300 --data.context 4096 --trainer.max_steps 1 {QUIET}"
    )
    assert "is shorter than one block of 4097 tokens: give more text or a smaller data.context" in line
    assert all(path.parts[0] == "corpus" for path in written())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_breaks_off_ends_the_fit_with_a_line(tmp_path, monkeypatch, capsys, num_workers):
    monkeypatch.setattr("lit_actreg.data.corpus.STREAM_CHUNK", 1 << 14)
    rows = [json.dumps({"text": f"the {i}th of so many words " * 20}) for i in range(400)]
    (tmp_path / "c.jsonl").write_text("\n".join([*rows, '{"text": "half', *rows]))
    shape = "--model.shape='{num_layers: 1, width: 32, num_heads: 2}' --trainer.limit_val_batches=1"
    line = mistake(
        capsys,
        f"fit --data.source c.jsonl --data.stream true --data.vocab_size 300 --data.context {CONTEXT} "
        f"--data.valid_share 0.1 --data.max_documents 50 --data.num_workers {num_workers} --trainer.max_steps 9999 "
        f"--trainer.val_check_interval 9999 {shape} {QUIET}",
    )
    assert line.startswith("source 'c.jsonl' cannot be read (")
    assert line.endswith("): check it, or name another")


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
        ("quantize --quantizer RTN --ckpt_path {artifact} --output out", "is quantized already"),
        (
            "quantize --quantizer RTN --ckpt_path {checkpoint} --model.init_from {artifact} --output out",
            "are two models: leave one out",
        ),
        ("quantize --quantizer RTN --ckpt_path {checkpoint} --output {artifact}", "already holds a quantized"),
        ("quantize --quantizer RTN --ckpt_path {checkpoint} --output {corpus}", "is not a quantized checkpoint"),
        ("validate --trainer.plugins W4A4Precision --ckpt_path {checkpoint}", "found no quantized linear"),
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
        assert found.startswith("x.ckpt has no clips at ['mlp_proj']: its model.quant is {'activations': 'static'")


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


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_help_names_the_options_and_what_they_mean(subcommand, capsys):
    with pytest.raises(SystemExit) as exit:
        main([subcommand, "--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    expected = [
        "Tokens of a training sequence",
        "Number of blocks",
        "Share the embedding matrix with the LM head",
        "Peak learning rate",
        "in nats per unit of kurtosis",
        "Optimizer steps at which the clips are set from the batch",
    ]
    own = {"quantize": "What turns weights into codes", "table": "Hugging Face folders, by the name of their row"}
    for words in [*expected, *([own[subcommand]] if subcommand in own else [])]:
        assert words in text, words


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--model.quant.activation_bits=5", "activation_bits", "5"),
        ("--kurtosis.weight=0.5", "weight", "0.5"),
        ("--weight_penalty.kind=linf", "kind", "linf"),
        ("--clips.bits={0: 16, 7: 8}", "'7'", "8"),
        ("--data.vocab_size=777", "vocab_size", "777"),
        ("--model.activation_checkpointing=true", "activation_checkpointing", "true"),
        ("--trainer.max_steps=12", "max_steps", "12"),
    ],
)
def test_an_override_changes_what_it_names_and_no_more(option, key, value, capsys):
    def printed(*options: str) -> list[str]:
        with pytest.raises(SystemExit):
            main(["fit", *options, "--print_config"])
        return capsys.readouterr().out.splitlines()

    plain, changed = printed("--model.quant.activations=static"), printed("--model.quant.activations=static", option)
    new = [line.strip() for line in changed if line not in plain]
    assert f"{key}: {value}" in new
    assert len(new) <= 3  # a link, or a mapping where null was
