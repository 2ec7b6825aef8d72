import json
import re
import statistics
import sys

import numpy as np
import pytest
import report
import report_nli
from conftest import REPOSITORY
from run_records import MISSING


LABELS = ["entailment", "neutral", "contradiction"]
REFERENCES = [index % 3 for index in range(60)]


def write_run(folder, wrong, seed=0, references=REFERENCES, **metrics):
    """A run's folder as run_nli.py leaves it; its predictions are wrong for the first `wrong` items."""
    folder.mkdir(parents=True)
    predictions = [(value + (index < wrong)) % 3 for index, value in enumerate(references)]
    right = [value == prediction for value, prediction in zip(references, predictions)]
    record = {"eval_accuracy": 0.5, "test_accuracy": statistics.fmean(right), "parameters": 66_400_000}
    record |= {"head_parameters": 620_000, "seed": seed}
    for label, name in enumerate(LABELS):
        of_class = [hit for value, hit in zip(references, right) if value == label]
        record[f"test_accuracy_{name}"] = statistics.fmean(of_class)
    outcomes = {"labels": LABELS, "references": references, "predictions": predictions}
    (folder / "recipe.yaml").write_text("seed: 0\n")
    (folder / "log.jsonl").write_text('{"eval_accuracy": 0.5, "epoch": 1.0}\n')
    (folder / "metrics.json").write_text(json.dumps(record | metrics))
    (folder / "outcomes_test.json").write_text(json.dumps(outcomes))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two groups of two seeds: `a` is wrong for 6 and 12 of 60 items, `b` for 12 and 15."""
    cards = tmp_path / "cards"
    return [
        write_run(cards / "a_seed1", 12, seed=1, eval_accuracy=0.83),
        write_run(cards / "a_seed0", 6, eval_accuracy=0.80),
        write_run(cards / "b_seed0", 12, parameters=73_100_000),
        write_run(cards / "b_seed1", 15, seed=1, parameters=73_100_000),
    ]


def make_report(tmp_path, *arguments):
    report.main([*map(str, arguments), "--output", str(tmp_path / "docs" / "results")])
    assert (tmp_path / "docs" / "results.png").read_bytes().startswith(b"\x89PNG")
    return (tmp_path / "docs" / "results.md").read_text()


def error_of(capsys, tmp_path, *arguments):
    with pytest.raises(SystemExit) as exit:
        report.main([*map(str, arguments), "--output", str(tmp_path / "results")])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "results.md").exists()
    return error


def test_the_table_holds_means_and_sample_deviations_by_group(tmp_path, runs):
    text = make_report(tmp_path, *runs)
    # 0.80 and 0.83: mean 0.815, deviation 0.03 / sqrt(2); 0.90 and 0.80: mean 0.85, deviation 0.1 / sqrt(2).
    seeds = "2 ([0](../cards/a_seed0), [1](../cards/a_seed1))"
    assert f"| a | {seeds} | 0.62 | 66.40 | 81.50 ± 2.12 | 85.00 ± 7.07 | 85.00 | 85.00 | 85.00 |" in text
    assert "0.62 | 73.10 | 50.00 ± 0.00 | 77.50 ± 3.54 |" in text
    assert "| test, entailment (%) | test, neutral (%) | test, contradiction (%) |" in text
    assert MISSING not in text and "paired" not in text and str(tmp_path) not in text


def test_spread_is_the_formula_by_hand():
    assert report_nli.percent([]) == MISSING
    assert report_nli.percent([0.8511]) == "85.11"
    # Deviations -1, 0, 1 over n - 1 = 2 give 1.
    assert report_nli.percent([0.84, 0.85, 0.86]) == "85.00 ± 1.00"


def test_a_run_without_a_seed_in_its_name_is_a_group_without_spread(tmp_path):
    run = write_run(tmp_path / "alone", 6, seed=7)
    assert "| alone | 1 ([7](../alone)) | 0.62 | 66.40 | 50.00 | 90.00 |" in make_report(tmp_path, run)


def test_what_metrics_json_does_not_have_is_a_dash_and_a_note(tmp_path, runs):
    run = write_run(tmp_path / "bare_seed0", 0, head_parameters=None, test_accuracy=None)
    text = make_report(tmp_path, *runs, run)
    assert "| bare | 1 ([0](../bare_seed0)) | — | 66.40 | 50.00 | — | 100.00 |" in text
    assert "has no `head_parameters`" not in text
    assert "- The `metrics.json` of bare_seed0 has no `test_accuracy`." in text


def test_a_mean_over_some_of_the_seeds_is_noted(tmp_path, runs):
    write_run(tmp_path / "cards" / "a_seed2", 0, seed=2, test_accuracy=None)
    text = make_report(tmp_path, *runs, tmp_path / "cards" / "a_seed2")
    assert "85.00 ± 7.07" in text
    assert "- The `metrics.json` of a_seed2 has no `test_accuracy`." in text


def test_a_comparison_is_the_difference_of_the_means(tmp_path, runs, capsys):
    text = make_report(tmp_path, *runs, "--compare", "a:b", "b:a")
    # Seed 0: 54 - 48 of 60 items; seed 1: 48 - 45.
    row = re.search(r"\| a − b \| \+7\.50 \| \[\+(\d+\.\d\d), \+(\d+\.\d\d)\] \| 0: \+10\.00, 1: \+5\.00 \|", text)
    mirrored = re.search(r"\| b − a \| -7\.50 \| \[-(\d+\.\d\d), -(\d+\.\d\d)\]", text)
    low, high = map(float, row.groups())
    assert 0 < low < 7.5 < high
    assert [high, low] == pytest.approx([float(end) for end in mirrored.groups()], abs=0.5)
    assert row.group() in capsys.readouterr().out
    assert "10,000 resamples" in text


def test_identical_runs_differ_by_nothing(tmp_path):
    runs = [write_run(tmp_path / name, 13) for name in ("a", "b")]
    assert "| a − b | +0.00 | [+0.00, +0.00] | 0: +0.00 |" in make_report(tmp_path, *runs, "--compare", "a:b")
    assert report_nli.bootstrap_interval(np.zeros((3, 50), dtype=int)) == (0, 0)


def test_the_interval_is_that_of_resampled_items():
    differences = np.random.default_rng(1).choice([-1, 0, 1], size=(3, 400), p=[0.1, 0.7, 0.2])
    items = np.random.default_rng(2).integers(400, size=(10_000, 400))
    expected = np.quantile(differences.mean(axis=0)[items].mean(axis=1), [0.025, 0.975])
    assert report_nli.bootstrap_interval(differences) == pytest.approx(expected, abs=2e-3)


def test_the_interval_uses_the_pairing_and_the_average_over_seeds():
    # The seeds cancel within each item: nothing is left to chance.
    opposite = np.array([[1, -1] * 50, [-1, 1] * 50])
    assert report_nli.bootstrap_interval(opposite) == (0, 0)
    # Copies of one run are no further evidence.
    differences = np.random.default_rng(3).choice([-1, 0, 1], size=(1, 500))
    assert report_nli.bootstrap_interval(np.repeat(differences, 3, axis=0)) == report_nli.bootstrap_interval(
        differences
    )


def test_the_interval_covers_the_true_difference_about_19_times_in_20():
    generator, truth, covered = np.random.default_rng(4), 0.05, 0
    for _ in range(300):
        low, high = report_nli.bootstrap_interval(generator.choice([-1, 0, 1], size=(1, 400), p=[0.1, 0.75, 0.15]))
        covered += low <= truth <= high
    # 285 are expected; the standard deviation is 4.
    assert 270 <= covered <= 298


def test_classes_have_intervals_of_their_own_items(tmp_path, runs):
    text = make_report(tmp_path, *runs)
    table = re.search(r"\| group \| entail.*?\n\n", text, flags=re.DOTALL).group(0).splitlines()
    header, row_a, row_b = table[0], *table[2:4]
    assert header == "| group | entailment (%) | neutral (%) | contradiction (%) |"
    # Of 20 items a class, 2 and 4 are wrong for `a`. All classes are alike, and so are their intervals.
    cells = row_a.strip("| ").split(" | ")
    assert cells[0] == "a" and len(set(cells[1:])) == 1
    mean, low, high = map(float, re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", cells[1]).groups())
    assert mean == 85 and 65 < low < 80 and 90 < high <= 100
    assert row_b.startswith("| b | 77.50 [")


def test_without_outcomes_there_are_no_intervals(tmp_path, runs):
    for run in runs[:2]:
        (tmp_path / run / "outcomes_test.json").unlink()
    text = make_report(tmp_path, *runs)
    table = re.search(r"\| group \| entail.*?\n\n", text, flags=re.DOTALL).group(0)
    assert "| b |" in table and "| a |" not in table
    for run in runs[2:]:
        (tmp_path / run / "outcomes_test.json").unlink()
    text = make_report(tmp_path, *runs)
    assert "| group | entail" not in text and "By class" not in text and "intervals" not in text


def test_the_split_may_be_validation(tmp_path):
    runs = [write_run(tmp_path / name, wrong) for name, wrong in [("a", 6), ("b", 12)]]
    for run, accuracy in zip(runs, (0.9, 0.8)):
        folder = tmp_path / run
        (folder / "outcomes_test.json").rename(folder / "outcomes_validation.json")
        metrics = {"eval_accuracy": accuracy, "eval_accuracy_neutral": 0.7, "seed": 0}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    text = make_report(tmp_path, *runs, "--split", "validation", "--compare", "a:b")
    assert (
        "| a − b | +10.00 |" in text and "| validation, neutral (%) |" in text and "difference of validation" in text
    )


def test_the_picture_has_a_dot_a_seed_and_an_interval_a_comparison(tmp_path, runs, monkeypatch):
    figures = []
    save = report_nli.save_figure
    monkeypatch.setattr(report_nli, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    published = REPOSITORY / "configuration" / "published_snli.json"
    arguments = [*runs, "--compare", "a:b", "--published_accuracies", str(published)]
    report.main([*arguments, "--output", str(tmp_path / "results")])
    accuracies, differences = figures[0].axes
    dots = [line.get_xdata() for line in accuracies.lines if line.get_marker() == "o"]
    assert [list(values) for values in dots] == [pytest.approx([90, 80]), pytest.approx([80, 75])]
    diamonds = [line.get_xdata() for line in accuracies.lines if line.get_marker() == "D"]
    assert np.ravel(diamonds).tolist() == pytest.approx([85.11, 85.38, 67.94, 67.87])
    circles = [line.get_xdata() for line in differences.lines if line.get_marker() == "o"]
    assert np.ravel(circles).tolist() == pytest.approx([10, 5])
    (interval,) = [line.get_xdata() for line in differences.lines if line.get_marker() == "|"]
    assert 0 < interval[0] < 7.5 < interval[1]


@pytest.mark.parametrize("name", ["a", "snli_the_long_name_of_a_backbone_frozen_and_mean_pooled_with_a_head"])
def test_no_name_in_the_picture_is_clipped_or_covers_anything(name, tmp_path, monkeypatch):
    figures = []
    save = report_nli.save_figure
    monkeypatch.setattr(report_nli, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    runs = [write_run(tmp_path / f"{name}_{group}", 6 * group) for group in (1, 2, 3)]
    pairs = [f"{name}_1:{name}_2", f"{name}_2:{name}_3"]
    make_report(tmp_path, *runs, "--compare", *pairs)
    figures[0].canvas.draw()
    width, height = figures[0].bbox.size
    for axes in figures[0].axes:
        boxes = [text.get_window_extent() for text in (*axes.texts, axes.title, axes._left_title)]
        assert len(boxes) >= 4
        for index, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
            assert not any(box.overlaps(other) for other in boxes[:index] if other.width and box.width)
            points = [
                axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_marker() != "None"
            ]
            assert not any(box.contains(x, y) for x, y in np.concatenate(points))


def test_equal_files_give_an_equal_picture(tmp_path, runs):
    pictures = []
    for _ in range(2):
        make_report(tmp_path, *runs, "--compare", "a:b")
        pictures.append((tmp_path / "docs" / "results.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_published_figures_are_a_table_of_their_own(tmp_path, runs):
    text = make_report(tmp_path, *runs, "--published_accuracies", REPOSITORY / "configuration" / "published_snli.json")
    assert "| arXiv 2512.19428 | DistilBERT | Grassmann | 85.50 | 85.38 |" in text
    assert "| alphaXiv reproduction | DistilBERT, frozen, mean-pooled | Transformer | 67.54 | 67.94 |" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "must hold a JSON array, not a dict"),
        ("[1]", "row 1 must be a JSON object, not a int"),
        ('[{"source": "s", "backbone": "b"}]', "row 1: head is None, not a string"),
        ('[{"source": "s", "backbone": "b", "head": "h", "test": "0.9"}]', "row 1: test is '0.9', not a number"),
    ],
)
def test_a_broken_file_of_published_figures_is_an_error(content, message, tmp_path, runs, capsys):
    (tmp_path / "published.json").write_text(content)
    assert message in error_of(capsys, tmp_path, *runs, "--published_accuracies", tmp_path / "published.json")


def test_groups_that_cannot_be_compared_are_errors(tmp_path, runs, capsys):
    error = error_of(capsys, tmp_path, *runs, "--compare", "a:bb")
    assert "bb is not among the groups: did you mean b?" in error
    assert "--compare a: write the names of two groups as A:B" in error_of(capsys, tmp_path, *runs, "--compare", "a")
    error = error_of(capsys, tmp_path, *runs[:3], "--compare", "a:b")
    assert "a has the seeds 0, 1, but b 0: a paired comparison needs the same" in error
    other = [write_run(tmp_path / f"c_seed{seed}", 6, seed, references=[*REFERENCES[1:], 0]) for seed in (0, 1)]
    error = error_of(capsys, tmp_path, *runs, *other, "--compare", "a:c")
    assert "a_seed0 and c_seed0 were evaluated on different items of the test split" in error


def test_runs_that_are_no_group_are_errors(tmp_path, runs, capsys):
    run = write_run(tmp_path / "c_seed1", 0, seed=2)
    assert "seed is 2, but the name of the run says 1" in error_of(capsys, tmp_path, *runs, run)
    run = write_run(tmp_path / "a", 0, seed=1)
    assert "a_seed1 and a have the same seed, 1" in error_of(capsys, tmp_path, *runs, run)
    run = write_run(tmp_path / "d", 0, seed=None)
    assert "metrics.json has no seed" in error_of(capsys, tmp_path, *runs, run)
    run = write_run(tmp_path / "a_seed3", 0, seed=3, parameters=5)
    assert "the runs a are no group: their parameters are 5 and 66400000" in error_of(capsys, tmp_path, *runs, run)
    assert "two runs are named a_seed1" in error_of(capsys, tmp_path, *runs, runs[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no outcomes_test.json, which a comparison needs"),
        ({"predictions": REFERENCES}, "gives an accuracy of 1.000000, but metrics.json says 0.9"),
        ({"predictions": [0]}, "60 references, but 1 predictions"),
        ({"predictions": [0.5] * 60}, "predictions must hold ids of classes"),
        ({"references": []}, "references must be a list that is not empty"),
        ({"labels": LABELS[::-1]}, "were evaluated on different items"),
    ],
)
def test_broken_outcomes_are_errors(change, message, tmp_path, runs, capsys):
    path = tmp_path / "cards" / "a_seed0" / "outcomes_test.json"
    outcomes = json.loads(path.read_text())
    path.unlink()
    if change:
        path.write_text(json.dumps(outcomes | change))
    assert message in error_of(capsys, tmp_path, *runs, "--compare", "a:b")


def test_without_any_accuracy_there_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "a", 0, test_accuracy=None)
    error = error_of(capsys, tmp_path, run)
    assert "no metrics.json has a test_accuracy; try --split validation" in error


def test_without_matplotlib_the_error_names_the_extra(tmp_path, runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "modeling-grassmann[reports]"' in error_of(capsys, tmp_path, *runs)
