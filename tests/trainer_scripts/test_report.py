import json
import math
import sys

import pytest
import report


def write_run(folder, perplexities, **metrics):
    """A run's folder as run_clm.py leaves it: one evaluation an epoch, then one of the best model."""
    folder.mkdir(parents=True)
    log = []
    for epoch, perplexity in enumerate(perplexities, start=1):
        log.append({"loss": 5.0, "epoch": epoch - 0.5, "step": 10 * epoch - 5})
        log.append({"eval_perplexity": perplexity, "epoch": float(epoch), "step": 10 * epoch})
    log.append({"train_runtime": 1.0, "epoch": float(len(perplexities)), "step": 10 * len(perplexities)})
    log.append({**log[-1], "eval_perplexity": min(perplexities, default=1.0)})
    del log[-1]["train_runtime"]
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two runs: a baseline and one whose validation perplexity is 10% above its."""
    base = {"eval_perplexity": 100.0, "test_perplexity": 95.25, "parameters": 12_634_912, "seed": 0}
    other = {"eval_perplexity": 110.0, "test_perplexity": 104.0, "parameters": 18_160_000, "seed": 3}
    return [
        write_run(tmp_path / "cards" / "base", [900.0, 200.0, 100.0], **base),
        write_run(tmp_path / "cards" / "other", [900.0, 110.0, 120.0], **other),
    ]


@pytest.fixture
def figures(monkeypatch):
    """The matplotlib figures that are drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn, create = [], figure.Figure.__init__

    def remember(self, *args, **kwargs):
        drawn.append(self)
        create(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "__init__", remember)
    return drawn


def make_report(tmp_path, *arguments):
    report.main([*arguments, "--output", str(tmp_path / "docs" / "results")])
    return (tmp_path / "docs" / "results.md").read_text()


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        report.main(list(arguments))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_the_table_holds_the_figures_of_metrics_json(tmp_path, runs):
    text = make_report(tmp_path, *runs, "--baseline", "base")
    assert "| base | 1 ([0](../cards/base)) | 12.63 | 100.00 | 95.25 | baseline |" in text
    assert "| other | 1 ([3](../cards/other)) | 18.16 | 110.00 | 104.00 | +10.0 |" in text
    assert "validation gap to base (%)" in text
    assert report.MISSING not in text
    assert str(tmp_path) not in text


def test_without_a_baseline_there_is_no_gap(tmp_path, runs):
    text = make_report(tmp_path, *runs)
    assert "gap" not in text
    assert "| other | 1 ([3](../cards/other)) | 18.16 | 110.00 | 104.00 |" in text


def test_seeds_of_a_model_are_one_row_and_one_curve(tmp_path, runs, figures):
    for seed, perplexity in enumerate((102.0, 104.0, 106.0)):
        metrics = {"eval_perplexity": perplexity, "test_perplexity": 90.0 - seed, "parameters": 12_000_000}
        runs.append(
            write_run(tmp_path / "cards" / f"many_seed{seed}", [120.0 + seed, perplexity], **metrics, seed=seed)
        )
    text = make_report(tmp_path, *runs, "--baseline", "base")
    seeds = ", ".join(f"[{seed}](../cards/many_seed{seed})" for seed in range(3))
    # 102, 104, 106: deviations -2, 0, 2 over n - 1 = 2 give 2.
    assert f"| many | 3 ({seeds}) | 12.00 | 104.00 ± 2.00 | 89.00 ± 1.00 | +4.0 |" in text
    curves = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert curves["many"] == [[1, 121], [2, 104]]


def test_a_curve_is_the_mean_only_where_all_seeds_were_evaluated(tmp_path, runs, figures):
    for seed, curve in enumerate(([120.0, 110.0], [100.0])):
        runs.append(write_run(tmp_path / "cards" / f"some_seed{seed}", curve, seed=seed))
    make_report(tmp_path, *runs)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert curves["some"] == [[1, 110]]


def test_runs_that_cannot_be_one_model_are_errors(tmp_path, runs, capsys):
    cards, output = tmp_path / "cards", ["--output", str(tmp_path / "results")]
    same = [write_run(cards / name, [9.0], seed=1) for name in ("twice", "twice_seed1")]
    assert "twice and twice_seed1 have the same seed, 1" in error_of(capsys, *same, *output)
    sizes = [write_run(cards / f"size_seed{seed}", [9.0], parameters=10 + seed, seed=seed) for seed in (0, 1)]
    assert "the runs size are no group: their parameters are 10 and 11" in error_of(capsys, *sizes, *output)
    unknown = write_run(cards / "unknown", [9.0])
    assert "has no seed" in error_of(capsys, unknown, *output)


def test_a_missing_figure_is_a_dash_and_a_note(tmp_path, runs):
    run = write_run(tmp_path / "cards" / "bare", [120.0], eval_perplexity=120.0, test_perplexity=None, seed=0)
    text = make_report(tmp_path, *runs, run, "--baseline", "base")
    assert "| bare | 1 ([0](../cards/bare)) | — | 120.00 | — | +20.0 |" in text
    assert "- The `metrics.json` of bare has no `parameters`." in text
    assert "- The `metrics.json` of bare has no `test_perplexity`." in text


def test_a_diverged_run_has_no_gap(tmp_path, runs):
    run = write_run(tmp_path / "cards" / "diverged", [math.inf, 500.0], eval_perplexity=math.inf, seed=0)
    text = make_report(tmp_path, *runs, run, "--baseline", "base")
    assert "| diverged | 1 ([0](../cards/diverged)) | — | inf | — | — |" in text
    assert "- diverged (—): no gap" in text
    assert "- diverged: infinite or undefined perplexities are not drawn." in text


def test_curves_are_the_evaluations_during_training(tmp_path, runs, figures):
    make_report(tmp_path, *runs, "--baseline", "base")
    (axes,) = figures[0].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    # The evaluation of the best model after the training is no point of its curve.
    assert curves == {"base": [[1, 900], [2, 200], [3, 100]], "other": [[1, 900], [2, 110], [3, 120]]}
    assert axes.get_yscale() == "log"
    assert "epoch" in axes.get_xlabel() and "perplexity" in axes.get_ylabel()


def test_the_axis_leaves_out_first_epochs_but_no_run(tmp_path, runs, figures):
    text = make_report(tmp_path, *runs)
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom < 100 and 120 < top < 200
    assert "above a perplexity of 176 lie outside" in text


def test_equal_files_give_an_equal_picture(tmp_path, runs):
    pictures = []
    for _ in range(2):
        make_report(tmp_path, *runs)
        pictures.append((tmp_path / "docs" / "results.png").read_bytes())
    assert pictures[0].startswith(b"\x89PNG") and pictures[0] == pictures[1]


def test_a_run_without_evaluations_is_in_the_table_only(tmp_path, runs, figures):
    run = write_run(tmp_path / "cards" / "silent", [], eval_perplexity=50.0, seed=0)
    text = make_report(tmp_path, *runs, run)
    assert "| silent | 1 ([0](../cards/silent)) |" in text
    assert "- silent: its `log.jsonl` has no `eval_perplexity`" in text
    assert [line.get_label() for line in figures[0].axes[0].lines] == ["other", "base"]


def test_without_any_curve_there_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "silent", [], seed=0)
    assert "nothing to plot" in error_of(capsys, run, "--output", str(tmp_path / "results"))
    assert not (tmp_path / "results.md").exists()


@pytest.mark.parametrize("name", ["recipe.yaml", "log.jsonl", "metrics.json"])
def test_a_folder_without_one_of_the_files_is_an_error(name, tmp_path, runs, capsys):
    (tmp_path / "cards" / "other" / name).unlink()
    error = error_of(capsys, *runs, "--output", str(tmp_path / "results"))
    assert f"{runs[1]} is not the folder of a run: it has no {name}" in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "{", "metrics.json is not JSON"),
        ("metrics.json", "[1]", "metrics.json must hold a JSON object, not a list"),
        ("metrics.json", '{"seed": "a"}', "metrics.json: seed is 'a', not a number"),
        ("log.jsonl", '{"epoch": 1}\n{"epo', "log.jsonl, line 2 is not JSON"),
        ("log.jsonl", '{"epoch": 1, "eval_perplexity": "a"}', "log.jsonl: eval_perplexity is 'a', not a number"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(name, content, message, tmp_path, runs, capsys):
    (tmp_path / "cards" / "other" / name).write_text(content)
    assert message in error_of(capsys, *runs, "--output", str(tmp_path / "results"))


def test_wrong_arguments_are_errors(tmp_path, runs, capsys):
    output = ["--output", str(tmp_path / "results")]
    error = error_of(capsys, *runs, *output, "--baseline", "bas")
    assert "the baseline bas is not among the models: did you mean base?" in error
    assert "two runs are named base" in error_of(capsys, *runs, runs[0], *output)
    assert "--output" in error_of(capsys, *runs)
    assert "cannot make the folder" in error_of(capsys, *runs, "--output", f"{runs[0]}/log.jsonl/results")


def test_without_matplotlib_the_error_names_the_extra(tmp_path, runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = error_of(capsys, *runs, "--output", str(tmp_path / "results"))
    assert 'pip install "modeling-grassmann[reports]"' in error
