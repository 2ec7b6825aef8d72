"""Tables and a picture of classifiers of sentence pairs, from the files that runs of `run_nli.py` leave behind.

    python trainer_scripts/report_nli.py model_cards/snli_* --output docs/snli \
        --compare snli_distilbert_grassmann:snli_distilbert_transformer --published configuration/published_snli.json

writes `docs/snli.md` and `docs/snli.png`. Each folder of a run holds `recipe.yaml`, `log.jsonl`, `metrics.json` and,
for comparisons, `outcomes_test.json`. Runs whose names differ only in a trailing `_seed<N>` form one group.
`--compare A:B` gives the difference A - B of the mean accuracies, with a paired interval over the items of the split.
"""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from arguments import UserError, closest, exits_on_user_error
from run_records import (
    COLOURS,
    MISSING,
    PREFIXES,
    Group,
    ReportParser,
    Run,
    check_names,
    group_runs,
    link,
    load_run,
    millions,
    new_figure,
    number,
    output_paths,
    parse_json,
    read,
    save_figure,
    spread,
    table_head,
    write_document,
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
        seeds = ", ".join(link(run, str(seed), parent) for seed, run in group.runs.items())
        cells = [group.name, f"{len(group.runs)} ({seeds})"]
        cells += [millions(group.size(key)) for key in ("head_parameters", "parameters")]
        cells += [percent(list(group.values(f"{key}_accuracy").values())) for key in PREFIXES.values()]
        for label in classes:
            values = group.values(prefix + label).values()
            cells.append(f"{100 * statistics.fmean(values):.2f}" if values else MISSING)
        lines.append(f"| {' | '.join(cells)} |")
        # Not `head_parameters`: a model without a backbone has no head.
        shown = ["parameters", "eval_accuracy", "test_accuracy", *(prefix + key for key in classes)]
        for key in shown:
            absent = [run.name for seed, run in group.runs.items() if seed not in group.values(key)]
            if absent:
                notes.append(f"- The `metrics.json` of {', '.join(absent)} has no `{key}`.")
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
    outcomes = [[load_outcomes(run, split) for run in group.runs.values()] for group in (first, second)]
    reference = outcomes[0][0]
    for group, members in zip((first, second), outcomes):
        for run, member in zip(group.runs.values(), members):
            same = reference["labels"] == member["labels"]
            if not same or not np.array_equal(reference["references"], member["references"]):
                known = next(iter(first.runs.values())).name
                raise UserError(f"{known} and {run.name} were evaluated on different items of the {split} split")
    # +1 where only the first is right, -1 where only the second is: (seeds, items)
    hits = np.array(
        [[member["predictions"] == reference["references"] for member in members] for members in outcomes], dtype=int
    )
    differences = hits[0] - hits[1]
    by_seed = dict(zip(first.runs, differences.mean(axis=1).tolist()))
    return Comparison(first, second, by_seed, paired_interval(differences))


def paired_interval(differences: np.ndarray) -> tuple[float, float]:
    """
    95% percentile interval of the mean difference under resampling of the items with replacement.

    An item's difference is averaged over the seeds, so that all seeds of an item are drawn together. The mean of a
    resample depends only on how often each of the few possible values of that average is drawn, and these counts are
    multinomial: drawing them is drawing the items.

    Args:
        differences: -1, 0 or 1 for each run and item, (seeds, items).
    """
    seeds, items = differences.shape
    # Sums of integers, as equal averages may differ in their last bit.
    values, counts = np.unique(differences.sum(axis=0), return_counts=True)
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


def load_published(path: Path) -> list[dict[str, Any]]:
    """Published accuracies: rows of `source`, `backbone`, `head`, and fractions `validation` and `test` or null.

    Raises:
        UserError: if the file cannot be read or a row is not of this kind.
    """
    rows = parse_json(read(path), str(path), list)
    for index, row in enumerate(rows):
        source = f"{path}, row {index + 1}"
        if not isinstance(row, dict):
            raise UserError(f"{source} must be a JSON object, not a {type(row).__name__}")
        for key in ("source", "backbone", "head"):
            if not isinstance(row.get(key), str):
                raise UserError(f"{source}: {key} is {row.get(key)!r}, not a string")
        for key in PREFIXES:
            number(row, key, source)
    return rows


def published_table(rows: list[dict[str, Any]]) -> str:
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


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = ReportParser(__doc__)
    parser.add_argument("--compare", nargs="+", default=[], metavar="A:B", help="Groups to compare, A minus B.")
    parser.add_argument("--published", type=Path, help="JSON file of published accuracies.")
    parser.add_argument(
        "--split", choices=PREFIXES, default="test", help="What comparisons, classes and the picture show."
    )
    args = parser.parse_args(argv)

    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    groups = group_runs(runs)
    comparisons = []
    for pair in args.compare:
        names = pair.split(":")
        if len(names) != 2:
            raise UserError(f"--compare {pair}: write the names of two groups as A:B")
        comparisons.append(compare(*(find_group(groups, name) for name in names), args.split))
    published = load_published(args.published) if args.published else []
    table = results_table(list(groups.values()), args.split, args.output.parent)
    document, picture = output_paths(args.output)
    plot(list(groups.values()), comparisons, published, args.split, picture)
    sections = [
        f"# Results: {args.output.name}",
        table,
        "Means over the seeds ± sample standard deviations; a single run has none.",
    ]
    if comparisons:
        table = comparison_table(comparisons, args.split)
        print(table)
        sections += [
            table,
            f"The intervals are paired: {RESAMPLES:,} resamples of the items of the {args.split} split, each item with"
            " the outcomes of all seeds of both groups. They tell how much depends on the items, for these trained"
            " models; how much depends on the training is what the differences by seed tell.",
        ]
    sections += [
        published_table(published) if published else "",
        f"![Accuracy on the {args.split} split by group and seed, and differences between groups]({picture.name})",
        "Written by `trainer_scripts/report_nli.py`: accuracies from the `metrics.json` of each run, comparisons from"
        f" its `outcomes_{args.split}.json`."
        if comparisons
        else "Written by `trainer_scripts/report_nli.py` from the `metrics.json` of each run.",
    ]
    write_document(document, sections)
    print(f"wrote {document} and {picture}")


if __name__ == "__main__":
    main()
