"""Table and picture of what models recall, from the files that runs of `run_recall.py` leave behind.

    python trainer_scripts/report_recall.py model_cards/recall_* --output docs/recall

writes `docs/recall.md` and `docs/recall.png`. Every figure is read from the `recall.json` of each run. Runs whose
names differ only in a trailing `_seed<N>` are one model, whose figures are those of all their answers.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from arguments import UserError, exits_on_user_error
from run_records import (
    MISSING,
    Group,
    ReportParser,
    Run,
    check_names,
    curve_style,
    group_runs,
    load_run,
    new_figure,
    output_paths,
    parse_json,
    read,
    save_figure,
    seeds_cell,
    table_head,
    write_document,
)


TASKS = {"recall": "Values of earlier keys", "copying": "Repetitions of a segment"}


def load_recall(run: Run) -> dict[str, Any]:
    """What a run measured.

    Raises:
        UserError: if it has no `recall.json`.
    """
    path = run.folder / "recall.json"
    if not path.is_file():
        raise UserError(f"{run.folder} has no recall.json: run_recall.py writes it with do_predict")
    return parse_json(read(path), str(path))


def accuracies(record: dict[str, Any], key: str) -> dict[int, float]:
    """Accuracy, each answer counted once, by what a key of the record's cells says.

    Args:
        record: what a run measured.
        key: `num_pairs`, at the length of the training, or `distance`, with numbers of pairs that were trained. A
            distance stands for those from it up to twice as many.
    """
    trained, correct, answers = record["trained"], {}, {}
    for cell in record["cells"]:
        if "refused" in cell:
            continue
        points = []
        if key == "num_pairs" and cell["length"] == trained["length"]:
            points = [(cell["num_pairs"], cell["answers"], cell["accuracy"])]
        elif key == "distance" and cell["num_pairs"] in trained["num_pairs"]:
            points = [(entry["first"], entry["count"], entry["mean"]) for entry in cell["by_distance"]]
        for place, count, accuracy in points:
            correct[place] = correct.get(place, 0) + count * accuracy
            answers[place] = answers.get(place, 0) + count
    return {place: correct[place] / answers[place] for place in sorted(correct)}


def results_table(groups: list[Group], records: list[dict[str, Any]], parent: Path) -> str:
    """Markdown table of accuracy in percent, one row a model, one column a length and number of pairs."""
    sizes = sorted({(cell["length"], cell["num_pairs"]) for record in records for cell in record["cells"]})
    header = ["model", "seeds", "parameters", *(f"{pairs} pairs in {length:,}" for length, pairs in sizes)]
    lines = table_head(header)
    notes = []
    for group, record in zip(groups, records):
        parameters = group.size("parameters")
        row = [group.name, seeds_cell(group, parent), MISSING if parameters is None else f"{parameters:,}"]
        for length, num_pairs in sizes:
            cells = [cell for cell in record["cells"] if (cell["length"], cell["num_pairs"]) == (length, num_pairs)]
            values = [cell["accuracy"] for cell in cells if "accuracy" in cell]
            row.append(f"{100 * statistics.fmean(values):.1f}" if values else MISSING)
        reasons = {(cell["length"], cell["refused"]) for cell in record["cells"] if "refused" in cell}
        notes += [f"- {group.name}, {length:,} tokens: {reason}." for length, reason in sorted(reasons)]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines + (["", *notes] if notes else []))


def plot(groups: list[Group], records: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against the number of pairs and against distance, one curve a model, as a PNG.

    Raises:
        UserError: if matplotlib is missing or the file cannot be written.
    """
    figure = new_figure(figsize=(10, 4.2 + 0.23 * math.ceil(len(groups) / 2)), layout="constrained")
    from matplotlib.ticker import StrMethodFormatter

    trained = records[0]["trained"]
    copying = records[0]["task"] == "copying"
    panels = [
        ("num_pairs", f"pairs, in {trained['length']:,} tokens", max(trained["num_pairs"])),
        ("distance", f"{'tokens of the gap' if copying else 'distance'}, from here to twice as much", None),
    ]
    for axes, (key, label, most) in zip(figure.subplots(1, 2, sharey=True), panels):
        for index, (group, record) in enumerate(zip(groups, records)):
            curve = accuracies(record, key)
            # One legend for both panels.
            name = group.name if key == "num_pairs" else None
            axes.plot(curve.keys(), curve.values(), label=name, **curve_style(index))
        axes.axvline(most or trained["length"], color="0.5", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(label, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "num_pairs":
            axes.set_ylabel("accuracy", fontsize=12)
    figure.legend(loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    save_figure(figure, path)


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = ReportParser(__doc__).parse_args(argv)
    runs = [load_run(folder) for folder in args.runs]
    check_names(runs)
    records = [load_recall(run) for run in runs]
    for run, record in zip(runs, records):
        for key in ("task", "trained", "chance"):
            if record[key] != records[0][key]:
                raise UserError(
                    f"{runs[0].name} and {run.name} cannot be compared: {key} is {records[0][key]} and {record[key]}"
                )
    by_run = dict(zip((run.name for run in runs), records))
    groups = list(group_runs(runs).values())
    pooled = [
        {**records[0], "cells": [cell for run in group.runs.values() for cell in by_run[run.name]["cells"]]}
        for group in groups
    ]
    table = results_table(groups, pooled, args.output.parent)
    document, picture = output_paths(args.output)
    plot(groups, pooled, picture)
    task, trained = records[0]["task"], records[0]["trained"]
    pairs = ", ".join(map(str, trained["num_pairs"]))
    sections = [
        f"# Recall: {args.output.name}",
        f"{TASKS[task]}, described in `trainer_scripts/recall_data.py`: accuracy in percent, over all answers. Trained"
        f" with {pairs} pairs in {trained['length']:,} tokens; guessing among all possible answers gives"
        f" {100 * records[0]['chance']:.1f}.",
        table,
        f"![Accuracy against number of pairs and against distance, one curve a model]({picture.name})",
        "Dashed: the most pairs, and the length, of the training. The curves over distances are of all lengths,"
        " with the numbers of pairs of the training.",
        "Written by `trainer_scripts/report_recall.py` from the `recall.json` of each run.",
    ]
    write_document(document, sections)
    print(f"wrote {document} and {picture}")


if __name__ == "__main__":
    main()
