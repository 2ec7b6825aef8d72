"""One mixing layer, from 128 to 131,072 tokens: the Plücker mixer beside attention and other linear mixers.

    python benchmarks/mixer_length.py --output mixer.json --plot mixer.png
    python benchmarks/mixer_length.py --candidates triton attention_compiled --lengths 256 65536
    python benchmarks/mixer_length.py --from_json mixer.json --plot mixer.png

Each call has the same number of tokens, in rows of one length; candidates take turns. `forward` runs without autograd,
`forward+backward` gives the gradients of the input and of all parameters. `calls` are plain calls, with the time in
which the device waits for Python; `graph` replays a CUDA graph of the same call, without it. Weights and inputs are
of one type. Before a row is timed, every form of the Plücker mixer must agree with the naive one on its inputs.

Compiled candidates are compiled for the shape at `static_lengths`; at other lengths, one compilation with symbolic
sizes serves all. Attention has projections without biases as in Llama, and no rotary positions.

- `naive`, `torch_compiled`, `triton`, `triton_compiled`: the Plücker mixer by its backends.
- `attention_compiled`: causal SDPA with the kernel that PyTorch chooses; `attention_cudnn_compiled`: with cuDNN's.
- `gla`, `simple_gla`, `mamba2`: layers of flash-linear-attention in their default proportions. `simple_gla` has
  Mamba-2's recurrence, one decay a head, without its convolution; `mamba2` needs the kernels of `mamba_ssm`.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from mixer import relative_error
from peers import mixer_flops
from plots import COLOURS, log_axes, new_figure, save
from timing import (
    SweepArguments,
    capture,
    check_known,
    free_memory,
    markdown,
    median_and_iqr,
    milliseconds,
    reason,
    run_sweep,
    take_turns,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_grassmann import PluckerMixer
from modeling_grassmann.plucker import choose_backend


PLUCKER = ("naive", "torch_compiled", "triton", "triton_compiled")
ATTENTION = ("attention_compiled", "attention_cudnn_compiled")
CANDIDATES = (*PLUCKER, *ATTENTION, "gla", "simple_gla", "mamba2")
PASSES = ("forward", "forward+backward")
TARGET_NS = 8
TARGET_LENGTH = 65536


@dataclass
class LengthArguments(SweepArguments):
    """Shapes and candidates."""

    lengths: list[int] = field(
        default_factory=lambda: [2**power for power in range(7, 18)], metadata={"help": "Tokens per sequence."}
    )
    static_lengths: list[int] = field(
        default_factory=lambda: [256, 65536, 131072], metadata={"help": "Lengths to compile for alone."}
    )
    tokens: int = field(default=65536, metadata={"help": "Tokens per call; a longer sequence is a call of its own."})
    candidates: list[str] = field(
        default_factory=lambda: list(CANDIDATES), metadata={"help": f"What to measure, of {', '.join(CANDIDATES)}."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Size of a token's hidden state."})
    head_size: int = field(default=64, metadata={"help": "Size of attention's heads."})
    reduced_size: int = field(default=32, metadata={"help": "Dimension in which planes are spanned."})
    offsets: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 12, 16], metadata={"help": "Distances to the neighbours, in tokens."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Type of weights and inputs."}
    )

    POSITIVE = ("repeats", "tokens", "hidden_size", "head_size")

    def __post_init__(self):
        super().__post_init__()
        check_known("candidates", self.candidates, CANDIDATES)
        if min(self.lengths) < 1:
            raise ValueError(f"lengths must be at least 1, got {min(self.lengths)}")


class CausalAttention(nn.Module):
    """Multi-head causal attention as in Llama, without its rotary positions."""

    def __init__(self, hidden_size: int, head_size: int, kernel: SDPBackend | None = None):
        super().__init__()
        self.head_size = min(head_size, hidden_size)
        self.kernel = kernel
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_size))  # (B, T, 3, H, d / H)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d / H)
        if self.kernel is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            with sdpa_kernel(self.kernel):
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class OfLibrary(nn.Module):
    """A layer of flash-linear-attention, which returns more than its output."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states)[0]


def make_layer(name: str, args: LengthArguments) -> nn.Module:
    """
    A candidate with random weights.

    Raises:
        RuntimeError: if it cannot run here, with the reason.
    """
    torch.manual_seed(0)
    name = name.removesuffix("_compiled")
    if name in ("naive", "torch", "triton"):
        layer = PluckerMixer(args.hidden_size, args.reduced_size, args.offsets, backend=name)
        sample = torch.empty(1, dtype=getattr(torch, args.dtype), device=args.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if choose_backend(name, sample, args.reduced_size) != name:
                raise RuntimeError(str(caught[0].message))
    elif name == "attention":
        layer = CausalAttention(args.hidden_size, args.head_size)
    elif name == "attention_cudnn":
        layer = CausalAttention(args.hidden_size, args.head_size, SDPBackend.CUDNN_ATTENTION)
    else:
        layer = OfLibrary(library_layer(name, args.hidden_size))
    return layer.to(args.device, getattr(torch, args.dtype))


def library_layer(name: str, hidden_size: int) -> nn.Module:
    try:
        from fla.layers import mamba2
        from fla.layers.gla import GatedLinearAttention
        from fla.layers.simple_gla import SimpleGatedLinearAttention
    except ImportError as error:
        raise RuntimeError(f"flash-linear-attention cannot be imported: {error}") from error
    if name == "gla":
        return GatedLinearAttention(hidden_size=hidden_size, num_heads=4)
    if name == "simple_gla":
        return SimpleGatedLinearAttention(hidden_size=hidden_size, num_heads=4)
    # Its other path is a reference that holds (tokens, chunk, heads, state) numbers.
    if not mamba2.is_fast_path_available:
        raise RuntimeError("Mamba-2's kernels, of mamba_ssm, are not installed")
    return mamba2.Mamba2(hidden_size=hidden_size, head_dim=64)


def make_passes(layer: Callable, hidden_states: torch.Tensor, output_gradient: torch.Tensor) -> dict[str, Callable]:
    """Pass -> function that returns its results: the output, with the gradients of input and parameters after it."""
    inputs = [hidden_states, *layer.parameters()]

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            return [layer(hidden_states)]

    def forward_backward() -> list[torch.Tensor]:
        output = layer(hidden_states)
        # Without its graph, whose nodes would still belong to this stream when the next call is captured in another.
        return [output.detach(), *torch.autograd.grad(output, inputs, output_gradient)]

    return dict(zip(PASSES, (forward, forward_backward)))


def measure(args: LengthArguments, record: dict[str, Any]) -> Iterator[None]:
    torch._dynamo.config.recompile_limit = 64
    record["flops_per_token"] = mixer_flops(args.hidden_size, args.reduced_size)
    record["ceilings"] = ceilings(args.device)
    record["parameters"], record["unavailable"], record["rows"] = {}, {}, []
    layers = {}
    for name in args.candidates:
        try:
            layers[name] = make_layer(name, args)
            record["parameters"][name] = sum(weight.numel() for weight in layers[name].parameters())
        except Exception as error:
            record["unavailable"][name] = reason(error)
    print(f"parameters: {record['parameters']}\nunavailable: {record['unavailable']}", flush=True)
    yield

    # The lengths with a compilation of their own come first: they are those that matter most.
    for length in sorted(args.lengths, key=lambda length: (length not in args.static_lengths, length)):
        if args.is_over():
            record["stopped"] = f"after {args.time_limit:g} s, before a length of {length}"
            return
        record["rows"] += measure_length(args, layers, length)
        print("\n".join(describe(row) for row in record["rows"] if row["length"] == length), flush=True)
        yield


def measure_length(args: LengthArguments, layers: dict[str, nn.Module], length: int) -> list[dict[str, Any]]:
    """Rows of all candidates at one length."""
    batch_size = max(args.tokens // length, 1)
    static = length in args.static_lengths
    if static:
        # A compilation with symbolic sizes would serve otherwise.
        torch._dynamo.reset()
    target = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden_states, output_gradient = (
        torch.randn(batch_size, length, args.hidden_size, **target) for _ in range(2)
    )  # (B, T, d)
    hidden_states.requires_grad_()
    if not static:
        torch._dynamo.maybe_mark_dynamic(hidden_states, (0, 1))

    reference = None
    functions, failures = {}, {}
    for name, layer in layers.items():
        called = torch.compile(layer, dynamic=False if static else None) if name.endswith("_compiled") else layer
        passes = make_passes(called, hidden_states, output_gradient)
        try:
            if name in PLUCKER:
                if reference is None:
                    reference = naive_results(args, layer, hidden_states, output_gradient)
                error = relative_error(passes["forward+backward"](), reference)
                # Written so that NaN fails too.
                if not error <= torch.finfo(target["dtype"]).eps ** 0.5:
                    raise ArithmeticError(f"disagrees with the naive mixer: relative error {error:.1e}")
            for function in passes.values():
                for _ in range(max(args.warmup, 1)):
                    function()
        except Exception as error:
            failures[name] = reason(error)
            free_memory(args.device)
            continue
        for name_of_pass, function in passes.items():
            functions[name, name_of_pass, "calls"] = function
            # What is slow enough has no launches to hide.
            if args.device == "cuda" and name != "naive":
                try:
                    functions[name, name_of_pass, "graph"] = capture(function)
                except Exception as error:
                    failures[name, name_of_pass, "graph"] = reason(error)
                    free_memory(args.device)
    del reference

    sizes = {"length": length, "batch_size": batch_size, "shapes": "static" if static else "symbolic"}
    rows = []
    times, failed = take_turns(functions, args)
    failures |= failed
    for (name, name_of_pass, mode), samples in times.items():
        row = median_and_iqr(samples)
        row["ns_per_token"] = row["median_ms"] * 1e6 / (batch_size * length)
        rows.append({"candidate": name, "pass": name_of_pass, "mode": mode, **sizes, **row})
    for key, failed in failures.items():
        name, name_of_pass, mode = key if isinstance(key, tuple) else (key, None, None)
        rows.append({"candidate": name, "pass": name_of_pass, "mode": mode, **sizes, "failed": failed})
    functions.clear()
    free_memory(args.device)
    return rows


def naive_results(
    args: LengthArguments, layer: nn.Module, hidden_states: torch.Tensor, output_gradient: torch.Tensor
) -> list[torch.Tensor]:
    naive = make_layer("naive", args)
    naive.load_state_dict(layer.state_dict())
    return make_passes(naive, hidden_states, output_gradient)["forward+backward"]()


def ceilings(device: str) -> dict[str, float]:
    """What the device can do at best: a large copy, bytes read and written, and a large product of random matrices."""
    size, count = (8192, 2**31) if device == "cuda" else (256, 2**20)
    source = torch.randn(count // 2, device=device, dtype=torch.bfloat16)  # 2 GiB on a GPU, and once more the copy
    copy = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = {}
    for name, function in (("copy", lambda: copy.copy_(source)), ("matmul", lambda: a @ b)):
        times = [milliseconds(function, device) for _ in range(13)][3:]
        best[name] = median_and_iqr(times)["median_ms"] * 1e-3
    return {
        "bytes_per_second": 2 * 2 * source.numel() / best["copy"],
        "flops_per_second": 2 * size**3 / best["matmul"],
    }


def necessary_bytes(record: dict[str, Any], name_of_pass: str) -> int:
    """
    Bytes a token of inputs read once and outputs written once. Forward: input and output. Backward: the input again,
    the output's gradient and the input's gradient. The weights are little beside them and left out.
    """
    tensors = {"forward": 2, "forward+backward": 2 + 3}[name_of_pass]
    return tensors * record["hidden_size"] * getattr(torch, record["dtype"]).itemsize


def describe(row: dict[str, Any]) -> str:
    figure = row.get("failed") or f"{row['ns_per_token']:.2f} ns per token"
    return f"{row['length']:>7} {row['candidate']:<24} {row['pass'] or '':<17} {row['mode'] or '':<6} {figure}"


def figures(record: dict[str, Any], name_of_pass: str, mode: str) -> dict[str, dict[int, float]]:
    """Candidate -> length -> ns per token, of one pass and mode."""
    found = {}
    for row in sorted(record["rows"], key=lambda row: row["length"]):
        if row["pass"] == name_of_pass and row["mode"] == mode and "failed" not in row:
            found.setdefault(row["candidate"], {})[row["length"]] = row["ns_per_token"]
    return {name: found[name] for name in CANDIDATES if name in found}


def table(record: dict[str, Any]) -> str:
    """ns per token by length and candidate, the mixer against the ceilings, and what did not run."""
    sections = []
    for name_of_pass in PASSES:
        for mode in ("calls", "graph"):
            by_name = figures(record, name_of_pass, mode)
            if not by_name:
                continue
            lengths = sorted({length for values in by_name.values() for length in values})
            rows = [["length", *by_name, "attention / triton"]]
            for length in lengths:
                cells = [f"{values[length]:.2f}" if length in values else "—" for values in by_name.values()]
                rows.append([f"{length:,}", *cells, advantage(by_name, length)])
            sections.append(f"{name_of_pass}, {mode}, ns per token:\n\n{markdown(rows, left=0)}")
    sections.append(against_ceilings(record))
    notes = [f"- {name}: not measured: {why}" for name, why in record["unavailable"].items()]
    failed = {(row["candidate"], row["length"], row["failed"]) for row in record["rows"] if "failed" in row}
    notes += [f"- {name} at {length:,}: {why}" for name, length, why in sorted(failed)]
    sections.append("\n".join(notes))
    if "stopped" in record:
        sections.append(f"Stopped {record['stopped']}.")
    return "\n\n".join(filter(None, sections))


def best(by_name: dict[str, dict[int, float]], names: tuple[str, ...], length: int) -> float | None:
    return min((by_name[name][length] for name in names if length in by_name.get(name, {})), default=None)


def advantage(by_name: dict[str, dict[int, float]], length: int) -> str:
    """How many times the time of the fused mixer the faster attention layer takes."""
    fused, attention = best(by_name, ("triton", "triton_compiled"), length), best(by_name, ATTENTION, length)
    return "—" if fused is None or attention is None else f"{attention / fused:.2f}x"


def against_ceilings(record: dict[str, Any]) -> str:
    """Operations and bytes a second of the fused mixer at its longest row, beside what the device can do at best."""
    flops, bandwidth = record["ceilings"]["flops_per_second"], record["ceilings"]["bytes_per_second"]
    rows = [["pass", "mode", "length", "ns per token", "floor", "TFLOP/s", "of matmul", "GB/s", "of copy"]]
    for name_of_pass, factor in zip(PASSES, (1, 3)):
        for mode in ("calls", "graph"):
            by_name = figures(record, name_of_pass, mode)
            lengths = {length for name in ("triton", "triton_compiled") for length in by_name.get(name, {})}
            if not lengths:
                continue
            length = TARGET_LENGTH if TARGET_LENGTH in lengths else max(lengths)
            ns = best(by_name, ("triton", "triton_compiled"), length)
            operations, moved = factor * record["flops_per_token"], necessary_bytes(record, name_of_pass)
            floor = max(operations / flops, moved / bandwidth) * 1e9
            rates = [f"{operations / ns / 1e3:.0f}", f"{operations / ns * 1e9 / flops:.0%}"]
            rates += [f"{moved / ns:.0f}", f"{moved / ns * 1e9 / bandwidth:.0%}"]
            rows.append([name_of_pass, mode, f"{length:,}", f"{ns:.2f}", f"{floor:.2f}", *rates])
    measured = f"Ceilings of the device: {flops / 1e12:.0f} TFLOP/s (product), {bandwidth / 1e9:.0f} GB/s (copy)."
    if len(rows) == 1:
        return measured
    goal = f"The target is at most {TARGET_NS} ns forward+backward at {TARGET_LENGTH:,} tokens."
    return f"{measured} Fused mixer against them, its necessary operations and bytes:\n\n{markdown(rows, 2)}\n\n{goal}"


def draw(record: dict[str, Any], path: str) -> None:
    """ns per token against length: solid as calls, dashed as CUDA graphs, with the target."""
    figure, axes = new_figure(len(PASSES))
    lengths = [row["length"] for row in record["rows"]]
    for axis, name_of_pass in zip(axes, PASSES):
        for mode, style in (("calls", "-"), ("graph", "--")):
            for name, values in figures(record, name_of_pass, mode).items():
                colour = COLOURS[CANDIDATES.index(name) % len(COLOURS)]
                label = name if mode == "calls" else None
                axis.plot(list(values), list(values.values()), style, color=colour, marker=".", label=label)
        if name_of_pass == "forward+backward":
            axis.axhline(TARGET_NS, color="black", linestyle=":", label=f"target, {TARGET_NS} ns")
        log_axes(axis, lengths, "length (tokens)", "ns per token", name_of_pass)
    figure.suptitle(f"One mixing layer, width {record['hidden_size']}, {record['device_name']} (dashed: CUDA graphs)")
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    run_sweep(LengthArguments, measure, table, draw, argv)


if __name__ == "__main__":
    main()
