"""The benchmarks that are made for a GPU, run on the CPU with tiny sizes through their command lines."""

import json
import math
import subprocess
import sys

import generation
import mixer_length
import peers
import pytest
import speed_page
import timing
import torch
import training_length as training
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache


SMALL_MIXER = ["--device=cpu", "--tokens=32", "--hidden_size=16", "--head_size=8", "--reduced_size=4"]
SMALL_MIXER += ["--offsets", "1", "2", "--repeats=2", "--warmup=1"]
SMALL_TRAINING = ["--device=cpu", "--sizes=tiny", "--tokens=32", "--repeats=2", "--warmup=0", "--compile=false"]
SMALL_GENERATION = ["--device=cpu", "--sizes=tiny", "--steps=2", "--repeats=2", "--warmup=1", "--forms=plain"]
SCRIPTS = [
    (mixer_length, [*SMALL_MIXER, "--lengths", "8", "--candidates", "naive"]),
    (training, [*SMALL_TRAINING, "--lengths", "8"]),
    (generation, [*SMALL_GENERATION, "--contexts", "16", "--batch_sizes", "1"]),
]
IDS = [script.__name__ for script, _ in SCRIPTS]


def run(script, flags, folder):
    output = folder / "record.json"
    script.main([*flags, f"--output={output}"])
    return json.loads(output.read_text())


@pytest.fixture(autouse=True)
def forget_compilations():
    yield
    torch._dynamo.reset()


def test_the_mixers_operations_are_those_counted_by_hand():
    # Reduction 256 to 32; 496 planes to 256; gate 512 to 256.
    assert peers.mixer_flops(256, 32) == 2 * (256 * 32 + 496 * 256 + 512 * 256) == 532_480


def test_a_models_operations_are_those_counted_by_hand():
    grassmann = peers.make_grassmann("tiny")
    # Two layers: mixer 32 to 4, 6 planes to 32, 64 to 32; feed-forward 32 to 64 and back. Head: 32 to 100.
    layer = 2 * (32 * 4 + 6 * 32 + 64 * 32) + 2 * (32 * 64 + 64 * 32)
    assert peers.forward_flops(grassmann.config, 999) == 2 * layer + 2 * 32 * 100
    llama = peers.make_llama(grassmann, "sdpa", 64)
    hidden = llama.config.intermediate_size
    # q, k, v, o; three matrices of SwiGLU; both products of attention over half of 10 tokens.
    layer = 2 * 4 * 32 * 32 + 2 * 3 * 32 * hidden + 2 * (32 * 10) * 2 // 2
    assert peers.forward_flops(llama.config, 10) == 2 * layer + 2 * 32 * 100


def test_a_memorys_operations_are_those_counted_by_hand():
    config = peers.make_grassmann("tiny-memory").config
    # Planes of queries and keys, values, gate, decays and output, of 2 heads with r = 4 and values of 8.
    projections = 2 * 32 * (2 * 16 + 2 * 16 + 2) + 2 * 16 * 32
    # The mean token sees half of 10: four products of planes and one of values. Then 20 features, written and read.
    assert peers.memory_flops(config, 10) == projections + 2 * 2 * 5 * (4 * 4 + 8)
    assert peers.memory_flops(config, 10_000) == projections + 2 * 2 * 2 * 20 * 8
    # Feed-forward with a gate, 32 to 64, and the head.
    layer = peers.memory_flops(config, 10) + 2 * 3 * 32 * 64
    assert peers.forward_flops(config, 10) == 2 * layer + 2 * 32 * 100


def test_operations_agree_with_pytorchs_own_counter():
    grassmann = peers.make_grassmann("tiny")
    llama = peers.make_llama(grassmann, "eager", 64)
    input_ids = torch.randint(100, (1, 20))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        llama(input_ids)
    # It counts all of attention's scores, the masked half included: 2 layers * 2 * 32 * 20 more a token.
    # Some versions compute rotary angles by a small matrix product, which is no necessary one.
    expected = 20 * (peers.forward_flops(llama.config, 20) + 2 * 2 * 32 * 20)
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    for module in grassmann.modules():
        if hasattr(module, "backend"):
            module.backend = "naive"  # one offset a layer: one product
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        grassmann(input_ids)
    assert counter.get_total_flops() == 20 * peers.forward_flops(grassmann.config, 20)


PARAMETERS = {"13M": 12.57e6, "110M": 113_500_000, "tiny": 16776, "13M-memory": 12.56e6, "110M-memory": 113_500_000}


@pytest.mark.parametrize(("size", "parameters"), PARAMETERS.items())
def test_llama_has_as_many_parameters_within_one_percent(size, parameters):
    with torch.device("meta"):
        grassmann = peers.make_grassmann(size)
        llama = peers.make_llama(grassmann, "sdpa", 64)
    assert grassmann.num_parameters() == pytest.approx(parameters, rel=0.01)
    assert llama.num_parameters() == pytest.approx(grassmann.num_parameters(), rel=0.01)
    assert grassmann.config.max_position_embeddings is None and grassmann.config.hidden_dropout == 0
    if size != "tiny":
        assert llama.config.head_dim == 64 and llama.config.intermediate_size % 64 == 0


def sdpa_masks(attention):
    """Whether SDPA is given a mask, at each of its calls in a compiled forward of Llama."""
    llama = peers.make_llama(peers.make_grassmann("tiny"), attention, 64, use_cache=False)
    masks = []

    def backend(graph_module, example_inputs):
        for node in graph_module.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                masks.append((node.kwargs["attn_mask"], node.kwargs["is_causal"]))
        return graph_module

    torch._dynamo.reset()
    llama.model.compile(backend=backend)
    llama(torch.randint(100, (2, 16)))
    return masks


def test_compiled_llama_trains_with_the_flash_kernels_flag_instead_of_a_mask():
    assert sdpa_masks("sdpa_causal") == [(None, True)] * 2
    # Were it otherwise, the extra name would not be needed.
    assert all(mask is not None for mask, _ in sdpa_masks("sdpa"))


def test_attention_without_a_mask_gives_llamas_own_logits_and_is_causal():
    grassmann = peers.make_grassmann("tiny")
    input_ids = torch.randint(100, (2, 16))
    results = [peers.make_llama(grassmann, name, 64).eval()(input_ids).logits for name in ("sdpa", "sdpa_causal")]
    torch.testing.assert_close(*results)


def test_mixer_length_records_every_candidate(tmp_path, capsys):
    flags = [*SMALL_MIXER, "--lengths", "8", "16", "--static_lengths", "16", "--candidates", "naive", "mamba2"]
    record = run(mixer_length, flags, tmp_path)
    printed = capsys.readouterr().out
    # The length with a compilation of its own comes first.
    assert [row["length"] for row in record["rows"]] == [16] * 2 + [8] * 2
    for row in record["rows"]:
        assert row["shapes"] == ("static" if row["length"] == 16 else "symbolic") and row["mode"] == "calls"
        assert row["ns_per_token"] == pytest.approx(row["median_ms"] * 1e6 / 32)
        assert f"{row['ns_per_token']:.2f}" in printed
    assert "mamba2" in record["unavailable"] and "mamba2: not measured" in printed
    assert record["flops_per_token"] == 2 * (16 * 4 + 6 * 16 + 2 * 16 * 16)
    assert all(value > 0 for value in record["ceilings"].values())
    for package in timing.PACKAGES:
        assert package in record


@pytest.mark.slow
def test_compiled_layers_run_at_their_own_and_at_symbolic_sizes(tmp_path):
    """It compiles two layers twice, with and without autograd."""
    candidates = ["naive", "torch_compiled", "attention_compiled"]
    flags = [*SMALL_MIXER, "--lengths", "8", "16", "--static_lengths", "16", "--candidates", *candidates]
    record = run(mixer_length, flags, tmp_path)
    assert len(record["rows"]) == 12 and all("failed" not in row for row in record["rows"])
    assert record["parameters"]["attention_compiled"] == 4 * 16 * 16


def test_a_mixer_that_disagrees_is_not_timed(tmp_path, monkeypatch):
    from modeling_grassmann import plucker

    collapsed = plucker.BACKENDS["torch"]
    monkeypatch.setitem(plucker.BACKENDS, "torch", lambda *arguments: collapsed(*arguments) * 1.5)
    # Compilation would need a minute more to come to the same.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    record = run(mixer_length, [*SMALL_MIXER, "--lengths", "8", "--candidates", "torch_compiled", "naive"], tmp_path)
    failed = [row for row in record["rows"] if "failed" in row]
    assert [row["candidate"] for row in failed] == ["torch_compiled"]
    assert "disagrees with the naive mixer" in failed[0]["failed"]
    assert {row["candidate"] for row in record["rows"] if "failed" not in row} == {"naive"}


def test_a_mixer_is_compared_with_the_ceilings_by_its_necessary_work():
    row = {"candidate": "triton", "mode": "calls", "length": 65536}
    record = {
        "rows": [
            row | {"pass": "forward", "ns_per_token": 2.0},
            row | {"pass": "forward+backward", "ns_per_token": 8.0},
        ],
        "ceilings": {"flops_per_second": 800e12, "bytes_per_second": 4e12},
        "flops_per_token": 532_480,
        "hidden_size": 256,
        "dtype": "bfloat16",
    }
    table = mixer_length.against_ceilings(record)
    forward, both = (line.split("|") for line in table.splitlines() if "| calls" in line)
    # 532,480 / 2 ns = 266 TFLOP/s, a third of 800; 2 * 512 bytes / 2 ns = 512 GB/s, an eighth of 4,000.
    assert [cell.strip() for cell in forward[4:10]] == ["2.00", "0.67", "266", "33%", "512", "13%"]
    # 3 * 532,480 / 8 ns = 200 TFLOP/s; 5 * 512 bytes / 8 ns = 320 GB/s.
    assert [cell.strip() for cell in both[4:10]] == ["8.00", "2.00", "200", "25%", "320", "8%"]


def test_training_records_speed_and_operations_of_both_models(tmp_path, capsys):
    flags = [*SMALL_TRAINING, "--lengths", "8", "16", "--longest_seconds=0.1", "--longest_from=8"]
    record = run(training, flags, tmp_path)
    printed = capsys.readouterr().out
    assert [(row["length"], row["model"]) for row in record["rows"]] == [
        (length, model) for length in (8, 16) for model in ("grassmann", "llama")
    ]
    for row in record["rows"]:
        assert row["tokens_per_second"] == pytest.approx(32e3 / row["median_ms"]) and row["graph_breaks"] == 0
        assert f"{row['tokens_per_second']:,.0f}" in printed
    grassmann, llama = record["rows"][:2]
    ratio, operations = training.ratios(record)["tiny"][8]
    assert ratio == grassmann["tokens_per_second"] / llama["tokens_per_second"]
    assert operations == llama["flops_per_token"] / grassmann["flops_per_token"]
    assert f"{ratio:.2f}x" in printed and f"{operations:.2f}x" in printed
    for model in peers.MODELS:
        rows = [row for row in record["longest"] if row["model"] == model]
        assert [row["length"] for row in rows] == [8 * 2**index for index in range(len(rows))]
        assert all("step_seconds" in row for row in rows[:-1]) and "would take about" in rows[-1]["failed"]


def test_both_losses_of_training_are_the_same_function(monkeypatch):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("on a CPU, the fused loss needs PyTorch 2.13")
    losses = {}
    for loss in ("fused", "logits"):
        args = training.TrainingArguments(device="cpu", sizes=["tiny"], compile=False, loss=loss)
        torch.manual_seed(1)
        input_ids = torch.randint(100, (2, 16))
        for name, model in training.make_models("tiny", args).items():
            before = model.model.layers[0].mlp.up_proj.weight.clone()
            losses[loss, name] = training.make_step(model, input_ids, args)().item()
            assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    for name in peers.MODELS:
        assert losses["fused", name] == pytest.approx(losses["logits", name], rel=1e-3)


def test_generation_records_both_models_and_the_size_of_their_states(tmp_path, capsys):
    flags = [*SMALL_GENERATION, "--contexts", "16", "32", "--batch_sizes", "1", "3", "--prefill_tokens=5"]
    record = run(generation, flags, tmp_path)
    printed = capsys.readouterr().out
    assert len(record["rows"]) == 8
    for row in record["rows"]:
        assert "failed" not in row and row["median_ms"] > 0 and row["prefill_batch_size"] == row["batch_size"]
        assert f"{row['median_ms']:.3f}" in printed
        if row["model"] == "llama":
            # Keys and values, two layers, 32 numbers of two bytes.
            assert row["state_bytes"] == row["batch_size"] * row["context"] * 2 * 2 * 32 * 2
        else:
            assert row["state_bytes"] < 1000 * row["batch_size"]
    sizes = {row["state_bytes"] for row in record["rows"] if (row["model"], row["batch_size"]) == ("grassmann", 3)}
    assert len(sizes) == 1


def test_decoding_goes_on_where_the_cache_ends_and_does_not_run_past_it():
    args = generation.GenerationArguments(device="cpu", sizes=["tiny"], contexts=[40], steps=2, repeats=3, warmup=1)
    assert args.decoded == 8
    with torch.no_grad():
        for model in generation.make_models("tiny", args).values():
            cache = generation.filled_cache(model, 2, 40, args)
            assert int(cache.get_seq_length()) == 32
            decode = generation.make_decoding(model, cache, 2, 32, form="plain", steps=args.steps)
            for _ in range(args.warmup_runs + args.repeats):
                decode()
            assert int(cache.get_seq_length()) == 40


def test_a_state_made_in_parts_is_that_of_one_prefill():
    args = generation.GenerationArguments(device="cpu", contexts=[40], steps=2, repeats=3, warmup=1, prefill_tokens=14)
    model = peers.make_grassmann("tiny").eval()
    with torch.no_grad():
        torch.manual_seed(3)
        cache = generation.filled_cache(model, 2, 40, args)
        torch.manual_seed(3)
        lengths = [7, 7, 7, 7, 4]
        input_ids = torch.cat([generation.random_ids(model, 2, length) for length in lengths], dim=1)
        whole = DynamicCache(config=model.config)
        model(input_ids, past_key_values=whole)
    for part, layer in zip(cache.layers, whole.layers):
        torch.testing.assert_close(part.keys, layer.keys)
        assert part.values.equal(layer.values)


@pytest.mark.slow
def test_compiled_decoding_gives_the_tokens_of_plain_decoding(tmp_path):
    """It compiles both models."""
    args = generation.GenerationArguments(device="cpu", sizes=["tiny"], contexts=[40], steps=4, repeats=3, warmup=1)
    tokens = {}
    with torch.no_grad():
        for name, model in generation.make_models("tiny", args).items():
            for form in ("plain", "compiled"):
                torch.manual_seed(5)
                cache = generation.filled_cache(model, 2, 40, args)
                decode = generation.make_decoding(model, cache, 2, 24, form, steps=4)
                tokens[name, form] = torch.stack([decode().clone() for _ in range(3)])
            assert tokens[name, "compiled"].equal(tokens[name, "plain"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", ["tiny", "tiny-memory"])
def test_a_graph_of_a_step_decodes_the_tokens_of_compiled_decoding(size):
    args = generation.GenerationArguments(sizes=[size], contexts=[40], steps=1, forms=["compiled", "graph"], repeats=9)
    tokens = {}
    with torch.no_grad():
        for name, model in generation.make_models(size, args).items():
            for form, tokens_before in (("compiled", 0), ("graph", timing.CAPTURE_CALLS)):
                torch.manual_seed(5)
                torch._dynamo.reset()
                cache = generation.filled_cache(model, 2, 40, args)
                decode = generation.make_decoding(model, cache, 2, 40 - args.decoded, form, steps=1)
                tokens[form] = torch.cat([decode().clone() for _ in range(8 - tokens_before)], dim=1)
                assert int(cache.get_seq_length()) == 40 - args.decoded + 8
            assert tokens["compiled"][:, timing.CAPTURE_CALLS :].equal(tokens["graph"]), name


@pytest.mark.parametrize(("script", "flags"), SCRIPTS, ids=IDS)
def test_each_script_draws_what_it_measured_and_draws_a_record_again(script, flags, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is missing: the extra `reports`")
    record, picture, again = (tmp_path / name for name in ("record.json", "first.png", "again.png"))
    script.main([*flags, f"--output={record}", f"--plot={picture}"])
    first = capsys.readouterr().out
    script.main([f"--from_json={record}", f"--plot={again}"])
    # The tables come last, and are all that a record prints.
    assert first.endswith(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert picture.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("script", "flags"), SCRIPTS, ids=IDS)
def test_rows_are_in_the_file_before_the_next_is_measured(script, flags, tmp_path, monkeypatch):
    """So that a run that is killed leaves them."""
    output = tmp_path / "record.json"
    measure, written = script.measure, []

    def watched(args, record):
        for _ in measure(args, record):
            yield
            if record["rows"]:
                written.append(json.loads(output.read_text())["rows"] == record["rows"])

    monkeypatch.setattr(script, "measure", watched)
    rows = run(script, flags, tmp_path)["rows"]
    assert written and all(written)
    assert rows and all("failed" not in row for row in rows)


@pytest.mark.parametrize(("script", "flags"), SCRIPTS, ids=IDS)
def test_a_time_limit_ends_a_run_between_rows_and_says_so(script, flags, tmp_path, capsys):
    record = run(script, [*flags, "--time_limit=0"], tmp_path)
    assert record["rows"] == [] and "after 0 s" in record["stopped"]
    assert f"Stopped {record['stopped']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (mixer_length, ["--candidates", "mamba9"], "mamba9"),
        (mixer_length, ["--lengths", "0"], "lengths must be at least 1, got 0"),
        (training, ["--sizes", "7B"], "7B"),
        (training, ["--tokens=0"], "tokens must be at least 1, got 0"),
        (generation, ["--forms", "graph"], "graph is a form of decoding on a GPU, got the device cpu"),
        (generation, ["--contexts", "100"], "contexts must be more than the 184 decoded tokens, got 100"),
        (generation, ["--from_json=./nowhere.json"], "nowhere.json"),
        (training, ["--output=/dev/null/training.json"], "cannot write"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(script, flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        script.main(["--device=cpu", *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_missing_matplotlib_is_found_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit:
        training.main([*SMALL_TRAINING, "--plot=picture.png"])
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert 'pip install "modeling-grassmann[reports]"' in printed.err and printed.out == ""


def test_slow_functions_are_timed_three_times_and_all_take_turns():
    calls = []
    args = timing.SweepArguments(device="cpu", repeats=5, seconds=0)
    times, _ = timing.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, args)
    assert calls == list("abcbcacab") and all(len(values) == 3 for values in times.values())
    calls.clear()
    args = timing.SweepArguments(device="cpu", repeats=5, seconds=math.inf)
    timing.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, args)
    assert sorted(calls) == sorted("abc" * 5)


def test_one_function_that_fails_does_not_take_the_others_times(tmp_path):
    calls = []

    def fails_later():
        calls.append(0)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    args = timing.SweepArguments(device="cpu", repeats=4)
    times, failures = timing.take_turns({"a": fails_later, "b": lambda: None}, args)
    assert failures == {"a": "does not fit in memory"} and len(calls) == 2
    assert list(times) == ["b"] and len(times["b"]) == 4


def test_the_page_on_speed_is_written_from_the_records():
    records = {module.__name__: speed_page.load_records(module) for _, module, _, _ in speed_page.SECTIONS}
    assert speed_page.page(records) == (speed_page.DOCS / "speed.md").read_text(encoding="utf-8")


def test_scripts_start_outside_of_the_tests():
    process = subprocess.run([sys.executable, mixer_length.__file__, "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "--static_lengths" in process.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_call_is_replayed_on_its_inputs():
    values = torch.ones(8, device="cuda")
    results = torch.empty_like(values)
    replay = timing.capture(lambda: results.copy_(values * 2))
    values.fill_(5)
    replay()
    assert results.tolist() == [10] * 8
