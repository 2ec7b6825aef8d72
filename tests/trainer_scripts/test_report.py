import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import report
import run_clm
from conftest import REPOSITORY
from run_records import MARKERS, MISSING, curve_style


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
    assert MISSING not in text
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


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.sources, self.open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open = tag
        self.sources += [value for name, value in attributes if name in ("src", "srcset") or tag == "link"]

    def handle_data(self, data):
        if self.open in ("td", "th", "a"):
            self.cells.append(data.strip())


def test_the_page_holds_the_table_and_the_picture(tmp_path, runs):
    make_report(tmp_path, *runs, "--baseline", "base")
    page = Page((tmp_path / "docs" / "results.html").read_text(encoding="utf-8"))
    assert {"base", "other", "12.63", "100.00", "95.25", "+10.0", "baseline"} <= set(page.cells)
    # Nothing comes from outside.
    (source,) = page.sources
    prefix = "data:image/png;base64,"
    assert source.startswith(prefix)
    assert base64.b64decode(source.removeprefix(prefix)) == (tmp_path / "docs" / "results.png").read_bytes()


def test_text_of_runs_is_no_html(tmp_path, runs):
    run = write_run(tmp_path / "cards" / "<script>alert(1)", [120.0], eval_perplexity=120.0, seed=0)
    make_report(tmp_path, *runs, run)
    assert "<script>" not in (tmp_path / "docs" / "results.html").read_text(encoding="utf-8")


def test_language_models_and_classifiers_come_together(tmp_path, runs):
    classifiers = [
        write_run(
            tmp_path / "cards" / f"nli_seed{seed}", [], eval_accuracy=0.8 + seed / 100, test_accuracy=0.7, seed=seed
        )
        for seed in (0, 1)
    ]
    text = make_report(tmp_path, *runs, *classifiers, "--baseline", "base")
    assert text.index("## Language models") < text.index("| other |") < text.index("## Classifiers")
    assert "80.50 ± 0.71" in text
    for name in ("results.png", "results_accuracy.png"):
        assert name in text and (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")
    assert len(Page((tmp_path / "docs" / "results.html").read_text()).sources) == 2


def test_options_of_the_other_kind_are_errors(tmp_path, runs, capsys):
    output = ["--output", str(tmp_path / "results")]
    assert "there are none among the runs; try --baseline" in error_of(capsys, *runs, *output, "--compare", "a:b")
    classifier = write_run(tmp_path / "cards" / "nli", [], test_accuracy=0.7, seed=0)
    assert "try --compare" in error_of(capsys, classifier, *output, "--baseline", "nli")


def test_published_perplexities_have_the_gaps_of_their_sources(tmp_path, runs):
    published = REPOSITORY / "configuration" / "published_wikitext2.json"
    text = make_report(tmp_path, *runs, "--published_perplexities", str(published))
    # 275.7 / 248.4 and 253.76 / 181.66.
    assert "| arXiv 2512.19428 | grassmann | 6 | 128 | 13.00 | 275.70 | +11.0 |" in text
    assert "| alphaXiv reproduction | grassmann | 6 | 128 | 12.61 | 253.76 | +39.7 |" in text
    assert text.count("| baseline |") == 7


def test_gaps_after_each_epoch_stand_beside_published_ones(tmp_path, runs):
    published = str(REPOSITORY / "configuration" / "published_wikitext2.json")
    text = make_report(tmp_path, *runs, "--baseline", "base", "--published_perplexities", published)
    rows = re.findall(r"^\| (\d+) \| (\d+\.\d+) \| (\S+) \|$", text, flags=re.MULTILINE)
    assert rows == [("1", "900.00", "+0.0"), ("2", "200.00", "-45.0"), ("3", "100.00", "+20.0")]
    # Only then: without published figures, the tables stay short.
    assert "after each epoch, and" not in make_report(tmp_path, *runs, "--baseline", "base")


def test_step_times_are_a_column_and_an_axis(tmp_path, runs, figures):
    rows = [
        {"recipe": "base", "mode": "eager", "tokens_per_step": 8192, "seconds_per_step": 0.5},
        {"recipe": "base", "mode": "compile", "tokens_per_step": 8192, "seconds_per_step": 0.25},
        {"recipe": "base", "mode": "graphs", "failed": "needs a CUDA device"},
    ]
    (tmp_path / "steps.json").write_text(json.dumps(rows))
    text = make_report(tmp_path, *runs, "--step_times", str(tmp_path / "steps.json"))
    table = [line.split(" | ") for line in text.splitlines() if line.startswith(("| base", "| other"))]
    # By the fastest way.
    assert [row[-1].strip("| ") for row in table] == ["32,768", MISSING]
    by_epoch, by_time = figures
    assert len(by_epoch.axes[0].lines) == 2
    (line,) = by_time.axes[0].lines
    # 10 steps an epoch.
    assert list(line.get_xdata()) == pytest.approx([2.5 / 60, 5 / 60, 7.5 / 60])
    assert (tmp_path / "docs" / "results_time.png").exists() and "](results_time.png)" in text


def test_cells_of_a_matrix_are_compared_with_the_baseline_of_their_size(tmp_path, figures):
    perplexities = {"lm_a_6l_L128": 110.0, "lm_base_6l_L128": 100.0, "lm_a_12l_L256": 99.0, "lm_base_12l_L256": 90.0}
    cells = [
        write_run(tmp_path / f"{name}_seed0", [value], eval_perplexity=value, test_perplexity=value, seed=0)
        for name, value in perplexities.items()
    ]
    text = make_report(tmp_path, *cells, "--baseline", "lm_base")
    first, second = text.split("## 12 layers, blocks of 256")
    assert "## 6 layers, blocks of 128" in first
    assert "lm_a_6l_L128" in first and "validation gap to lm_base_6l_L128 (%)" in first and "+10.0" in first
    assert "lm_a_12l_L256" in second and "validation gap to lm_base_12l_L256 (%)" in second and "+10.0" in second
    assert [len(figure.axes[0].lines) for figure in figures] == [2, 2]
    # Without a baseline, all are one table.
    assert "##" not in make_report(tmp_path, *cells).removeprefix("# ")


def test_a_baseline_that_some_cells_lack_is_an_error(tmp_path, capsys):
    cells = [
        write_run(tmp_path / name, [9.0], eval_perplexity=9.0, seed=0)
        for name in ("lm_base_6l_L128_seed0", "lm_a_12l_L256_seed0")
    ]
    message = error_of(capsys, *cells, "--baseline", "lm_base", "--output", str(tmp_path / "results"))
    assert "the baseline lm_base_12l_L256 is not among the models" in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 must be a JSON object, not a int"),
        ([{"source": "a"}], "row 1: model is None, not a string"),
        ([{"source": "a", "model": "b", "layers": 6, "block": 128, "parameters": 1}], "row 1 has no perplexity"),
    ],
)
def test_a_wrong_file_of_published_perplexities_is_an_error(row, message, tmp_path, runs, capsys):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(row))
    arguments = [*runs, "--output", str(tmp_path / "results"), "--published_perplexities", str(path)]
    assert message in error_of(capsys, *arguments)


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


@pytest.mark.parametrize("perplexities", [[], [math.inf]])
def test_without_any_curve_there_is_a_table_without_a_picture(perplexities, tmp_path):
    run = write_run(tmp_path / "cards" / "silent", perplexities, eval_perplexity=50.0, seed=0)
    (tmp_path / "steps.json").write_text(
        json.dumps([{"recipe": "silent", "mode": "eager", "tokens_per_step": 8192, "seconds_per_step": 0.5}])
    )
    published = str(REPOSITORY / "configuration" / "published_wikitext2.json")
    options = ["--baseline", "silent", "--published_perplexities", published]
    text = make_report(tmp_path, run, *options, "--step_times", str(tmp_path / "steps.json"))
    assert "| silent | 1 ([0](../cards/silent)) | — | 50.00 | — | baseline | 16,384 |" in text
    assert text.count("- There is no picture: no `log.jsonl` has a finite `eval_perplexity`") == 1
    assert "![" not in text and not list((tmp_path / "docs").glob("*.png"))
    assert "50.00" in Page((tmp_path / "docs" / "results.html").read_text(encoding="utf-8")).cells


def test_a_training_without_evaluations_in_between_is_reported(tmp_path, tiny_run):
    folder = tmp_path / "base"
    run_clm.main([*tiny_run, "--do_train", "--do_eval", "--max_steps=1", f"--output_dir={folder}"])
    metrics = json.loads((folder / "metrics.json").read_text())
    text = make_report(tmp_path, str(folder))
    assert f"| {metrics['eval_perplexity']:.2f} |" in text and "There is no picture" in text


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


def test_curves_of_one_picture_are_told_apart():
    for markers in (MARKERS, MARKERS[1:]):
        styles = [curve_style(index, markers) for index in range(36)]
        assert len({(style["color"], style["linestyle"], style["marker"]) for style in styles}) == 36
