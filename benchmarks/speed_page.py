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
        "Models with memories: `13M-memory-r10-3heads`, the preset, has three heads of planes in R^10 with values\n"
        "of 64. It trains at 0.94 of Llama's speed in rows of 256 tokens, at 0.97 in rows of 1,024, at 1.06 in rows\n"
        "of 4,096, from which on the target was to be ahead, at 1.51 in rows of 16,384, and at 2.60 in rows of\n"
        "65,536. `13M-memory`, with six heads of planes in R^8 and values of 32, has 0.94, 0.93, 1.05, 1.59 and\n"
        "3.50, three heads of planes in R^12 0.90, 1.00 and 1.35 in rows of 256, 4,096 and 16,384. Rows of 1,024\n"
        "and 65,536 of `13M-memory`, six heads of planes in R^10 and planes in R^16 were timed with earlier\n"
        "kernels.\n\n"
        "A row of up to 16,384 tokens is read by pairs of tokens, but those that a head has forgotten: decays are\n"
        "as they are initialised. A longer one is read in chunks, through states.\n\n"
        "In plain calls, which take the most memory, a step of 16 rows of 4,096 tokens peaks at 6.6 GiB with the\n"
        "preset and at 6.0 with Llama, one of a row of 65,536 at 7.8 and 6.0.",
    ),
    (
        "Generation",
        generation,
        "python benchmarks/generation.py --output generation.json --plot generation.png",
        "Greedy decoding in bfloat16, against a Llama of as many parameters with a static cache. Rows `graph` are\n"
        "the GPU's time: one CUDA graph of a step is replayed, as servers do. Rows `compiled` are what `generate`\n"
        "runs: CUDA graphs behind checks in Python, for which a GPU that is done in 0.2 ms waits. Where the\n"
        "records of models with memories have plain calls, a token takes 6 to 12 ms in them.\n\n"
        "The Grassmann model's step does the same work on the same state at every context. The state of\n"
        "`13M-memory` has 1.48 MiB a sequence in float32, that of `13M-memory-r10-3heads` 3.63, Llama's 24 at 4,096\n"
        "tokens. The target was to be ahead from 4,096 tokens on.\n\n"
        "Replayed, they are ahead from 1,024 on. A token takes `13M-memory-r10-3heads`, the preset, 0.20 to 0.21 ms,\n"
        "1.12, 1.29, 1.40 and 1.79 times as fast as Llama after 1,024, 4,096, 8,192 and 65,536 tokens, and a step of\n"
        "64 sequences 0.40 ms, 1.59, 2.48 and 15.0 times as fast after the last three. `13M-memory` is 1.17, 1.30,\n"
        "1.45 and 1.87 times as fast, with 64 sequences 2.14 times after 4,096 tokens.\n\n"
        "Compiled as by `generate`, one sequence takes the time of the host's checks: 0.35 to 0.73 ms a token with\n"
        "the preset and 0.32 to 0.69 with Llama, 0.89, 0.90 and 1.02 times as fast after 4,096, 8,192 and 65,536\n"
        "tokens. 64 sequences are decoded 1.21 and 2.36 times as fast by the preset after 4,096 and 8,192 tokens,\n"
        "and by `13M-memory` 1.02 times after 4,096 and, in a record of an earlier commit that ends in `slow_host`,\n"
        "2.57 and 16.6 times after 8,192 and 65,536.\n\n"
        "In plain calls a token takes the preset up to 10% longer than Llama. A prompt of one sequence takes it 2 to\n"
        "3 times as long up to 8,192 tokens, and 0.7 times with 65,536; prompts of 64 sequences 0.4 to 0.9 times.",
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
    """
    Models compiled once for all lengths or not at all, which are slower, are there for their memory; one length is no
    curve.
    """
    for_memory = record.get("dynamic") or not record.get("compile", True)
    if not hasattr(module, "draw") or for_memory or any("failed" in row for row in record["rows"]):
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
