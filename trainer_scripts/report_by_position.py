"""Tables and a picture of losses by position, from the `by_position.json` of runs of `evaluate_by_position.py`.

    python trainer_scripts/report_by_position.py runs/a/by_position.json runs/b/by_position.json --output docs/length

writes `docs/length.md` and `docs/length.png`.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from arguments import UserError, exits_on_user_error
from run_records import (
    MISSING,
    RecordsParser,
    curve_style,
    finish_curves,
    new_figure,
    output_paths,
    parse_json,
    read,
    table_head,
    write_document,
)


def load_records(paths: list[Path]) -> list[dict[str, Any]]:
    """What the files hold.

    Raises:
        UserError: if one is no such file, or they are of different data, so that their losses cannot be compared.
    """
    records = [parse_json(read(path), str(path)) for path in paths]
    for path, record in zip(paths, records):
        if not {"data", "models"} <= record.keys():
            raise UserError(f"{path} was not written by evaluate_by_position.py")
        if record["data"] != records[0]["data"]:
            raise UserError(f"{paths[0]} and {path} are of different data: {records[0]['data']} and {record['data']}")
    return records


def all_models(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of all records.

    Raises:
        UserError: if two have one name.
    """
    models = [model for record in records for model in record["models"]]
    names = Counter(model["name"] for model in models)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise UserError(f"two models are named {repeated[0]}: rename one of the folders")
    return models


def block_sizes(models: list[dict[str, Any]]) -> list[int]:
    return sorted({block["block_size"] for model in models for block in model["blocks"]})


def find_block(model: dict[str, Any], block_size: int) -> dict[str, Any]:
    """What was measured of a model in blocks of that size; empty if nothing was."""
    return next((block for block in model["blocks"] if block["block_size"] == block_size), {})


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = table_head(header)
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def totals_table(models: list[dict[str, Any]]) -> str:
    """Perplexity of all tokens against the size of the blocks, and why some are missing."""
    sizes, rows, notes = block_sizes(models), [], []
    for model in models:
        cells = [f"{model['parameters'] / 1e6:.2f}"]
        for size in sizes:
            block = find_block(model, size)
            cells.append(f"{block['perplexity']:.2f}" if "perplexity" in block else MISSING)
            if "refused" in block:
                notes.append(f"- {model['name']} in blocks of {size}: {block['refused']}.")
        rows.append([model["name"], *cells])
    header = ["model", "parameters (M)", *(f"blocks of {size:,}" for size in sizes)]
    return "\n".join([table(header, rows), *(["", *notes] if notes else [])])


def positions_table(models: list[dict[str, Any]], block_size: int) -> str:
    """Perplexity against the number of tokens before a prediction, in blocks of one size; empty if there is none."""
    measured = [block for model in models if "by_position" in (block := find_block(model, block_size))]
    if not measured:
        return ""
    ranges = [(entry["first"], entry["last"], entry["count"]) for entry in measured[0]["by_position"]]
    rows = []
    for index, (first, last, count) in enumerate(ranges):
        cells = [f"{count:,}"]
        for model in models:
            block = find_block(model, block_size)
            known = "by_position" in block
            cells.append(f"{perplexity(block['by_position'][index]['mean']):.2f}" if known else MISSING)
        rows.append([f"{first:,} to {last:,}" if last > first else f"{first:,}", *cells])
    header = ["tokens before", "predictions", *(model["name"] for model in models)]
    return f"## Blocks of {block_size:,} tokens\n\n{table(header, rows)}"


def plot(models: list[dict[str, Any]], path: Path) -> None:
    """Draw perplexity against the tokens before a prediction, in the longest blocks that each model can read.

    Raises:
        UserError: if matplotlib is missing, the file cannot be written, or there is nothing to draw.
    """
    figure = new_figure(figsize=(8, 4.8 + 0.23 * math.ceil(len(models) / 2)), layout="constrained")
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes = figure.add_subplot()
    for index, model in enumerate(models):
        blocks = [block for block in model["blocks"] if "by_position" in block]
        if not blocks:
            continue
        block = max(blocks, key=lambda block: block["block_size"])
        points = [(entry["first"], perplexity(entry["mean"])) for entry in block["by_position"]]
        label = f"{model['name']}, blocks of {block['block_size']:,}"
        axes.plot(*zip(*points), label=label, **curve_style(index))
    if not axes.lines:
        raise UserError("there is nothing to plot: no model could read any block")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlabel("tokens before the predicted one, from here to twice as many", fontsize=12)
    axes.set_ylabel("perplexity per token (log scale)", fontsize=12)
    finish_curves(figure, axes, path)


def write_report(records: list[dict[str, Any]], output: Path) -> None:
    """Write the tables and the picture of some records.

    Raises:
        UserError: if two models have one name, or a file cannot be written.
    """
    models = all_models(records)
    document, picture = output_paths(output)
    plot(models, picture)
    data = records[0]["data"]
    sections = [
        f"# Perplexity by position: {output.name}",
        f"The {data['split']} split of {data['source']}, {data['tokens']:,} tokens, cut into blocks that are read each"
        " for itself. Every token of a block but the first is predicted.",
        totals_table(models),
        f"![Perplexity against the number of tokens before the predicted one, one curve a model]({picture.name})",
        *(positions_table(models, size) for size in block_sizes(models)),
        "Written by `trainer_scripts/report_by_position.py`, from what `trainer_scripts/evaluate_by_position.py`"
        " measured.",
    ]
    write_document(document, sections)
    print(f"wrote {document} and {picture}")


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = RecordsParser(__doc__)
    parser.add_argument("records", nargs="+", type=Path, help="Files by_position.json.")
    parser.add_argument("--output", required=True, type=Path, help="Files to write, without .md and .png.")
    args = parser.parse_args(argv)
    write_report(load_records(args.records), args.output)


if __name__ == "__main__":
    main()
