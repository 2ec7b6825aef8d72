"""Table and picture of language models, from the files that runs of `run_clm.py` leave behind: see `report.py`."""

import math
import statistics
from pathlib import Path
from typing import Any

from arguments import UserError, closest
from run_records import (
    MARKERS,
    MISSING,
    Group,
    Run,
    curve_style,
    finish_curves,
    group_runs,
    load_published,
    logged,
    millions,
    new_figure,
    notes_on_missing,
    seeds_cell,
    spread,
    table_head,
)


BASELINE_COLOUR = "#000000"
# Numbers of a published row.
PUBLISHED = ("layers", "block", "parameters", "perplexity")
# The vertical axis ends at this multiple of the worst run's best perplexity: the first epochs, which are many times
# higher, would otherwise leave no room for the differences between late ones.
HEADROOM = 1.6


def find_baseline(groups: dict[str, Group], name: str | None) -> Group | None:
    """The model of that name, None without a name.

    Raises:
        UserError: if none has it.
    """
    if name is not None and name not in groups:
        raise UserError(f"the baseline {name} is not among the models: {closest(name, groups)}")
    return groups.get(name)


def results_table(groups: list[Group], baseline: Group | None, parent: Path) -> str:
    """Markdown table of the models, in the order given, and a note on every figure that is missing.

    Args:
        baseline: the model whose validation perplexity the others are compared with, in percent. None: no such column.
        parent: folder of the document, from which the runs are linked.
    """
    header = ["model", "seeds", "parameters (M)", "validation perplexity", "test perplexity"]
    if baseline:
        header.append(f"validation gap to {baseline.name} (%)")
    lines = table_head(header)
    notes = []
    for group in groups:
        cells = [group.name, seeds_cell(group, parent), millions(group.size("parameters"))]
        cells += [spread(list(group.values(key).values())) for key in ("eval_perplexity", "test_perplexity")]
        notes += notes_on_missing(group, ["parameters", "eval_perplexity", "test_perplexity"])
        if baseline:
            cells.append(gap(group, baseline, notes))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + (["", *notes] if notes else []))


def gap(group: Group, baseline: Group, notes: list[str]) -> str:
    """How much higher the mean validation perplexity is than the baseline's, in percent, with its sign."""
    if group is baseline:
        return "baseline"
    values, references = (list(each.values("eval_perplexity").values()) for each in (group, baseline))
    if not values or not references or not all(map(math.isfinite, values + references)):
        notes.append(f"- {group.name} ({MISSING}): no gap, since a validation perplexity is missing or not finite.")
        return MISSING
    return percent_above(statistics.fmean(values), statistics.fmean(references))


def percent_above(value: float, reference: float) -> str:
    return f"{100 * (value / reference - 1):+.1f}"


def mean_curve(group: Group, notes: list[str]) -> list[tuple[float, float]]:
    """(epoch, mean validation perplexity over the seeds) where all runs of a model have a finite one."""
    by_epoch = {}
    for run in group.runs.values():
        curve = logged(run, "eval_perplexity")
        finite = [(epoch, value) for epoch, value in curve if math.isfinite(value)]
        if len(finite) < len(curve):
            notes.append(f"- {run.name}: infinite or undefined perplexities are not drawn.")
        elif not finite:
            notes.append(f"- {run.name}: its `log.jsonl` has no `eval_perplexity`, so it has no curve.")
        for epoch, value in finite:
            by_epoch.setdefault(epoch, []).append(value)
    shared = {epoch: values for epoch, values in by_epoch.items() if len(values) == len(group.runs)}
    return [(epoch, statistics.fmean(values)) for epoch, values in sorted(shared.items())]


def plot(groups: list[Group], baseline: Group | None, path: Path) -> list[str]:
    """Draw validation perplexity against epoch, one curve a model, as a PNG.

    Returns:
        notes on what the picture leaves out.

    Raises:
        UserError: if matplotlib is missing, no run has a curve, or the file cannot be written.
    """
    figure = new_figure(layout="constrained")
    from matplotlib.ticker import LogLocator, MaxNLocator

    notes = []
    curves = {group.name: mean_curve(group, notes) for group in groups}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        raise UserError("there is nothing to plot: no log.jsonl has a finite eval_perplexity")

    values = [value for curve in curves.values() for _, value in curve]
    top = min(max(values), HEADROOM * max(min(value for _, value in curve) for curve in curves.values()))
    bottom = min(values)
    if max(values) > top:
        notes.append(f"- Evaluations above a perplexity of {top:.0f} lie outside the plot.")

    figure.set_size_inches(8, 4.6 + 0.23 * math.ceil(len(curves) / 2))
    axes = figure.add_subplot()
    others = 0
    # The legend lists the curves from top to bottom as they end.
    for name in sorted(curves, key=lambda name: -curves[name][-1][1]):
        style = curve_style(others)
        if baseline is not None and name == baseline.name:
            style |= {"color": BASELINE_COLOUR, "linestyle": "--", "marker": MARKERS[0]}
        else:
            style["marker"] = MARKERS[1 + others % (len(MARKERS) - 1)]
            others += 1
        axes.plot(*zip(*curves[name]), label=name, **style)

    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.97, top * 1.03)
    # Powers of ten are too few labels for an axis that spans less than one decade.
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if top > 10 * bottom else MaxNLocator(12, steps=[1, 2, 5, 10])
    )
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=max(curve[-1][0] for curve in curves.values()) >= 2))
    axes.set_xlabel("epoch (passes over the training data)", fontsize=12)
    axes.set_ylabel("validation perplexity per token (log scale)", fontsize=12)
    finish_curves(figure, axes, path)
    return notes


def published_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `source`, `model` and [`PUBLISHED`], each with its gap to the Transformer of its source and sizes."""
    header = ["published by", "model", "layers", "block", "parameters (M)", "validation perplexity"]
    lines = table_head([*header, "gap to its Transformer (%)"])
    transformers = {
        (row["source"], row["layers"], row["block"]): row["perplexity"]
        for row in rows
        if row["model"] == "transformer"
    }
    for row in rows:
        reference = transformers.get((row["source"], row["layers"], row["block"]))
        difference = MISSING if reference is None else percent_above(row["perplexity"], reference)
        cells = [row["source"], row["model"], str(row["layers"]), str(row["block"]), millions(row["parameters"])]
        cells += [f"{row['perplexity']:.2f}", "baseline" if row["model"] == "transformer" else difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(runs: list[Run], baseline: str | None, published: Path | None, parent: Path, picture: Path) -> list[str]:
    """
    The parts of a document about language models; draws its picture.

    Args:
        runs: the runs.
        baseline: name of the model that the others are compared with.
        published: JSON file of published perplexities.
        parent: folder of the document.
        picture: file to draw.

    Raises:
        UserError: if the runs, the baseline or the file are not what they must be.
    """
    by_name = group_runs(runs)
    groups = list(by_name.values())
    reference = find_baseline(by_name, baseline)
    table = results_table(groups, reference, parent)
    rows = load_published(published, ("source", "model"), PUBLISHED) if published else []
    notes = plot(groups, reference, picture)
    return [
        table,
        "Perplexities are means over the seeds ± sample standard deviations; a single run has none."
        if any(len(group.runs) > 1 for group in groups)
        else "",
        f"![Validation perplexity against epoch, one curve a model]({picture.name})",
        "\n".join(notes),
        published_table(rows) if rows else "",
        "Tables are from the `metrics.json` of each run, curves from its `log.jsonl`.",
    ]
