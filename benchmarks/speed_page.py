"""Write docs/speed.md and its pictures from the records of the benchmarks in benchmarks/results/.

    python benchmarks/speed_page.py

A benchmark without a record has its command and no figures.
"""

import json
from pathlib import Path
from typing import Any

import generation
import mixer_length
import training_cpu
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
        "Width 256, planes in R^32, six offsets, bfloat16, 65,536 tokens a call (131,072 at that length), beside\n"
        "layers of its width. `calls` wait for Python and for launches, replays of a CUDA `graph` do not. Gated\n"
        "linear attention of flash-linear-attention 0.6.0 refuses its backward on this GPU with this Triton.\n\n"
        "Forward and backward of 65,536 tokens take 0.62 ms. A profile gives five products of cuBLAS 190 µs,\n"
        "gradients of the projection 83 (43 if matrix units never waited), of the norm 65 (54 if memory never did),\n"
        "the projection 54, its weight's gradient 48, tangents' gradients 30. The target of 8 ns is 0.52 ms.",
    ),
    (
        "Training",
        training_length,
        "python benchmarks/training_length.py --graphs --output training.json --plot training.png",
        "Forward, loss, backward and AdamW under bfloat16 autocast, against a Llama of as many parameters, both\n"
        "bodies compiled and replayed as CUDA graphs, four steps in a row; 65,536 tokens a step with 13M parameters,\n"
        "16,384 with 110M. Memory is of models without graphs, compiled once for all lengths and so less fast.\n"
        "Column `of operations` is how many times the operations a token Llama needs. The vocabulary is filled up to\n"
        "a multiple of 64: with BERT's 30,522, rows of logits begin at odd addresses, and both models are slower.\n\n"
        "Of a step of 13M parameters at 16,384 tokens, 18.8 ms when it was profiled, loss and vocabulary head took\n"
        "8.4, GELU 1.4, copies and casts 1.1; Llama's took 43.2, attention 25.4 of it. Without any body the ratio\n"
        "would be about 5, so that the target of 4 asks for a body of 2 ms.\n\n"
        "`13M-memory` has six heads of planes in R^8. It trains at 0.93 of Llama's speed in rows of 256 and 1,024\n"
        "tokens, at 0.99 in rows of 4,096, from which on the target was to be ahead, and is ahead behind that.\n"
        "`13M-memory-r10`, with planes in R^10, is ahead in rows of 65,536 alone, `13M-memory-r16` is slower still.\n"
        "Three heads with values twice as wide have half the pairs: `13M-memory-r10-3heads`, the preset, trains at\n"
        "0.99 of Llama's speed in rows of 4,096, and as fast in rows of 16,384. Its record is of newer kernels than\n"
        "those of the others. A row of up to 8,192 tokens is read by pairs of tokens, but those that a head has\n"
        "forgotten; a longer one in chunks, through states.\n\n"
        "In plain calls, which take the most memory, a step of 16 rows of 4,096 tokens peaks at 6.6 GiB with these\n"
        "three heads, and at 6.0 with Llama.",
    ),
    (
        "Generation",
        generation,
        "python benchmarks/generation.py --output generation.json --plot generation.png",
        "Greedy decoding in bfloat16 with CUDA graphs, against a Llama of as many parameters with a static cache.\n"
        "The Grassmann model's step does the same work on the same state at every context.\n\n"
        "The state of `13M-memory` has 1.48 MiB a sequence in float32, Llama's 24 MiB at 4,096 tokens. The target\n"
        "was to be ahead from 4,096 tokens on. One sequence alone is decoded as fast as by Llama after 4,096 tokens\n"
        "and 1.34 times as fast after 65,536; after 8,192 it was slower, as a step took 1.4 times as long as after\n"
        "4,096 for the same work. 64 sequences are decoded 1.53, 2.37 and 13.7 times as fast after 4,096, 8,192 and\n"
        "65,536 tokens. In plain calls, which wait for Python, a token takes 2 to 6% longer, prompts of up to 8,192\n"
        "tokens 1.8 to 3.2 times as long.\n\n"
        "`13M-memory-r10-3heads` has 3.63 MiB. One sequence takes 0.33 to 0.36 ms a token (0.64 after 8,192, with\n"
        "quartiles a quarter of a millisecond apart): more than Llama takes up to 8,192 tokens, and 0.83 of its time\n"
        "after 65,536. 64 sequences are decoded 1.10 times as fast after 4,096 tokens, 1.66 times after 8,192; that\n"
        "run ended before Llama's after 65,536.",
    ),
    (
        "On two CPU cores",
        training_cpu,
        "python benchmarks/training_cpu.py --threads 2 --output training_cpu.json",
        "Forward and backward of the body in float32, and decoding with a dynamic cache, in plain calls; 13M\n"
        "parameters, no dropout.",
    ),
]


def load_records(module: Any) -> dict[Path, dict[str, Any]]:
    """Records of a benchmark by their files: one, or one for each part of it that was run alone."""
    paths = sorted(RESULTS.glob(f"{module.__name__}*.json"))
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def page(records: dict[str, dict[Path, dict[str, Any]]]) -> str:
    """The document; `records` by name of their module."""
    parts = [INTRODUCTION]
    for title, module, command, text in SECTIONS:
        parts += [f"## {title}", f"```bash\n{command}\n```", text]
        for path, record in records.get(module.__name__, {}).items():
            versions = [f"{name} {record[name]}" for name in ("torch", "triton", "transformers") if record.get(name)]
            where = f"{record['device_name']}, {', '.join(versions)}"
            parts.append(f"{where} ([record](../benchmarks/results/{path.name})):")
            if has_picture(module, record):
                parts.append(f"![{title}]({picture(path)})")
            parts.append(module.table(record))
    return "\n\n".join(parts) + "\n"


def has_picture(module: Any, record: dict[str, Any]) -> bool:
    """Models compiled once for all lengths, which are slower, are there for their memory; one length is no curve."""
    if not hasattr(module, "draw") or record.get("dynamic") or any("failed" in row for row in record["rows"]):
        return False
    return len({row.get("length", row.get("context")) for row in record["rows"]}) > 1


def picture(path: Path) -> str:
    return f"speed_{path.stem.removesuffix('_h200')}.png"


def main() -> None:
    records = {}
    for _, module, _, _ in SECTIONS:
        records[module.__name__] = load_records(module)
        for path, record in records[module.__name__].items():
            if has_picture(module, record):
                module.draw(record, str(DOCS / picture(path)))
    (DOCS / "speed.md").write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
