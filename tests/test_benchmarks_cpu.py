# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training and decoding on a CPU measures what it says."""

import json

import pytest
import torch
import training_cpu


QUICK = ["--size", "tiny", "--batch_size", "2", "--length", "9", "--batch_sizes", "1", "3", "--contexts", "5", "20"]
QUICK += ["--steps", "3", "--repeats", "2", "--warmup", "0"]


def parse(flags):
    return training_cpu.HfArgumentParser(training_cpu.TrainingArguments).parse_args_into_dataclasses(flags)[0]


def test_prints_and_writes_what_was_measured(tmp_path, capsys):
    output = tmp_path / "training_cpu.json"
    training_cpu.main([*QUICK, "--output", str(output)])
    printed, record = capsys.readouterr().out, json.loads(output.read_text())
    assert f"torch: {torch.__version__}" in printed and "commit" in record and record["dropout"] == 0
    sizes = {(row["pass"], row["batch_size"], row["length"]) for row in record["rows"]}
    assert sizes == {("training", 2, 9)} | {("decoding", b, t) for b in (1, 3) for t in (5, 20)}
    # GPT-2 decodes only.
    assert len(record["rows"]) == 3 + 4 * 4
    times = {(row["pass"], row["batch_size"], row["length"], row["model"]): row["median_ms"] for row in record["rows"]}
    for row in record["rows"]:
        llama = times[row["pass"], row["batch_size"], row["length"], "llama"]
        assert row["of_llama"] == pytest.approx(row["median_ms"] / llama) and row["iqr_ms"] >= 0
        cells = (row["pass"], row["model"], f"{row['median_ms']:.2f}", f"{row['of_llama']:.2f}")
        assert any(all(cell in line for cell in cells) for line in printed.splitlines())


def test_the_models_have_one_size_and_the_offsets_that_their_names_say():
    models = training_cpu.make_models(parse([*QUICK, "--size", "13M"]))
    target = models["grassmann, six offsets a layer"].num_parameters()
    for name in ("llama", "grassmann, one offset a layer"):
        assert models[name].num_parameters() == pytest.approx(target, rel=0.01)
    offsets = {
        name: [layer.mixer.offsets for layer in model.model.layers] for name, model in models.items() if "off" in name
    }
    assert offsets["grassmann, six offsets a layer"] == [training_cpu.OFFSETS] * 6
    assert offsets["grassmann, one offset a layer"] == [[offset] for offset in training_cpu.OFFSETS]


def test_a_training_step_runs_backward_through_every_weight_of_the_body():
    args = parse(QUICK)
    for name, model in training_cpu.make_models(args).items():
        if name == "gpt2":
            continue
        seen = set()
        for key, weight in model.model.named_parameters():
            weight.register_hook(lambda gradient, seen=seen, key=key: seen.add(key))
        training_cpu.training(model, args)()()
        assert seen == {key for key, _ in model.model.named_parameters()} - {"embed_tokens.weight"}
        assert model.training and all(weight.grad is None for weight in model.parameters())


def test_each_run_decodes_the_same_tokens_from_the_same_state_as_without_one():
    for model in training_cpu.make_models(parse(QUICK)).values():
        prepare = training_cpu.decoding(model, batch_size=2, context=7, steps=4)
        tokens = prepare()()
        assert tokens.equal(prepare()()) and tokens.shape == (2, 5) and not model.training
        ids = torch.randint(model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": False, "eos_token_id": None}
        assert tokens.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 7:])


def test_each_model_goes_first_in_turn():
    calls = []
    prepares = {name: lambda name=name: lambda: calls.append(name) for name in ("llama", "b", "c")}
    training_cpu.measure(prepares, parse([*QUICK, "--repeats", "3"]))
    assert calls == ["llama", "b", "c", "b", "c", "llama", "c", "llama", "b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--contexts", "0"], "contexts must be at least 1, got 0"),
        (["--size", "7B"], "size must be of 13M"),
        (["--device", "cuda"], "--device"),
        (["--output", "/dev/null/training_cpu.json"], "cannot write"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        training_cpu.main([*QUICK, *flags])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
