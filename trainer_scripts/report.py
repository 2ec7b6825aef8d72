"""Table of results and plot of validation curves, from the files that runs of `run_clm.py` leave behind.

    python trainer_scripts/report.py model_cards/wikitext2_* --baseline wikitext2_gpt2_6l --output docs/wikitext2

writes `docs/wikitext2.md` and `docs/wikitext2.png`. Each folder of a run holds `recipe.yaml`, `log.jsonl` and
`metrics.json`. Runs whose names differ only in a trailing `_seed<N>` are one model: the table holds their mean and
standard deviation, and the picture their mean curve. Every figure in the table is read from `metrics.json`; one that
is not there shows as a dash.
"""

import math
import statistics
from pathlib import Path

from arguments import UserError, closest, exits_on_user_error
from run_records import (
    COLOURS,
    MARKERS,
    MISSING,
    Group,
    ReportParser,
    check_names,
    group_runs,
    link,
    load_run,
    logged,
    millions,
    new_figure,
    output_paths,
    save_figure,
    spread,
    table_head,
    write_document,
)


BASELINE_COLOUR = "#000000"
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
        seeds = ", ".join(link(run, str(seed), parent) for seed, run in group.runs.items())
        cells = [group.name, f"{len(group.runs)} ({seeds})", millions(group.size("parameters"))]
        cells += [spread(list(group.values(key).values())) for key in ("eval_perplexity", "test_perplexity")]
        for key in ("parameters", "eval_perplexity", "test_perplexity"):
            if absent := [run.name for seed, run in group.runs.items() if seed not in group.values(key)]:
                notes.append(f"- The `metrics.json` of {', '.join(absent)} has no `{key}`.")
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
    return f"{100 * (statistics.fmean(values) / statistics.fmean(references) - 1):+.1f}"


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
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

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
        style = {"color": BASELINE_COLOUR, "linestyle": "--", "marker": MARKERS[0]}
        if baseline is None or name != baseline.name:
            style = {"color": COLOURS[others % len(COLOURS)], "marker": MARKERS[1 + others % (len(MARKERS) - 1)]}
            style["linestyle"] = ["-", ":", "-."][others // len(COLOURS) % 3]
            others += 1
        axes.plot(*zip(*curves[name]), label=name, linewidth=1.6, markersize=4.5, **style)

    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.97, top * 1.03)
    # Powers of ten are too few labels for an axis that spans less than one decade.
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5)) if top > 10 * bottom else MaxNLocator(12, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=max(curve[-1][0] for curve in curves.values()) >= 2))
    axes.set_xlabel("epoch (passes over the training data)", fontsize=12)
    axes.set_ylabel("validation perplexity per token (log scale)", fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Outside of the axes, where it covers no curve.
    figure.legend(loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    save_figure(figure, path)
    return notes


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = ReportParser(__doc__)
    parser.add_argument("--baseline", help="Name of the model that the others are compared with.")
    args = parser.parse_args(argv)

    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    by_name = group_runs(runs)
    groups, baseline = list(by_name.values()), find_baseline(by_name, args.baseline)
    table = results_table(groups, baseline, args.output.parent)
    document, picture = output_paths(args.output)
    notes = plot(groups, baseline, picture)
    sections = [
        f"# Results: {args.output.name}",
        table,
        f"![Validation perplexity against epoch, one curve a model]({picture.name})",
        "\n".join(notes),
        "Written by `trainer_scripts/report.py`: the table from the `metrics.json` of each run, the curves from its"
        " `log.jsonl`. After ± stands the standard deviation over the seeds.",
    ]
    write_document(document, sections)
    print(f"wrote {document} and {picture}")


if __name__ == "__main__":
    main()
