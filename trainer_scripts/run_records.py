"""What the reports on recorded runs share: reading a run's folder, and writing a document with a picture."""

import argparse
import base64
import html
import json
import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import UserError


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "—"
# Name of a split -> what its keys in `metrics.json` start with.
PREFIXES = {"validation": "eval", "test": "test"}
# Okabe and Ito's palette, which stays readable with any colour vision, without yellow, which is faint on white.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
LINES = ["-", ":", "-."]


def table_head(header: list[str]) -> list[str]:
    """The first two lines of a Markdown table, whose columns but the first hold figures."""
    return [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]


def curve_style(index: int, markers: list[str] = MARKERS) -> dict[str, Any]:
    """How matplotlib draws one of many curves."""
    # Colours with all lines come again with other markers.
    repeats = index // (len(COLOURS) * len(LINES))
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": markers[(index + repeats) % len(markers)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "linewidth": 1.6,
        "markersize": 4.5,
    }


@dataclass
class Run:
    """A recorded run.

    Attributes:
        folder: where its files are; the folder's name is the run's.
        metrics: content of `metrics.json`.
        log: lines of `log.jsonl`, the Trainer's log history.
    """

    folder: Path
    metrics: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    def number(self, key: str) -> float | int | None:
        """A figure of `metrics.json`; None where it is missing or null.

        Raises:
            UserError: if it is not a number.
        """
        return number(self.metrics, key, str(self.folder / "metrics.json"))


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: the runs' names without `_seed<N>`.
        runs: the runs by seed, in ascending order.
    """

    name: str
    runs: dict[int, Run]

    def values(self, key: str) -> dict[int, float | int]:
        """A figure of `metrics.json` by seed, without the runs that do not have it."""
        values = {seed: run.number(key) for seed, run in self.runs.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def size(self, key: str) -> int | None:
        """A number of parameters, None where no run has it.

        Raises:
            UserError: if the runs do not agree.
        """
        sizes = set(self.values(key).values())
        if len(sizes) > 1:
            raise UserError(
                f"the runs {self.name} are no group: their {key} are {' and '.join(map(str, sorted(sizes)))}"
            )
        return sizes.pop() if sizes else None


def seeds_cell(group: Group, parent: Path) -> str:
    """The number of a group's runs, with links to them from a document in the folder `parent`."""
    return f"{len(group.runs)} ({', '.join(link(run, str(seed), parent) for seed, run in group.runs.items())})"


def notes_on_missing(group: Group, keys: list[str]) -> list[str]:
    """A note on each figure that `metrics.json` of some of the runs does not have."""
    notes = []
    for key in keys:
        if absent := [run.name for seed, run in group.runs.items() if seed not in group.values(key)]:
            notes.append(f"- The `metrics.json` of {', '.join(absent)} has no `{key}`.")
    return notes


def number(entry: dict[str, Any], key: str, source: str) -> float | int | None:
    """A number of a JSON object, None where it is missing or null; a message about another type names the `source`."""
    value = entry.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise UserError(f"{source}: {key} is {value!r}, not a number")
    return value


def load_run(folder: Path, complete: bool = True) -> Run:
    """Read a run's files.

    Args:
        folder: where they are.
        complete: whether they must all be there; one that may be missing counts as empty.

    Raises:
        UserError: if one is missing or is not JSON of the right kind.
    """
    # The name of `.` is that of the folder it stands for.
    folder = Path(os.path.abspath(folder))
    texts = {}
    for name in ("recipe.yaml", "log.jsonl", "metrics.json"):
        if (folder / name).is_file():
            texts[name] = read(folder / name)
        elif complete:
            raise UserError(f"{folder} is not the folder of a run: it has no {name}")
    metrics = parse_json(texts.get("metrics.json", "{}"), str(folder / "metrics.json"))
    lines = enumerate(texts.get("log.jsonl", "").splitlines(), start=1)
    log = [parse_json(line, f"{folder / 'log.jsonl'}, line {number}") for number, line in lines if line.strip()]
    return Run(folder, metrics, log)


def logged(run: Run, key: str) -> list[tuple[float, float]]:
    """(epoch, value) of all that was logged under `key` during a run's training.

    What is evaluated after the training's summary is the model that was kept, which may be that of an earlier epoch.

    Raises:
        UserError: if one of them is not a number.
    """
    source = str(run.folder / "log.jsonl")
    summary = next((index for index, entry in enumerate(run.log) if "train_runtime" in entry), len(run.log))
    points = [(number(entry, "epoch", source), number(entry, key, source)) for entry in run.log[:summary]]
    return [(epoch, value) for epoch, value in points if epoch is not None and value is not None]


def check_names(runs: list[Run]) -> None:
    """Raise a UserError if two runs have one name."""
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if repeated:
        raise UserError(f"two runs are named {repeated[0]}: rename one of the folders")


def group_runs(runs: list[Run]) -> dict[str, Group]:
    """The groups by name, in the order of their first runs.

    Raises:
        UserError: if a run's seed is unknown, differs from that in its name, or is that of another run of its group.
    """
    groups = {}
    for run in runs:
        name, _, suffix = re.fullmatch(r"(.+?)(_seed(\d+))?", run.name).groups()
        seed = run.number("seed")
        if seed is None:
            raise UserError(f"{run.folder / 'metrics.json'} has no seed")
        if suffix is not None and int(suffix) != seed:
            raise UserError(f"{run.folder / 'metrics.json'}: seed is {seed}, but the name of the run says {suffix}")
        members = groups.setdefault(name, Group(name, {})).runs
        if seed in members:
            raise UserError(f"{members[seed].name} and {run.name} have the same seed, {seed}")
        members[seed] = run
    for group in groups.values():
        group.runs = dict(sorted(group.runs.items()))
    return groups


def spread(values: list[float]) -> str:
    """Mean and, of more than one value, sample standard deviation: `85.38 ± 0.12`."""
    if not values:
        return MISSING
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def millions(value: int | None) -> str:
    return MISSING if value is None else f"{value / 1e6:.2f}"


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def parse_json(text: str, source: str, kind: type = dict) -> Any:
    """Parse a JSON object, or an array if `kind` is list; a message about a mistake in it names the `source`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    if not isinstance(value, kind):
        wanted = {dict: "object", list: "array"}[kind]
        raise UserError(f"{source} must hold a JSON {wanted}, not a {type(value).__name__}")
    return value


def load_published(
    path: Path, texts: tuple[str, ...], numbers: tuple[str, ...], complete: bool = True
) -> list[dict[str, Any]]:
    """Published figures: rows of texts and of numbers, which may be missing or null unless they must be `complete`.

    Raises:
        UserError: if the file cannot be read or a row is not of this kind.
    """
    rows = parse_json(read(path), str(path), list)
    for index, row in enumerate(rows):
        source = f"{path}, row {index + 1}"
        if not isinstance(row, dict):
            raise UserError(f"{source} must be a JSON object, not a {type(row).__name__}")
        for key in texts:
            if not isinstance(row.get(key), str):
                raise UserError(f"{source}: {key} is {row.get(key)!r}, not a string")
        for key in numbers:
            if number(row, key, source) is None and complete:
                raise UserError(f"{source} has no {key}")
    return rows


def link(run: Run, text: str, parent: Path) -> str:
    """Markdown link to a run's folder from a document in the folder `parent`."""
    return f"[{text}]({Path(os.path.relpath(run.folder, parent)).as_posix()})"


def new_figure(**kwargs: Any) -> "Figure":
    """A matplotlib figure.

    Raises:
        UserError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('matplotlib is missing: pip install "modeling-grassmann[reports]"') from error
    return Figure(**kwargs)


def legend_columns(labels: list[str]) -> int:
    """In how many columns a legend with these labels fits above a picture."""
    return 2 if max(map(len, labels)) <= 34 else 1


def finish_curves(figure: "Figure", axes: "Axes", path: Path) -> None:
    """Finish a picture of curves that have labels, with perplexities from bottom to top, and write it.

    Raises:
        UserError: if the file cannot be written.
    """
    from matplotlib.ticker import NullLocator, ScalarFormatter

    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.tick_params(labelsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    columns = legend_columns([line.get_label() for line in axes.lines])
    # Outside of the axes, where it covers no curve.
    figure.legend(loc="outside upper left", ncols=columns, fontsize=11, frameon=False)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        UserError: if the file cannot be written.
    """
    # A canvas of its own draws with Agg, whatever backend the user's pyplot would choose.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    try:
        # Without the version of matplotlib, equal logs give equal files.
        FigureCanvasAgg(figure).print_figure(path, dpi=150, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_document(path: Path, sections: list[str]) -> None:
    """Write the sections that are not empty.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3em 0.8em; border-bottom: 1px solid #ddd; text-align: left; }
td { white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
img { max-width: 100%; height: auto; }
code { background: #f2f2f2; padding: 0 0.2em; }
"""


def write_page(document: Path) -> Path:
    """Make of a Markdown document a page of HTML beside it that holds the document's pictures.

    Raises:
        UserError: if markdown-it-py is missing, or a file cannot be read or written.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise UserError('markdown-it-py is missing: pip install "modeling-grassmann[reports]"') from error
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def picture(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        source = tokens[index].attrGet("src")
        try:
            content = base64.b64encode((document.parent / source).read_bytes()).decode()
        except OSError as error:
            raise UserError(f"cannot read {document.parent / source}: {error.strerror}") from error
        tokens[index].attrSet("src", f"data:image/png;base64,{content}")
        return renderer.image(tokens, index, options, env)

    parser.add_render_rule("image", picture)
    text = read(document)
    body = parser.render(text).replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    title = html.escape(text.splitlines()[0].lstrip("# "))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    page = document.with_name(document.name.removesuffix(".md") + ".html")
    write_document(
        page,
        [f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>{body}</body></html>'],
    )
    return page


def output_paths(output: Path) -> tuple[Path, Path]:
    """The document and the picture that `--output` stands for, in a folder that then exists.

    Raises:
        UserError: if the folder cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {output.parent}: {error.strerror}") from error
    # Not `with_suffix`: a name may hold a dot.
    return output.with_name(output.name + ".md"), output.with_name(output.name + ".png")


def positive(text: str) -> int:
    """The `type` of an argument that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer of at least 1")
    return int(text)


class RecordsParser(argparse.ArgumentParser):
    """Command line of a script that works on recorded runs; mistakes are `UserError`s."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> None:
        raise UserError(message)


class ReportParser(RecordsParser):
    """Command line of a report: folders of runs and `--output`."""

    def __init__(self, description: str):
        super().__init__(description)
        self.add_argument("runs", nargs="+", type=Path, help="Folders of the runs.")
        self.add_argument("--output", required=True, type=Path, help="Files to write, without .md and .png.")
