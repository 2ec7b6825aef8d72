"""Table of results and plot of validation curves, from the files that runs of `run_clm.py` leave behind.

    python trainer_scripts/report.py model_cards/wikitext2_* --baseline wikitext2_gpt2_6l --output docs/wikitext2

writes `docs/wikitext2.md` and `docs/wikitext2.png`. Each folder of a run holds `recipe.yaml`, `log.jsonl` and
`metrics.json`. Every figure in the table is read from `metrics.json`; one that is not there shows as a dash.
"""

import math
from pathlib import Path

from arguments import UserError, closest, exits_on_user_error
from run_records import (
    COLOURS,
    MARKERS,
    MISSING,
    ReportParser,
    Run,
    check_names,
    link,
    load_run,
    logged,
    new_figure,
    output_paths,
    save_figure,
    table_head,
    write_document,
)


BASELINE_COLOUR = "#000000"
# What the table shows of `metrics.json`.
COLUMNS = {
    "parameters": lambda value: f"{value / 1e6:.2f}",
    "eval_perplexity": "{:.2f}".format,
    "test_perplexity": "{:.2f}".format,
    "seed": "{:.0f}".format,
}
# The vertical axis ends at this multiple of the worst run's best perplexity: the first epochs, which are many times
# higher, would otherwise leave no room for the differences between late ones.
HEADROOM = 1.6


def find_baseline(runs: list[Run], name: str | None) -> Run | None:
    """The run of that name, None without a name.

    Raises:
        UserError: if none has it.
    """
    if name is None:
        return None
    by_name = {run.name: run for run in runs}
    if name not in by_name:
        raise UserError(f"the baseline {name} is not among the runs: {closest(name, by_name)}")
    return by_name[name]


def results_table(runs: list[Run], baseline: Run | None, parent: Path) -> str:
    """Markdown table of the runs, in the order given, and a note on every figure that is missing.

    Args:
        baseline: the run whose validation perplexity the others are compared with, in percent. None: no such column.
        parent: folder of the document, from which the runs are linked.
    """
    header = ["run", "parameters (M)", "validation perplexity", "test perplexity", "seed"]
    if baseline:
        header.insert(4, f"validation gap to {baseline.name} (%)")
    lines = table_head(header)
    notes = []
    for run in runs:
        cells = [MISSING if (value := run.number(key)) is None else show(value) for key, show in COLUMNS.items()]
        if absent := [f"`{key}`" for key in COLUMNS if run.number(key) is None]:
            notes.append(f"- {run.name} ({MISSING}): its `metrics.json` has no {', '.join(absent)}.")
        if baseline:
            cells.insert(3, gap(run, baseline, notes))
        lines.append(f"| {link(run, run.name, parent)} | {' | '.join(cells)} |")
    return "\n".join(lines + (["", *notes] if notes else []))


def gap(run: Run, baseline: Run, notes: list[str]) -> str:
    """How much higher the run's validation perplexity is than the baseline's, in percent, with its sign."""
    if run is baseline:
        return "baseline"
    value, reference = run.number("eval_perplexity"), baseline.number("eval_perplexity")
    if value is None or reference is None or not (math.isfinite(value) and math.isfinite(reference)):
        notes.append(f"- {run.name} ({MISSING}): no gap, since a validation perplexity is missing or not finite.")
        return MISSING
    return f"{100 * (value / reference - 1):+.1f}"


def plot(runs: list[Run], baseline: Run | None, path: Path) -> list[str]:
    """Draw validation perplexity against epoch, one curve a run, as a PNG.

    Returns:
        notes on what the picture leaves out.

    Raises:
        UserError: if matplotlib is missing, no run has a curve, or the file cannot be written.
    """
    figure = new_figure(layout="constrained")
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    notes, curves = [], {}
    for run in runs:
        curve = logged(run, "eval_perplexity")
        finite = [(epoch, value) for epoch, value in curve if math.isfinite(value)]
        if finite:
            curves[run.name] = finite
        if len(finite) < len(curve):
            notes.append(f"- {run.name}: infinite or undefined perplexities are not drawn.")
        elif not finite:
            notes.append(f"- {run.name}: its `log.jsonl` has no `eval_perplexity`, so it has no curve.")
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
    parser.add_argument("--baseline", help="Name of the run's folder that the others are compared with.")
    args = parser.parse_args(argv)

    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    baseline = find_baseline(runs, args.baseline)
    table = results_table(runs, baseline, args.output.parent)
    document, picture = output_paths(args.output)
    notes = plot(runs, baseline, picture)
    sections = [
        f"# Results: {args.output.name}",
        table,
        f"![Validation perplexity against epoch, one curve a run]({picture.name})",
        "\n".join(notes),
        "Written by `trainer_scripts/report.py`: the table from the `metrics.json` of each run, the curves from its"
        " `log.jsonl`.",
    ]
    write_document(document, sections)
    print(f"wrote {document} and {picture}")


if __name__ == "__main__":
    main()
