"""Write docs/speed.md and its pictures from the records of the benchmarks in benchmarks/results/.

    python benchmarks/speed_page.py

A benchmark without a record has its command and no figures.
"""

import json
from pathlib import Path
from typing import Any

import generation
import mixer_length
import training_length


REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
INTRODUCTION = """# Speed

Each section has the command that measures it. A run prints commit, device, versions and shapes, takes medians of
repeated runs, and writes its rows as it goes, so that one that is stopped keeps them. `--time_limit` bounds a run,
`--from_json` shows a record again. The tables are written by `python benchmarks/speed_page.py` from the records in
[`benchmarks/results`](../benchmarks/results)."""
# Title, module, command, and what to know before its figures.
SECTIONS = [
    (
        "One mixing layer",
        mixer_length,
        "python benchmarks/mixer_length.py --output mixer.json --plot mixer.png",
        "Width 256, planes in R^32, six offsets, bfloat16, 65,536 tokens a call, beside layers of its width.",
    ),
    (
        "Training",
        training_length,
        "python benchmarks/training_length.py --output training.json --plot training.png",
        "Forward, loss, backward and AdamW under bfloat16 autocast, 65,536 tokens a step, against a Llama of as many\n"
        "parameters. Column `of operations` is how many times the operations a token Llama needs.",
    ),
    (
        "Generation",
        generation,
        "python benchmarks/generation.py --output generation.json --plot generation.png",
        "Greedy decoding in bfloat16 with CUDA graphs, against a Llama of as many parameters with a static cache.",
    ),
]


def record_path(module: Any) -> Path:
    return RESULTS / f"{module.__name__}_h200.json"


def page(records: dict[str, dict]) -> str:
    """The document; `records` by name of their module."""
    parts = [INTRODUCTION]
    for title, module, command, text in SECTIONS:
        parts += [f"## {title}", f"```bash\n{command}\n```", text]
        record = records.get(module.__name__)
        if record is not None:
            path = record_path(module)
            versions = [f"{name} {record[name]}" for name in ("torch", "triton", "transformers") if record.get(name)]
            where = f"{record['device_name']}, {', '.join(versions)}"
            parts.append(f"{where} ([record](../benchmarks/results/{path.name})):")
            parts += [f"![{title}]({picture(module)})", module.table(record)]
    return "\n\n".join(parts) + "\n"


def picture(module: Any) -> str:
    return f"speed_{module.__name__}.png"


def main() -> None:
    modules = {module.__name__: module for _, module, _, _ in SECTIONS if record_path(module).is_file()}
    records = {name: json.loads(record_path(module).read_text(encoding="utf-8")) for name, module in modules.items()}
    for name, record in records.items():
        modules[name].draw(record, str(DOCS / picture(modules[name])))
    (DOCS / "speed.md").write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
