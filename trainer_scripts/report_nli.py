"""Tables and a picture of classifiers of sentence pairs, from the files that runs of `run_nli.py` leave behind: see
`report.py`."""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from arguments import UserError, closest
from run_records import (
    COLOURS,
    MISSING,
    PREFIXES,
    Group,
    Run,
    group_runs,
    load_published,
    millions,
    new_figure,
    notes_on_missing,
    parse_json,
    read,
    save_figure,
    seeds_cell,
    spread,
    table_head,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESAMPLES = 10_000
PUBLISHED_COLOUR = "0.35"
# Heights of the picture's rows and of what surrounds each panel, in inches.
ROW, MARGIN = 0.5, 0.95


@dataclass
class Comparison:
    """Difference of two groups' mean accuracies, first minus second, as fractions.

    Attributes:
        by_seed: the differences of runs of one seed. Their mean is the difference.
        interval: ends of the paired 95% interval.
    """

    first: Group
    second: Group
    by_seed: dict[int, float]
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        return statistics.fmean(self.by_seed.values())


def percent(fractions: list[float]) -> str:
    return spread([100 * value for value in fractions])


def results_table(groups: list[Group], split: str, parent: Path) -> str:
    """Markdown table of the groups, in the order given, and a note on every figure that is missing.

    Args:
        split: whose accuracies by class are shown, as means over the seeds.
        parent: folder of the document, from which the runs are linked.
    """
    prefix = f"{PREFIXES[split]}_accuracy_"
    keys = [key for group in groups for run in group.runs.values() for key in run.metrics if key.startswith(prefix)]
    classes = list(dict.fromkeys(key.removeprefix(prefix) for key in keys))
    header = ["group", "seeds", "head parameters (M)", "parameters (M)", "validation accuracy (%)"]
    header += ["test accuracy (%)", *(f"{split}, {label} (%)" for label in classes)]
    lines = table_head(header)
    notes = []
    for group in groups:
        cells = [group.name, seeds_cell(group, parent)]
        cells += [millions(group.size(key)) for key in ("head_parameters", "parameters")]
        cells += [percent(list(group.values(f"{key}_accuracy").values())) for key in PREFIXES.values()]
        for label in classes:
            values = group.values(prefix + label).values()
            cells.append(f"{100 * statistics.fmean(values):.2f}" if values else MISSING)
        lines.append(f"| {' | '.join(cells)} |")
        # Not `head_parameters`: a model without a backbone has no head.
        shown = ["parameters", "eval_accuracy", "test_accuracy", *(prefix + key for key in classes)]
        notes += notes_on_missing(group, shown)
    return "\n".join(lines + (["", *notes] if notes else []))


def find_group(groups: dict[str, Group], name: str) -> Group:
    if name not in groups:
        raise UserError(f"--compare: {name} is not among the groups: {closest(name, groups)}")
    return groups[name]


def load_outcomes(run: Run, split: str) -> dict[str, Any]:
    """Content of `outcomes_<split>.json`, its ids as arrays.

    Raises:
        UserError: if it is missing, broken, or does not give the accuracy of `metrics.json`.
    """
    path = run.folder / f"outcomes_{split}.json"
    if not path.is_file():
        raise UserError(f"{run.folder} has no {path.name}, which a comparison needs")
    outcomes = parse_json(read(path), str(path))
    for key in ("labels", "references", "predictions"):
        if not isinstance(outcomes.get(key), list) or not outcomes[key]:
            raise UserError(f"{path}: {key} must be a list that is not empty")
    for key in ("references", "predictions"):
        # A bool is an int in Python.
        if not all(type(value) is int for value in outcomes[key]):
            raise UserError(f"{path}: {key} must hold ids of classes, which are integers")
        outcomes[key] = np.array(outcomes[key])
    if len(outcomes["references"]) != len(outcomes["predictions"]):
        raise UserError(
            f"{path}: {len(outcomes['references'])} references, but {len(outcomes['predictions'])} predictions"
        )
    accuracy = (outcomes["references"] == outcomes["predictions"]).mean()
    recorded = run.number(f"{PREFIXES[split]}_accuracy")
    # Metrics may have been computed in float32.
    if recorded is None or not math.isclose(accuracy, recorded, abs_tol=1e-6):
        raise UserError(f"{path} gives an accuracy of {accuracy:.6f}, but metrics.json says {recorded}")
    return outcomes


def group_hits(group: Group, split: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """
    Names of the classes, the class of each item of a split, and whether each run was right: 1 or 0, (seeds, items).

    Raises:
        UserError: if the outcomes of a run are missing or broken, or those of the runs are of different items.
    """
    members = [load_outcomes(run, split) for run in group.runs.values()]
    labels, references = members[0]["labels"], members[0]["references"]
    for run, member in zip(group.runs.values(), members):
        if member["labels"] != labels or not np.array_equal(member["references"], references):
            known = next(iter(group.runs.values())).name
            raise UserError(f"{known} and {run.name} were evaluated on different items of the {split} split")
    return labels, references, np.array([member["predictions"] == references for member in members], dtype=int)


def compare(first: Group, second: Group, split: str) -> Comparison:
    """Compare two groups on the items of a split.

    Raises:
        UserError: if the seeds of the groups differ, or the outcomes of the runs are missing or of other items.
    """
    if list(first.runs) != list(second.runs):
        seeds = [", ".join(map(str, group.runs)) for group in (first, second)]
        raise UserError(
            f"{first.name} has the seeds {seeds[0]}, but {second.name} {seeds[1]}: a paired comparison needs the same"
        )
    (labels, references, hits), (other_labels, other_references, other_hits) = (
        group_hits(group, split) for group in (first, second)
    )
    if labels != other_labels or not np.array_equal(references, other_references):
        names = [next(iter(group.runs.values())).name for group in (first, second)]
        raise UserError(f"{names[0]} and {names[1]} were evaluated on different items of the {split} split")
    # +1 where only the first is right, -1 where only the second is: (seeds, items)
    differences = hits - other_hits
    by_seed = dict(zip(first.runs, differences.mean(axis=1).tolist()))
    return Comparison(first, second, by_seed, bootstrap_interval(differences))


def bootstrap_interval(outcomes: np.ndarray) -> tuple[float, float]:
    """
    95% percentile interval of the mean outcome under resampling of the items with replacement.

    An item's outcome is averaged over the seeds, so that all seeds of an item are drawn together. The mean of a
    resample depends only on how often each of the few possible values of that average is drawn, and these counts are
    multinomial: drawing them is drawing the items.

    Args:
        outcomes: integers for each run and item, (seeds, items): 1 or 0 for right or wrong, or the difference of two.
    """
    seeds, items = outcomes.shape
    # Sums of integers, as equal averages may differ in their last bit.
    values, counts = np.unique(outcomes.sum(axis=0), return_counts=True)
    drawn = np.random.default_rng(0).multinomial(items, counts / items, size=RESAMPLES)
    low, high = np.quantile(drawn @ values / (items * seeds), [0.025, 0.975])
    return float(low), float(high)


def points(value: float) -> str:
    """A difference in percentage points with its sign; `+0.00` also for what rounds to it from below."""
    return f"{round(100 * value, 2) + 0.0:+.2f}"


def comparison_table(comparisons: list[Comparison], split: str) -> str:
    header = ["comparison", f"difference of {split} accuracy (points)", "95% interval", "difference by seed"]
    lines = [f"| {' | '.join(header)} |", "| --- | ---: | ---: | --- |"]
    for comparison in comparisons:
        low, high = map(points, comparison.interval)
        by_seed = ", ".join(f"{seed}: {points(value)}" for seed, value in comparison.by_seed.items())
        names = f"{comparison.first.name} − {comparison.second.name}"
        lines.append(f"| {names} | {points(comparison.difference)} | [{low}, {high}] | {by_seed} |")
    return "\n".join(lines)


def published_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `source`, `backbone` and `head`, and fractions `validation` and `test` or null."""
    lines = ["| published by | backbone | head | validation accuracy (%) | test accuracy (%) |"]
    lines.append("| --- | --- | --- | ---: | ---: |")
    for row in rows:
        cells = [row["source"], row["backbone"], row["head"]]
        cells += [percent([row[key]] if row.get(key) is not None else []) for key in PREFIXES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(
    groups: list[Group], comparisons: list[Comparison], published: list[dict[str, Any]], split: str, path: Path
) -> None:
    """Draw accuracies by group and seed, and below them the comparisons with their intervals, as a PNG.

    Raises:
        UserError: if matplotlib is missing, no run has an accuracy, or the file cannot be written.
    """
    rows = [(group.name, list(group.values(f"{PREFIXES[split]}_accuracy").values())) for group in groups]
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        other = next(name for name in PREFIXES if name != split)
        raise UserError(
            f"there is nothing to plot: no metrics.json has a {PREFIXES[split]}_accuracy; try --split {other}"
        )
    drawn = [row for row in published if row.get(split) is not None]

    heights = [ROW * count + MARGIN for count in (len(rows) + len(drawn), len(comparisons)) if count]
    figure = new_figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]

    for row, (name, values) in enumerate(rows):
        colour = COLOURS[row % len(COLOURS)]
        draw_row(panels[0], row, [100 * value for value in values], colour)
        label(panels[0], row, f"{name}   {percent(values)}")
    for row, entry in enumerate(drawn, start=len(rows)):
        panels[0].plot(100 * entry[split], row, "D", markersize=6, color=PUBLISHED_COLOUR, markerfacecolor="white")
        text = f"{entry['source']}: {entry['backbone']}, {entry['head']} head   {100 * entry[split]:.2f}"
        label(panels[0], row, text, color=PUBLISHED_COLOUR)
    title = f"{split} accuracy (%): a dot a seed, a bar their mean" + (", a diamond a published figure" * bool(drawn))
    finish(panels[0], len(rows) + len(drawn), title)

    for row, comparison in enumerate(comparisons):
        axes = panels[1]
        low, high = (100 * end for end in comparison.interval)
        axes.plot([low, high], [row, row], color="black", linewidth=1.6, marker="|", markersize=9)
        axes.plot(100 * comparison.difference, row, "s", color="black", markersize=6)
        by_seed = [100 * value for value in comparison.by_seed.values()]
        axes.plot(by_seed, [row + 0.2] * len(by_seed), "o", color=COLOURS[0], markersize=5, markerfacecolor="none")
        label(axes, row, f"{short_title(comparison)}   {points(comparison.difference)}")
    if comparisons:
        panels[1].axvline(0, color="0.4", linestyle="--", linewidth=1)
        title = f"difference of {split} accuracy (points), 95% interval over items; a circle a seed"
        finish(panels[1], len(comparisons), title)
    save_figure(figure, path)


def short_title(comparison: Comparison) -> str:
    """The two names, the second one without the words that both begin with: `snli_bert_linear − …_grassmann`."""
    first, second = comparison.first.name, comparison.second.name
    words = second.split("_")
    shared = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.split("_"), words[:-1])))
    return f"{first} − {'_'.join(['…', *words[len(shared) :]] if shared else words)}"


def draw_row(axes: "Axes", row: int, values: list[float], colour: str) -> None:
    """Dots of one group, at slightly different heights so that equal ones can be told apart, and their mean."""
    offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0]
    axes.plot(values, [row + offset for offset in offsets], "o", color=colour, markersize=6, alpha=0.75)
    if len(values) > 1:
        axes.vlines(statistics.fmean(values), row - 0.25, row + 0.25, color=colour, linewidth=2)


def label(axes: "Axes", row: int, text: str, **kwargs: Any) -> None:
    """Text above a row rather than beside it, where a long name would leave no room for the data."""
    axes.axhline(row, color="0.9", linewidth=0.8, zorder=0)
    # The width holds about 85 characters of size 10.5.
    style = {"va": "bottom", "fontsize": min(10.5, 10.5 * 85 / len(text)), **kwargs}
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    # Not in the layout, which would shrink the panel to make room.
    axes.text(0, row - 0.28, text, transform=axes.get_yaxis_transform(), in_layout=False, **style)


def finish(axes: "Axes", rows: int, title: str) -> None:
    axes.set_ylim(rows - 0.6, -0.85)
    axes.set_yticks([])
    axes.margins(x=0.04)
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.tick_params(labelsize=10.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def class_table(groups: list[Group], split: str) -> str:
    """
    Accuracy on each class with a 95% interval under resampling of its items, where all runs of a group kept their
    outcomes; an empty text where no group's did.

    Raises:
        UserError: if the outcomes of a run are broken, or those of a group are of different items.
    """
    lines, header = [], None
    for group in groups:
        kept = all((run.folder / f"outcomes_{split}.json").is_file() for run in group.runs.values())
        if not kept or len(group.values(f"{PREFIXES[split]}_accuracy")) < len(group.runs):
            continue
        labels, references, hits = group_hits(group, split)
        if header is None:
            header = labels
            lines = table_head(["group", *(f"{label} (%)" for label in labels)])
        cells = [group.name]
        for label in header:
            of_class = hits[:, references == labels.index(label)] if label in labels else hits[:, :0]
            if not of_class.size:
                cells.append(MISSING)
                continue
            low, high = bootstrap_interval(of_class)
            cells.append(f"{100 * of_class.mean():.2f} [{100 * low:.2f}, {100 * high:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(
    runs: list[Run], compared: list[str], published: Path | None, split: str, parent: Path, picture: Path
) -> list[str]:
    """
    The parts of a document about classifiers; draws its picture, and prints the comparisons.

    Args:
        runs: the runs.
        compared: names of two groups each, `A:B`.
        published: JSON file of published accuracies.
        split: what comparisons, classes and the picture show.
        parent: folder of the document.
        picture: file to draw.

    Raises:
        UserError: if the runs, the names or the file are not what they must be.
    """
    groups = group_runs(runs)
    comparisons = []
    for pair in compared:
        names = pair.split(":")
        if len(names) != 2:
            raise UserError(f"--compare {pair}: write the names of two groups as A:B")
        comparisons.append(compare(*(find_group(groups, name) for name in names), split))
    rows = []
    if published:
        rows = load_published(published, ("source", "backbone", "head"), tuple(PREFIXES), complete=False)
    table = results_table(list(groups.values()), split, parent)
    by_class = class_table(list(groups.values()), split)
    plot(list(groups.values()), comparisons, rows, split, picture)
    result = [table, "Means over the seeds ± sample standard deviations; a single run has none."]
    if by_class:
        result += [
            by_class,
            f"By class of the {split} split: means over the seeds, in brackets 95% intervals under {RESAMPLES:,}"
            " resamples of the items of the class, each with the outcomes of all seeds.",
        ]
    if comparisons:
        table = comparison_table(comparisons, split)
        print(table)
        result += [
            table,
            f"The intervals are paired: {RESAMPLES:,} resamples of the items of the {split} split, each item with"
            " the outcomes of all seeds of both groups. They tell how much depends on the items, for these trained"
            " models; how much depends on the training is what the differences by seed tell.",
        ]
    return [
        *result,
        published_table(rows) if rows else "",
        f"![Accuracy on the {split} split by group and seed, and differences between groups]({picture.name})",
        "Accuracies are from the `metrics.json` of each run"
        + (f", comparisons and intervals from its `outcomes_{split}.json`." if comparisons or by_class else "."),
    ]
