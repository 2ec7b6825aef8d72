import json
import math
import subprocess
import sys

import heads
import mixer
import processes
import pytest
import timing
import torch
from transformers import DistilBertConfig, DistilBertModel

from modeling_grassmann import plucker


SMALL = ["--device", "cpu", "--batch_size", "2", "--length", "9", "--hidden_size", "8", "--reduced_size", "4"]
QUICK = [*SMALL, "--offsets", "1", "2", "--repeats", "2", "--warmup", "0"]


def test_peak_memory_is_the_largest_sum_of_tensors_alive_at_one_time():
    def function():
        first = torch.empty(1000)  # 4000 bytes
        second = torch.empty(500)  # 6000
        del first  # 2000
        third = torch.empty(250)  # 3000
        return second, third

    assert mixer.peak_memory(function, "cpu") == 6000
    # Once more: nothing is carried over from one measurement to the next.
    assert mixer.peak_memory(function, "cpu") == 6000


def test_peak_memory_leaves_out_what_existed_before():
    kept, freed = torch.empty(1000), [torch.empty(3000)]

    def function():
        freed.clear()
        return kept.exp()

    assert mixer.peak_memory(function, "cpu") == 4000
    assert mixer.peak_memory(lambda: kept.exp_(), "cpu") == 0


def test_peak_memory_leaves_out_what_an_earlier_measurement_left_behind():
    results = []
    assert mixer.peak_memory(lambda: results.append(torch.empty(5000)), "cpu") == 20000
    assert mixer.peak_memory(lambda: torch.empty(100), "cpu") == 400


def test_peak_memory_counts_tensors_saved_for_the_backward_and_gradients():
    values = torch.zeros(1000)
    # Two at a time without autograd; with it the result of each exp is saved.
    assert mixer.peak_memory(lambda: values.exp().exp().exp(), "cpu") == 8000
    values.requires_grad_()
    assert mixer.peak_memory(lambda: values.exp().exp().exp(), "cpu") == 12000
    # Here y = exp(x) is saved, and the gradient 1 * y is a second tensor.
    ones = torch.ones(1000)
    assert mixer.peak_memory(lambda: torch.autograd.grad(values.exp(), values, ones), "cpu") == 8000


def test_peak_memory_counts_temporaries_inside_an_operator():
    # A composite of two operators: the product, 4000 bytes, is freed within the call.
    values = torch.zeros(10, 100)
    peak = mixer.peak_memory(lambda: torch.nn.functional.cosine_similarity(values, values, dim=1), "cpu")
    assert peak >= 4000 + 40


def test_relative_error_is_the_largest_over_the_tensors():
    reference = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([1.0])]
    results = [torch.tensor([3.0, 4.5]), torch.zeros(2), torch.tensor([1.0])]
    assert mixer.relative_error(results, reference) == pytest.approx(0.1)
    assert mixer.relative_error(reference, reference) == 0
    assert math.isnan(mixer.relative_error([torch.tensor([math.nan])], [torch.tensor([1.0])]))
    assert mixer.relative_error([torch.tensor([1.0])], [torch.tensor([0.0])]) > 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_prints_and_writes_what_was_measured(dtype, tmp_path, capsys):
    output = tmp_path / "mixer.json"
    mixer.main([*QUICK, "--dtype", dtype, "--output", str(output)])
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())

    assert set(record["results"]) == {"forward", "forward+backward"}
    for backends in record["results"].values():
        assert list(backends) == ["naive", "torch", "naive/torch"]
        for backend in ("naive", "torch"):
            row = backends[backend]
            assert row["ns_per_token"] == pytest.approx(row["median_ms"] * 1e6 / 18)
            assert row["iqr_ms"] >= 0 and row["peak_bytes"] > 0
            assert f"{row['median_ms']:.2f}" in printed and f"{row['peak_bytes'] / 2**20:.2f}" in printed
        naive, collapsed = backends["naive"], backends["torch"]
        assert backends["naive/torch"]["peak_bytes"] == naive["peak_bytes"] / collapsed["peak_bytes"]
    assert record["device"] == "cpu" and f"device_name: {timing.cpu_name()}" in printed
    assert f"torch: {torch.__version__}" in printed
    assert record["dtype"] == dtype and record["offsets"] == [1, 2]
    assert "output" not in record


def test_forward_needs_less_memory_than_a_training_step():
    (args,) = mixer.HfArgumentParser(mixer.BenchmarkArguments).parse_args_into_dataclasses(QUICK)
    results = mixer.measure(mixer.build_passes(args), args)
    for backend in mixer.BACKENDS:
        assert results["forward"][backend]["peak_bytes"] < results["forward+backward"][backend]["peak_bytes"]


def test_backends_that_disagree_are_not_timed(monkeypatch, capsys):
    collapsed = plucker.BACKENDS["torch"]
    monkeypatch.setitem(plucker.BACKENDS, "torch", lambda *arguments: collapsed(*arguments) * 1.01)
    with pytest.raises(SystemExit, match="the backends disagree"):
        mixer.main(QUICK)
    assert "median" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--offsets", "0"], "`offsets` must be"),
        (["--reduced_size", "1"], "`reduced_size` must be at least 2"),
        (["--lenght", "3"], "--lenght"),
        (["--output", "/dev/null/mixer.json"], "cannot write"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        mixer.main([*QUICK, *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_a_gpu(capsys):
    mixer.main([*QUICK, "--device", "cuda"])
    assert torch.cuda.get_device_name() in capsys.readouterr().out


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """Folder of a tiny encoder."""
    folder = tmp_path_factory.mktemp("backbone")
    config = DistilBertConfig(vocab_size=50, max_position_embeddings=16, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    DistilBertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick_heads(backbone):
    sizes = ["--batch_size", "4", "--length", "9", "--repeats", "2", "--warmup", "0"]
    return ["--device", "cpu", "--backbone", backbone, *sizes]


def parse_heads(flags):
    return heads.HfArgumentParser(heads.HeadArguments).parse_args_into_dataclasses(flags)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_prints_and_writes_what_was_measured(dtype, quick_heads, tmp_path, capsys):
    output = tmp_path / "heads.json"
    heads.main([*quick_heads, "--dtype", dtype, "--output", str(output)])
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())

    assert list(record["results"]) == ["training, frozen", "training, fine-tuned", "inference"]
    for rows in record["results"].values():
        assert list(rows) == ["grassmann", "transformer", "linear"]
        for head, row in rows.items():
            assert row["examples_per_second"] == pytest.approx(4e3 / row["median_ms"]) and row["iqr_ms"] >= 0
            cells = [head, f"{record['head_parameters'][head]:,}", f"{row['median_ms']:.2f}"]
            assert any(all(cell in line for cell in cells) for line in printed.splitlines())
    # 16 weights and a bias for each of 3 classes.
    assert record["head_parameters"]["linear"] == 51
    assert record["dtype"] == dtype and record["device"] == "cpu" and record["batch_size"] == 4
    assert f"device_name: {timing.cpu_name()}" in printed and f"torch: {torch.__version__}" in printed
    assert "commit" in record and "output" not in record


@pytest.mark.parametrize("head", heads.HEADS)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_step_updates_what_is_not_frozen(head, frozen, quick_heads, backbone):
    args = parse_heads(quick_heads)
    encoder = heads.load_backbone(backbone)
    model = heads.make_model(encoder, head, frozen, "cpu")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    heads.training(model, heads.make_inputs(encoder, args), args)()
    changed = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    assert any(name.startswith("backbone.") for name in changed) is not frozen
    assert any(name.startswith("classifier.") for name in changed)
    # The encoder itself stays as it is for the next model.
    assert all(weight.equal(before[f"backbone.{name}"]) for name, weight in encoder.named_parameters())


def test_inference_keeps_no_graph_and_has_no_dropout(quick_heads, backbone):
    args = parse_heads(quick_heads)
    encoder = heads.load_backbone(backbone)
    forward = heads.inference(
        heads.make_model(encoder, "grassmann", False, "cpu"), heads.make_inputs(encoder, args), args
    )
    assert forward().shape == (4, 3) and not forward().requires_grad
    assert forward().equal(forward())


def test_examples_are_padded_on_the_right_down_to_half_of_the_longest(quick_heads, backbone):
    inputs = heads.make_inputs(heads.load_backbone(backbone), parse_heads(quick_heads))
    assert inputs["attention_mask"].sum(dim=1).tolist() == [9, 8, 6, 5]
    assert inputs["attention_mask"][:, 0].all() and inputs["input_ids"].shape == (4, 9)


def test_each_head_goes_first_in_turn(quick_heads, monkeypatch):
    calls = []
    passes = {"pass": {head: lambda head=head: calls.append(head) for head in heads.HEADS}}
    heads.measure(passes, parse_heads([*quick_heads, "--repeats", "3"]))
    assert calls[::3] == list(heads.HEADS) and sorted(calls) == sorted(heads.HEADS * 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--length", "17"], "length must be at most 16, the positions of the backbone, got 17"),
        (["--backbone", "./nowhere"], "nowhere"),
        (["--dtype", "float16"], "--dtype"),
        (["--output", "/dev/null/heads.json"], "cannot write"),
    ],
)
def test_a_wrong_argument_of_heads_is_one_line_and_exit_code_2(flags, message, quick_heads, capsys):
    with pytest.raises(SystemExit) as exit:
        heads.main([*quick_heads, *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert message in error.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_on_the_cpu_train_as_one_does(tmp_path):
    """It starts four runs of a training script."""
    output = tmp_path / "processes.json"
    sizes = {"batch_size": 8, "steps": 4, "speed_steps": 2, "speed_batch_size": 2, "eval_samples": 4}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [
        sys.executable,
        processes.__file__,
        "--recipe=configuration/quickstart/stdlib_docs.yaml",
        "--device=cpu",
        *options,
    ]
    subprocess.run([*command, f"--output={output}"], check=True, capture_output=True)
    record = json.loads(output.read_text())
    runs = record["comparison"]
    assert runs["ddp"]["device"].startswith("2 x") and len(runs["ddp"]["losses"]) == 4
    assert processes.largest_difference(runs["ddp"]["losses"], runs["one"]["losses"]) < 1e-5
    assert record["speed"]["ddp"]["tokens_per_second"] > 0


@pytest.mark.parametrize(("name", "value"), [("steps", 3), ("batch_size", 7), ("processes", 1)])
def test_a_comparison_of_processes_that_cannot_be_made_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        processes.ProcessArguments(device="cpu", **{name: value})
