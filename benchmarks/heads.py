"""Examples per second of a text encoder with each classification head: Grassmann, Transformer and linear.

    python benchmarks/heads.py
    python benchmarks/heads.py --device cuda --backbone distilbert/distilbert-base-uncased --output heads.json

All heads run on the same inputs in one process and take turns, so that drift of the machine hits all. A training step
is forward, backward and an update by AdamW; inference is the forward without autograd. Weights are float32, and
bfloat16 is that of autocast. Unless a backbone is named, it is a DistilBERT of its default size with random weights:
the speed does not depend on their values.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from timing import TimingArguments, markdown, median_and_iqr, milliseconds, start_record, write_record
from transformers import AutoModel, DistilBertConfig, HfArgumentParser, PreTrainedModel

from modeling_grassmann import GrassmannPluckerForSequenceClassification


HEADS = ("grassmann", "transformer", "linear")
NUM_LABELS = 3


@dataclass
class HeadArguments(TimingArguments):
    """Backbone, shapes, device and number of repeats."""

    backbone: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the encoder; by default a DistilBERT with random weights."},
    )
    batch_size: int = field(default=64, metadata={"help": "Examples."})
    length: int = field(default=32, metadata={"help": "Tokens of the longest example; the shortest has half of them."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "Type of the arithmetic; auto is bfloat16 on a GPU, float32 on a CPU."}
    )

    POSITIVE = ("batch_size", "length", "repeats")

    def __post_init__(self):
        super().__post_init__()
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device == "cuda" else "float32"


def load_backbone(name: str | None) -> PreTrainedModel:
    torch.manual_seed(0)
    if name is None:
        return AutoModel.from_config(DistilBertConfig())
    return AutoModel.from_pretrained(name, dtype=torch.float32)


def make_inputs(backbone: PreTrainedModel, args: HeadArguments) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the right, whose lengths go evenly from half of the longest up to it.

    Raises:
        ValueError: if the backbone has fewer positions than the longest example.
    """
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if positions is not None and args.length > positions:
        raise ValueError(f"length must be at most {positions}, the positions of the backbone, got {args.length}")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.length, (args.length + 1) // 2, args.batch_size).round()
    inputs = {
        "input_ids": torch.randint(
            backbone.config.vocab_size, (args.batch_size, args.length), generator=generator
        ),  # (B, T)
        "attention_mask": (torch.arange(args.length) < lengths[:, None]).long(),  # (B, T)
        "labels": torch.randint(NUM_LABELS, (args.batch_size,), generator=generator),  # (B,)
    }
    return {name: values.to(args.device) for name, values in inputs.items()}


def make_model(
    backbone: PreTrainedModel, head: str, frozen: bool, device: str
) -> GrassmannPluckerForSequenceClassification:
    """A classifier on a copy of the backbone, which it then trains or not."""
    model = GrassmannPluckerForSequenceClassification.from_backbone(
        copy.deepcopy(backbone), head_type=head, freeze_backbone=frozen, num_labels=NUM_LABELS
    )
    return model.to(device)


def training(model: PreTrainedModel, inputs: dict[str, torch.Tensor], args: HeadArguments) -> Callable[[], Any]:
    """A training step of the parameters that are not frozen."""
    # The update's cost does not depend on its size, and a small one keeps random weights from diverging.
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-6)

    def step() -> torch.Tensor:
        model.train()
        with autocast(args):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def inference(model: PreTrainedModel, inputs: dict[str, torch.Tensor], args: HeadArguments) -> Callable[[], Any]:
    inputs = {name: values for name, values in inputs.items() if name != "labels"}

    def forward() -> torch.Tensor:
        model.eval()
        with torch.no_grad(), autocast(args):
            return model(**inputs).logits

    return forward


def autocast(args: HeadArguments) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")


def measure(passes: dict[str, dict[str, Callable]], args: HeadArguments) -> dict[str, dict[str, dict[str, float]]]:
    """Median and interquartile range of the time in ms, and examples per second, by pass and head."""
    for _ in range(args.warmup):
        for functions in passes.values():
            for function in functions.values():
                function()
    times = {name: {head: [] for head in functions} for name, functions in passes.items()}
    for repeat in range(args.repeats):
        for name, functions in passes.items():
            # Each head goes first in turn.
            first = repeat % len(HEADS)
            for head in HEADS[first:] + HEADS[:first]:
                times[name][head].append(milliseconds(functions[head], args.device))
    results = {
        name: {head: median_and_iqr(samples) for head, samples in heads.items()} for name, heads in times.items()
    }
    for heads in results.values():
        for row in heads.values():
            row["examples_per_second"] = args.batch_size * 1e3 / row["median_ms"]
    return results


def table(results: dict[str, dict[str, dict[str, float]]], parameters: dict[str, int]) -> str:
    """The results as a Markdown table; the last column compares with the Transformer head."""
    rows = [["pass", "head", "head parameters", "median ms", "IQR ms", "examples/s", "of transformer's"]]
    for name, heads in results.items():
        for head, row in heads.items():
            ratio = row["examples_per_second"] / heads["transformer"]["examples_per_second"]
            cells = [f"{row['median_ms']:.2f}", f"{row['iqr_ms']:.2f}", f"{row['examples_per_second']:.0f}"]
            rows.append([name, head, f"{parameters[head]:,}", *cells, f"{ratio:.2f}x"])
    return markdown(rows, left=2)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(HeadArguments, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        if args.threads:
            torch.set_num_threads(args.threads)
        backbone = load_backbone(args.backbone)
        inputs = make_inputs(backbone, args)
        frozen, tuned = (
            {head: make_model(backbone, head, freeze, args.device) for head in HEADS} for freeze in (True, False)
        )
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")

    counts = {head: model.num_parameters() - model.backbone.num_parameters() for head, model in tuned.items()}
    facts = {
        "transformers": transformers.__version__,
        # A folder is recorded by its name: where it lies says nothing.
        "backbone": Path(args.backbone).resolve().name if os.path.isdir(args.backbone or "") else args.backbone,
        "backbone_type": backbone.config.model_type,
        "backbone_parameters": next(iter(tuned.values())).backbone.num_parameters(),
        "attention": next(iter(tuned.values())).backbone.config._attn_implementation,
        # All that is not the backbone, the classifier included.
        "head_parameters": counts,
    }
    record = start_record(args, **facts)
    passes = {
        "training, frozen": {head: training(model, inputs, args) for head, model in frozen.items()},
        "training, fine-tuned": {head: training(model, inputs, args) for head, model in tuned.items()},
        "inference": {head: inference(model, inputs, args) for head, model in tuned.items()},
    }
    record["results"] = measure(passes, args)
    print("\n" + table(record["results"], counts))
    write_record(record, args.output, parser)


if __name__ == "__main__":
    main()
