"""The command line: help, overrides, and one line for every mistake, with nothing written.

``main`` is called in this process; each test has a working directory of its own, which must stay empty but for the
cache where a mistake shows only after data were read.
"""

import json
import re
from pathlib import Path

import pytest
from cli_checks import QUIET, mistake, written
from small_fit import CONTEXT, write_corpus

from lit_actreg.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
SUBCOMMANDS = ("fit", "validate", "test", "predict", "quantize", "table")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
