"""Table and picture of language models, from the files that runs of `run_clm.py` leave behind: see `report.py`."""

import math
import re
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
    legend_columns,
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
NO_CURVES = (
    "- There is no picture: no `log.jsonl` has a finite `eval_perplexity` of an evaluation during training, such as"
    " `--eval_strategy epoch` makes."
)


def find_baseline(groups: dict[str, Group], name: str | None) -> Group | None:
    """The model of that name, None without a name.

    Raises:
        UserError: if none has it.
    """
    if name is not None and name not in groups:
        raise UserError(f"the baseline {name} is not among the models: {closest(name, groups)}")
    return groups.get(name)


def load_step_times(path: Path) -> dict[str, dict[str, Any]]:
    """What `time_steps.py` measured, by recipe: the fastest of the ways to run its step.

    Raises:
        UserError: if the file cannot be read or a row is not of this kind.
    """
    rows = load_published(path, ("recipe", "mode"), ("tokens_per_step", "seconds_per_step"), complete=False)
    rows = [row for row in rows if row.get("seconds_per_step") and row.get("tokens_per_step")]
    rows.sort(key=lambda row: -row["seconds_per_step"])
    return {row["recipe"]: row for row in rows}


def speed(group: Group, step_times: dict[str, dict[str, Any]]) -> str:
    """Tokens a second of a training that has its device to itself."""
    row = step_times.get(group.name)
    return MISSING if row is None else f"{row['tokens_per_step'] / row['seconds_per_step']:,.0f}"


def results_table(
    groups: list[Group], baseline: Group | None, parent: Path, step_times: dict[str, dict[str, Any]] | None = None
) -> str:
    """Markdown table of the models, in the order given, and a note on every figure that is missing.

    Args:
        baseline: the model whose validation perplexity the others are compared with, in percent. None: no such column.
        parent: folder of the document, from which the runs are linked.
        step_times: see [`load_step_times`]. None: no such column.
    """
    header = ["model", "seeds", "parameters (M)", "validation perplexity", "test perplexity"]
    if baseline:
        header.append(f"validation gap to {baseline.name} (%)")
    if step_times is not None:
        header.append("training, alone (tokens/s)")
    lines = table_head(header)
    notes = []
    for group in groups:
        cells = [group.name, seeds_cell(group, parent), millions(group.size("parameters"))]
        cells += [spread(list(group.values(key).values())) for key in ("eval_perplexity", "test_perplexity")]
        notes += notes_on_missing(group, ["parameters", "eval_perplexity", "test_perplexity"])
        if baseline:
            cells.append(gap(group, baseline, notes))
        if step_times is not None:
            cells.append(speed(group, step_times))
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


def gaps_over_training(groups: list[Group], baseline: Group) -> str:
    """Text and Markdown table of the gaps after each epoch after which all of the models were evaluated."""
    curves = {group.name: dict(mean_curve(group, [])) for group in [baseline, *groups]}
    others = [group.name for group in groups if group is not baseline and curves[group.name]]
    shared = [epoch for epoch in curves[baseline.name] if all(epoch in curves[name] for name in others)]
    if not others or not shared:
        return ""
    lines = table_head(["epoch", baseline.name, *others])
    for epoch in shared:
        reference = curves[baseline.name][epoch]
        gaps = [percent_above(curves[name][epoch], reference) for name in others]
        lines.append(f"| {epoch:g} | {' | '.join([f'{reference:.2f}', *gaps])} |")
    text = f"Validation perplexity of {baseline.name} after each epoch, and the gaps of the others to it in percent:"
    return "\n".join([text, "", *lines])


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


def minutes(
    group: Group, curve: list[tuple[float, float]], step_times: dict[str, dict[str, Any]]
) -> list[tuple[float, float]]:
    """A curve over minutes of training steps on a device of its own in place of epochs; empty if they are unknown."""
    row = step_times.get(group.name)
    if row is None:
        return []
    steps = {epoch: step for run in group.runs.values() for epoch, step in logged(run, "step")}
    return [(steps[epoch] * row["seconds_per_step"] / 60, value) for epoch, value in curve if epoch in steps]


def plot(
    curves: dict[str, list[tuple[float, float]]], baseline: Group | None, path: Path, over_time: bool = False
) -> list[str]:
    """Draw validation perplexity against epoch, or minutes if it is `over_time`, one curve a model, as a PNG.

    Args:
        curves: those of the models by name, of which one at least is not empty.
        baseline: the model whose curve stands out, if any.
        path: file to write.
        over_time: whether the curves are over minutes.

    Returns:
        notes on what the picture leaves out.

    Raises:
        UserError: if matplotlib is missing, or the file cannot be written.
    """
    figure = new_figure(layout="constrained")
    from matplotlib.ticker import LogLocator, MaxNLocator

    notes = []
    curves = {name: curve for name, curve in curves.items() if curve}
    values = [value for curve in curves.values() for _, value in curve]
    top = min(max(values), HEADROOM * max(min(value for _, value in curve) for curve in curves.values()))
    bottom = min(values)
    if max(values) > top:
        notes.append(f"- Evaluations above a perplexity of {top:.0f} lie outside the plot.")

    figure.set_size_inches(8, 4.6 + 0.23 * math.ceil(len(curves) / legend_columns(list(curves))))
    axes = figure.add_subplot()
    others = 0
    # The legend lists the curves from top to bottom as they end.
    for name in sorted(curves, key=lambda name: -curves[name][-1][1]):
        style = curve_style(others, MARKERS[1:])
        if baseline is not None and name == baseline.name:
            style |= {"color": BASELINE_COLOUR, "linestyle": "--", "marker": MARKERS[0]}
        else:
            others += 1
        axes.plot(*zip(*curves[name]), label=name, **style)

    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.97, top * 1.03)
    # Powers of ten are too few labels for an axis that spans less than one decade.
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if top > 10 * bottom else MaxNLocator(12, steps=[1, 2, 5, 10])
    )
    if not over_time:
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=max(curve[-1][0] for curve in curves.values()) >= 2))
        axes.set_xlabel("epoch (passes over the training data)", fontsize=12)
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes of training steps", fontsize=12)
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


def settings(groups: list[Group]) -> dict[str, list[Group]]:
    """The groups by what `run_matrix.py` appends to the names of cells: `_6l_L128`, or nothing; in ascending order."""
    by_suffix = {}
    for group in groups:
        by_suffix.setdefault(re.search(r"((_\d+l)?(_L\d+)?)$", group.name).group(1), []).append(group)
    return dict(sorted(by_suffix.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))


def sections(
    runs: list[Run],
    baseline: str | None,
    published: Path | None,
    times: Path | None,
    parent: Path,
    picture: Path,
) -> list[str]:
    """
    The parts of a document about language models; draws its pictures.

    Args:
        runs: the runs. Cells of `run_matrix.py` of several depths or block sizes have a part for each of these.
        baseline: name of the model that the others are compared with; for cells, without depth and block size.
        published: JSON file of published perplexities.
        times: JSON file of `time_steps.py`.
        parent: folder of the document.
        picture: file to draw.

    Raises:
        UserError: if the runs, the baseline or a file are not what they must be.
    """
    by_name = group_runs(runs)
    step_times = load_step_times(times) if times else None
    rows = load_published(published, ("source", "model"), PUBLISHED) if published else []
    by_suffix = settings(list(by_name.values()))
    parts = []
    if len(by_suffix) == 1 or baseline in by_name or not baseline:
        reference = find_baseline(by_name, baseline)
        parts += setting(list(by_name.values()), reference, step_times, bool(rows), parent, picture)
    else:
        for suffix, groups in by_suffix.items():
            reference = find_baseline({group.name: group for group in groups}, f"{baseline}{suffix}")
            own = picture.with_name(f"{picture.stem}{suffix}.png")
            parts.append(f"## {suffix.strip('_').replace('_', ', ').replace('l, L', ' layers, blocks of ')}")
            parts += setting(groups, reference, step_times, bool(rows), parent, own)
    return [
        *parts,
        "Perplexities are means over the seeds ± sample standard deviations; a single run has none."
        if any(len(group.runs) > 1 for group in by_name.values())
        else "",
        f"Times of training steps are those in `{times.name}`, of `time_steps.py`: with nothing else on the device."
        if times
        else "",
        published_table(rows) if rows else "",
        "Tables are from the `metrics.json` of each run, curves from its `log.jsonl`.",
    ]


def setting(
    groups: list[Group],
    baseline: Group | None,
    step_times: dict[str, dict[str, Any]] | None,
    over_training: bool,
    parent: Path,
    picture: Path,
) -> list[str]:
    """The parts on models that are compared with each other; `over_training` asks for the gaps after each epoch."""
    notes = []
    curves = {group.name: mean_curve(group, notes) for group in groups}
    parts = [results_table(groups, baseline, parent, step_times)]
    if any(curves.values()):
        notes += plot(curves, baseline, picture)
        parts.append(f"![Validation perplexity against epoch, one curve a model]({picture.name})")
    else:
        notes = [NO_CURVES]
    parts.append("\n".join(notes))
    curves = {group.name: minutes(group, curves[group.name], step_times or {}) for group in groups}
    if any(curves.values()):
        by_time = picture.with_name(f"{picture.stem}_time.png")
        plot(curves, baseline, by_time, over_time=True)
        parts.append(f"![Validation perplexity against the time of training steps, one curve a model]({by_time.name})")
    if over_training and baseline:
        parts.append(gaps_over_training(groups, baseline))
    return parts
