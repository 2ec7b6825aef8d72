"""Rounding errors: every way to compute the mixer and a whole model, in every type, against the naive one in float64.

    python benchmarks/numerics.py --output benchmarks/results/numerics_cpu.json
    python benchmarks/numerics.py --page docs/numerics.md

The second command measures nothing: it writes the page from the records in `benchmarks/results`. The reference has the
same weights and inputs, rounded to the type in question, so that errors are those of the computation alone.
"""

import copy
import json
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import TimingArguments, markdown, start_record, write_record
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM, PluckerMixer, plucker_features, wedge
from modeling_grassmann.plucker import choose_backend, num_plucker_coordinates


RECORDS = Path(__file__).parent / "results"
# Records that the page shows, as far as they are there.
NAMES = {"numerics_h200": "GPU", "numerics_cpu": "CPU"}

PATHS = ("naive", "torch", "torch, compiled", "triton")
# Type of weights and inputs, of autocast, and whether products of float32 matrices may be rounded to TF32.
TYPES = {
    "float64": (torch.float64, None, False),
    "float32": (torch.float32, None, False),
    "float32, TF32 products": (torch.float32, None, True),
    "bfloat16": (torch.bfloat16, None, False),
    "float16": (torch.float16, None, False),
    "float32, bfloat16 autocast": (torch.float32, torch.bfloat16, False),
}
# Compilation takes longer than everything else.
COMPILED_TYPES = ("float32", "bfloat16", "float32, bfloat16 autocast")
OFFSETS = [1, 2, 4, 8, 12, 16]
# Pairs of vectors, by the sine of their angle.
SINES = (1.0, 1e-1, 1e-2, 2e-3, 5e-4, 1e-5, 1e-7)
# What the published code divides by at least, in the place of the rule for degenerate pairs.
PUBLISHED_CLAMP = 1e-8


@dataclass
class NumericsArguments(TimingArguments):
    """Sizes and device."""

    batch_size: int = field(default=2, metadata={"help": "Sequences."})
    length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    hidden_size: int = field(default=256, metadata={"help": "Size of a token's hidden state."})
    reduced_size: int = field(default=32, metadata={"help": "Dimension in which planes are spanned."})
    vocab_size: int = field(default=30522, metadata={"help": "Tokens of the model's vocabulary."})
    num_pairs: int = field(default=256, metadata={"help": "Pairs of vectors at each angle."})
    compile: bool = field(default=True, metadata={"help": "Whether to measure the compiled path too."})
    page: str | None = field(
        default=None, metadata={"help": "Markdown file to write from the records in benchmarks/results."}
    )

    POSITIVE = ("batch_size", "length", "hidden_size", "num_pairs")


@contextmanager
def precision(autocast: torch.dtype | None, tf32: bool, device: str):
    """Compute in a type of [`TYPES`]."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def variants(args: NumericsArguments) -> list[tuple[str, str]]:
    """Types and paths that can serve on this device, without the reference itself."""
    pairs = []
    for name, (dtype, _, tf32) in TYPES.items():
        if tf32 and args.device != "cuda":
            continue
        for path in PATHS:
            if path == "triton":
                tensor = torch.zeros(1, device=args.device, dtype=dtype)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if args.device != "cuda" or choose_backend("triton", tensor, args.reduced_size) != "triton":
                        continue
            if path == "torch, compiled" and (not args.compile or name not in COMPILED_TYPES):
                continue
            if (name, path) != ("float64", "naive"):
                pairs.append((name, path))
    return pairs


def on_path(module: nn.Module, path: str) -> nn.Module:
    """A copy of a model or mixer whose mixers take this path."""
    module = copy.deepcopy(module)
    if path == "torch, compiled":
        torch._dynamo.reset()
    for mixer in module.modules():
        if isinstance(mixer, PluckerMixer):
            mixer.backend = path.removesuffix(", compiled")
            if path == "torch, compiled":
                mixer.compile()
    return module


def errors(results: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """By tensor: `‖x - x_ref‖ / ‖x_ref‖` in Frobenius norm, and `max |x - x_ref| / max |x_ref|`."""
    found = {}
    for name, expected in reference.items():
        difference = results[name].detach().double() - expected
        found[name] = {
            "relative": (difference.norm() / expected.norm()).item(),
            "largest": (difference.abs().max() / expected.abs().max()).item(),
        }
    return found


def make_mixer(args: NumericsArguments) -> PluckerMixer:
    """A mixer whose parts are of one size: its features vary as much as the hidden states, by one."""
    torch.manual_seed(0)
    mixer = PluckerMixer(args.hidden_size, args.reduced_size, OFFSETS)
    nn.init.normal_(mixer.plucker_proj.weight)
    for bias in (mixer.reduce.bias, mixer.plucker_proj.bias, mixer.gate_proj.bias, mixer.norm.bias):
        nn.init.normal_(bias, std=0.2)
    return mixer


def mixer_results(
    mixer: PluckerMixer, hidden_states, cotangent, type_name: str, device: str
) -> dict[str, torch.Tensor]:
    """The output and the gradients of the input and every parameter."""
    _, autocast, tf32 = TYPES[type_name]
    with precision(autocast, tf32, device):
        output = mixer(hidden_states)
        inputs = {"hidden_states": hidden_states, **dict(mixer.named_parameters())}
        gradients = torch.autograd.grad(output, list(inputs.values()), cotangent.to(output))
    return {"output": output, **dict(zip(inputs, gradients))}


def measure_mixer(args: NumericsArguments) -> list[dict[str, Any]]:
    """Errors of one mixer's output and gradients, by type and path."""
    mixer = make_mixer(args).to(args.device)
    shape, rows = (args.batch_size, args.length, args.hidden_size), []
    hidden_states, cotangent = torch.randn(2, *shape).to(args.device)
    for type_name, path in variants(args):
        dtype = TYPES[type_name][0]
        rounded = copy.deepcopy(mixer).to(dtype)
        inputs = [hidden_states.to(dtype).requires_grad_(), cotangent.to(dtype)]
        exact = on_path(rounded.double(), "naive")
        reference = mixer_results(
            exact, *(x.detach().double().requires_grad_() for x in inputs), "float64", args.device
        )
        results = mixer_results(on_path(rounded.to(dtype), path), *inputs, type_name, args.device)
        rows.append({"type": type_name, "path": path, "errors": errors(results, reference)})
    return rows


def make_model(args: NumericsArguments) -> GrassmannForCausalLM:
    """Six layers without positions, so that equal tokens are parallel; each layer keeps the size of its input."""
    torch.manual_seed(0)
    config = GrassmannConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        reduced_size=args.reduced_size,
        offsets=OFFSETS,
        max_position_embeddings=None,
        initializer_range=args.hidden_size**-0.5,
    )
    model = GrassmannForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.mixer.plucker_proj.weight)
    return model


def model_results(
    model: GrassmannForCausalLM, ids: torch.Tensor, type_name: str, device: str
) -> dict[str, torch.Tensor]:
    """The hidden states after each layer, the logits and the loss."""
    _, autocast, tf32 = TYPES[type_name]
    results = {}
    for index, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_hook(
            lambda _module, _inputs, output, name=f"layer {index}": results.__setitem__(name, output)
        )
    with precision(autocast, tf32, device), torch.no_grad():
        logits = model(ids).logits
    # In float64, so that its error is that of the logits.
    loss = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten())
    return {**results, "logits": logits, "loss": loss}


def measure_model(args: NumericsArguments) -> list[dict[str, Any]]:
    """Errors after each layer of a model and in its logits and loss, by input, type and path."""
    model, rows = make_model(args).to(args.device), []
    shape = (args.batch_size, args.length)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "random tokens": torch.randint(args.vocab_size, shape, generator=generator),
        # Each token some 32 times in a row: most pairs are equal tokens, and span no plane.
        "repeated tokens": torch.randint(args.vocab_size, (shape[0], -(-shape[1] // 32)), generator=generator)
        .repeat_interleave(32, dim=1)[:, : shape[1]]
        .contiguous(),
    }
    for type_name, path in variants(args):
        rounded = copy.deepcopy(model).to(TYPES[type_name][0])
        candidate, exact = on_path(rounded, path), on_path(rounded, "naive").double()
        for name, ids in inputs.items():
            reference = model_results(exact, ids.to(args.device), "float64", args.device)
            results = model_results(candidate, ids.to(args.device), type_name, args.device)
            rows.append({"input": name, "type": type_name, "path": path, "errors": errors(results, reference)})
    return rows


def published_features(query, source, weight, *_arguments) -> torch.Tensor:
    """Features at offset 1 as the published code computes them: every norm is clamped, and every pair counts."""
    planes = wedge(query[:, 1:, 0], source[:, :-1, 0])
    planes = planes / planes.norm(dim=-1, keepdim=True).clamp(min=PUBLISHED_CLAMP)
    return F.pad(F.linear(planes, weight), (0, 0, 1, 0))


def feature_function(path: str):
    if path == "published":
        return published_features
    backend = path.removesuffix(", compiled")

    def features(query, source, weight):
        return plucker_features(query, source, weight, None, [1], backend=backend)

    if path == "torch, compiled":
        torch._dynamo.reset()
        return torch.compile(features)
    return features


def make_pairs(sine: float, args: NumericsArguments) -> torch.Tensor:
    """Pairs of vectors with norms around 1 at an angle: `(pairs, 2, 1, r)`, the neighbour first."""
    generator = torch.Generator().manual_seed(2)
    first, other = torch.randn(2, args.num_pairs, args.reduced_size, generator=generator, dtype=torch.float64)
    first = F.normalize(first, dim=-1)
    other = F.normalize(other - (first * other).sum(-1, keepdim=True) * first, dim=-1)
    second = math.sqrt(1 - sine**2) * first + sine * other
    return torch.stack([first, 2 * second], dim=1)[:, :, None]


def measure_degenerate(args: NumericsArguments) -> list[dict[str, Any]]:
    """Errors of features, and largest gradients, of pairs that are nearly or exactly parallel, by type and path."""
    inputs = {f"sine {sine:.0e}": make_pairs(sine, args) for sine in SINES}
    inputs["equal"] = make_pairs(0.0, args)
    inputs["zero neighbour"] = make_pairs(1.0, args) * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    generator = torch.Generator().manual_seed(3)
    shape = (args.hidden_size, num_plucker_coordinates(args.reduced_size))
    # A feature of a plane has components of size one.
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    cotangent = torch.randn(args.num_pairs, 2, args.hidden_size, generator=generator, dtype=torch.float64)
    cotangent = (cotangent / args.hidden_size**0.5).to(args.device)

    def results(function, vectors, matrix, dtype):
        vectors = vectors.to(args.device, dtype).requires_grad_()
        output = function(vectors, vectors, matrix.to(args.device, dtype))
        (gradient,) = torch.autograd.grad(output, vectors, cotangent.to(dtype))
        return output.detach().double(), gradient.double()

    rows = []
    for type_name, path in [*variants(args), *((name, "published") for name in ("float64", "float32", "bfloat16"))]:
        dtype, autocast, tf32 = TYPES[type_name]
        if autocast or tf32:
            continue
        function = feature_function(path)
        exact = feature_function("published" if path == "published" else "naive")
        for name, vectors in inputs.items():
            rounded = vectors.to(dtype), weight.to(dtype)
            output, gradient = results(function, *rounded, dtype)
            expected, _ = results(exact, *rounded, torch.float64)
            rows.append(
                {
                    "pairs": name,
                    "type": type_name,
                    "path": path,
                    # Root mean square over the components of the tokens that have a pair.
                    "error": (output - expected)[:, 1].square().mean().sqrt().item(),
                    "largest_gradient": gradient.abs().max().item(),
                }
            )
    return rows


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def mixer_table(record: dict[str, Any], measure: str) -> str:
    shown = ["output", "hidden_states", "reduce.weight", "plucker_proj.weight", "gate_proj.weight", "norm.weight"]
    rows = [["type", "path", *shown, "worst of all"]]
    for row in record["mixer"]:
        values = {name: error[measure] for name, error in row["errors"].items()}
        rows.append(
            [row["type"], row["path"], *(number(values[name]) for name in shown), number(max(values.values()))]
        )
    return markdown(rows, left=2)


def model_table(record: dict[str, Any], name: str) -> str:
    chosen = [row for row in record["model"] if row["input"] == name]
    rows = [["type", "path", *chosen[0]["errors"]]]
    for row in chosen:
        rows.append([row["type"], row["path"], *(number(error["relative"]) for error in row["errors"].values())])
    return markdown(rows, left=2)


def degenerate_table(record: dict[str, Any], type_name: str, measure: str) -> str:
    chosen = [row for row in record["degenerate"] if row["type"] == type_name]
    values = {(row["pairs"], row["path"]): row[measure] for row in chosen}
    paths = list(dict.fromkeys(row["path"] for row in chosen))
    rows = [["pairs", *paths]]
    for pairs in dict.fromkeys(row["pairs"] for row in chosen):
        rows.append([pairs, *(number(values[pairs, path]) for path in paths)])
    return markdown(rows, left=1)


def tables(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Every table of a record, with its heading."""
    sections = [
        ("One mixer: relative error", mixer_table(record, "relative")),
        ("One mixer: largest error", mixer_table(record, "largest")),
    ]
    for name in dict.fromkeys(row["input"] for row in record["model"]):
        sections.append((f"Six layers, {name}: relative error", model_table(record, name)))
    for name in dict.fromkeys(row["type"] for row in record["degenerate"]):
        sections.append((f"Parallel vectors, {name}: error of features", degenerate_table(record, name, "error")))
        sections.append(
            (f"Parallel vectors, {name}: largest gradient", degenerate_table(record, name, "largest_gradient"))
        )
    return sections


EXPLANATION = """\
# Rounding errors

How far every way to compute the model is from the naive reference in float64, by type. Paths are the backends of
`plucker_features`: `naive` follows the paper, `torch` is the exact collapse, `triton` the fused kernels. The reference
has the same weights and inputs, rounded to the type in question: errors are those of the computation alone.

- **One mixer**: output and gradients of a mixer whose features are as large as its hidden states. The relative error
  is `‖x - x_ref‖ / ‖x_ref‖` in Frobenius norm, the largest is `max |x - x_ref| / max |x_ref|`. The last column is the
  worst of the output, the gradient of the input and those of all parameters.
- **Six layers**: relative error of the hidden states after each layer, of the logits, and of the loss, which is
  computed in float64 from the logits. The model has no positions. With repeated tokens, each stands 32 times in a row,
  so that most pairs are of equal tokens.
- **Parallel vectors**: features of single pairs, whose components have size one, and the largest component of a
  gradient, by the sine of the angle between the two vectors before they are rounded, which turns a vector in bfloat16
  by up to 4e-3. A feature's error is its root mean square. Up to a sine of 1e-3, `plucker_eps`, a pair counts as
  parallel: its feature and gradient are zero. `published` is the published form, which divides by `max(‖p‖, 1e-8)`,
  against itself in float64: where the vectors are parallel up to rounding, it turns rounding errors into features of
  full size, and its gradients are those of a division by nearly zero."""


def render(records: dict[str, dict[str, Any]]) -> str:
    """The page, from records by what they ran on."""
    parts = [EXPLANATION]
    for name, record in records.items():
        versions = f"torch {record['torch']}, commit `{record['commit']}`"
        sizes = f"{record['batch_size']} x {record['length']} tokens, d = {record['hidden_size']}"
        parts.append(
            f"## {name}: {record['device_name']}\n\n{sizes}, r = {record['reduced_size']}, {len(OFFSETS)} offsets; "
            f"{versions}."
        )
        parts += [f"### {heading}\n\n{table}" for heading, table in tables(record)]
    parts.append("Written by `python benchmarks/numerics.py --page docs/numerics.md` from `benchmarks/results`.")
    return "\n\n".join(parts) + "\n"


def read_records() -> dict[str, dict[str, Any]]:
    paths = {title: RECORDS / f"{name}.json" for name, title in NAMES.items()}
    return {title: json.loads(path.read_text(encoding="utf-8")) for title, path in paths.items() if path.exists()}


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(NumericsArguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.page:
            Path(args.page).write_text(render(read_records()), encoding="utf-8")
            return
        make_mixer(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")

    record = start_record(args)
    for name in ("repeats", "warmup", "page"):
        del record[name]
    for name, measure in [("mixer", measure_mixer), ("model", measure_model), ("degenerate", measure_degenerate)]:
        record[name] = measure(args)
    for heading, table in tables(record):
        print(f"\n{heading}\n\n{table}")
    write_record(record, args.output, parser)


if __name__ == "__main__":
    main()
