"""Table of results and plot of validation curves, from the files that runs of `run_clm.py` leave behind.

    python trainer_scripts/report.py model_cards/wikitext2_* --baseline wikitext2_gpt2_6l --output docs/wikitext2

writes `docs/wikitext2.md` and `docs/wikitext2.png`. Each folder of a run holds `recipe.yaml`, `log.jsonl` and
`metrics.json`. Every figure in the table is read from `metrics.json`; one that is not there shows as a dash.
"""

import argparse
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import UserError, closest, exits_on_user_error


MISSING = "—"
BASELINE_COLOUR = "#000000"
# Okabe and Ito's palette, which stays readable with any colour vision, without yellow, which is faint on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
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


@dataclass
class Run:
    """A recorded run.

    Attributes:
        folder: where its files are; the folder's name is the run's.
        metrics: content of `metrics.json`.
        curve: (epoch, validation perplexity) of each evaluation during training.
    """

    folder: Path
    metrics: dict[str, Any]
    curve: list[tuple[float, float]]

    @property
    def name(self) -> str:
        return self.folder.name

    def number(self, key: str) -> float | int | None:
        """A figure of `metrics.json`; None where it is missing or null.

        Raises:
            UserError: if it is not a number.
        """
        return number(self.metrics, key, str(self.folder / "metrics.json"))


def number(entry: dict[str, Any], key: str, source: str) -> float | int | None:
    """A number of a JSON object, None where it is missing or null; a message about another type names the `source`."""
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{source}: {key} is {value!r}, not a number")
    return value


def load_run(folder: Path) -> Run:
    """Read a run's files.

    Raises:
        UserError: if one is missing or is not JSON of the right kind.
    """
    for name in ("recipe.yaml", "log.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not the folder of a run: it has no {name}")
    metrics = parse_json(read(folder / "metrics.json"), str(folder / "metrics.json"))
    lines = enumerate(read(folder / "log.jsonl").splitlines(), start=1)
    log = [parse_json(line, f"{folder / 'log.jsonl'}, line {number}") for number, line in lines if line.strip()]
    return Run(folder, metrics, validation_curve(log, str(folder / "log.jsonl")))


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parse_json(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object; a message about a mistake in it names the `source`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{source} must hold a JSON object, not a {type(value).__name__}")
    return value


def validation_curve(log: list[dict[str, Any]], source: str) -> list[tuple[float, float]]:
    """(epoch, validation perplexity) of the evaluations in a Trainer's log history, read from the file `source`.

    What is evaluated after the training's summary is the model that was kept, which may be that of an earlier epoch.

    Raises:
        UserError: if one of them is not a number.
    """
    summary = next((index for index, entry in enumerate(log) if "train_runtime" in entry), len(log))
    points = [(number(entry, "epoch", source), number(entry, "eval_perplexity", source)) for entry in log[:summary]]
    return [(epoch, perplexity) for epoch, perplexity in points if epoch is not None and perplexity is not None]


def find_baseline(runs: list[Run], name: str | None) -> Run | None:
    """The run of that name, None without a name.

    Raises:
        UserError: if two runs have one name, or none has the given one.
    """
    repeated = [run_name for run_name, count in Counter(run.name for run in runs).items() if count > 1]
    if repeated:
        raise UserError(f"two runs are named {repeated[0]}: rename one of the folders")
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
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    notes = []
    for run in runs:
        cells = [MISSING if (value := run.number(key)) is None else show(value) for key, show in COLUMNS.items()]
        if absent := [f"`{key}`" for key in COLUMNS if run.number(key) is None]:
            notes.append(f"- {run.name} ({MISSING}): its `metrics.json` has no {', '.join(absent)}.")
        if baseline:
            cells.insert(3, gap(run, baseline, notes))
        link = Path(os.path.relpath(run.folder, parent)).as_posix()
        lines.append(f"| [{run.name}]({link}) | {' | '.join(cells)} |")
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
    try:
        # A Figure of its own draws with Agg, whatever backend the user's pyplot would choose.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
    except ImportError as error:
        raise UserError('matplotlib is missing: pip install "modeling-grassmann[reports]"') from error

    notes, curves = [], {}
    for run in runs:
        finite = [(epoch, value) for epoch, value in run.curve if math.isfinite(value)]
        if finite:
            curves[run.name] = finite
        if len(finite) < len(run.curve):
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

    figure = Figure(figsize=(8, 4.6 + 0.23 * math.ceil(len(curves) / 2)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
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
    try:
        # Without the version of matplotlib, equal logs give equal files.
        canvas.print_figure(path, dpi=150, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return notes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of the runs.")
    parser.add_argument("--output", required=True, type=Path, help="Files to write, without .md and .png.")
    parser.add_argument("--baseline", help="Name of the run's folder that the others are compared with.")
    args = parser.parse_args(argv)

    # Not `with_suffix`: a name may hold a dot.
    document, picture = (args.output.with_name(args.output.name + suffix) for suffix in (".md", ".png"))
    runs = [load_run(Path(os.path.abspath(folder))) for folder in args.runs]
    baseline = find_baseline(runs, args.baseline)
    table = results_table(runs, baseline, document.parent)
    try:
        document.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {document.parent}: {error.strerror}") from error
    notes = plot(runs, baseline, picture)
    sections = [
        f"# Results: {args.output.name}",
        table,
        f"![Validation perplexity against epoch, one curve a run]({picture.name})",
        "\n".join(notes),
        "Written by `trainer_scripts/report.py`: the table from the `metrics.json` of each run, the curves from its"
        " `log.jsonl`.",
    ]
    try:
        document.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {document}: {error.strerror}") from error
    print(f"wrote {document} and {picture}")


if __name__ == "__main__":
    main()
