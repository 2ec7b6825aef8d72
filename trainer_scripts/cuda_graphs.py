"""Training steps as CUDA graphs, for models so small that a GPU waits for Python to launch its kernels."""

from dataclasses import dataclass, field
from typing import Any

import torch
from arguments import UserError
from torch import nn
from training import RunTrainer
from transformers import TrainingArguments


# Eager steps before the capture: kernels are compiled, and workspaces allocated, in them.
WARMUP_STEPS = 3


@dataclass
class GraphArguments:
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Record forward and backward of a training step as a CUDA graph, and replay it for all batches of "
            "the same shape: faster for small models, in more memory."
        },
    )


def check_graph_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        UserError: if steps of this training cannot be recorded.
    """
    if args.device.type != "cuda":
        raise UserError(f"cuda_graphs needs a CUDA device; this run uses {args.device.type!r}")
    if args.n_gpu > 1 or args.world_size > 1:
        raise UserError("cuda_graphs is for one GPU and one process: set CUDA_VISIBLE_DEVICES to one GPU")
    impossible = {
        "gradient_accumulation_steps": args.gradient_accumulation_steps > 1,
        "gradient_checkpointing": args.gradient_checkpointing,
        "fp16": args.fp16,
        # Modes that record graphs of their own.
        "torch_compile_mode": args.torch_compile_mode not in (None, "default", "max-autotune-no-cudagraphs"),
    }
    if wrong := [name for name, is_set in impossible.items() if is_set]:
        raise UserError(f"cuda_graphs cannot record {wrong[0]}={getattr(args, wrong[0])}: leave it at its default")


class GraphTrainer(RunTrainer):
    """
    Trainer whose steps are recorded once and then replayed: everything from the inputs on the device to the gradients.
    Clipping, optimizer, schedule, logging and evaluation are those of Trainer. Batches of another shape than the first
    are trained on as always, and without the compilation that `torch_compile` asks for: it would take longer.

    The loss is compiled: a small model's step moves most of its bytes in the softmax over the vocabulary.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.loss_function = torch.compile(self.model.loss_function, dynamic=False)
        self.num_warm = 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_inputs: dict[str, torch.Tensor] | None = None

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        inputs = dict(self._prepare_inputs(inputs))
        given = dict(inputs)
        if num_items_in_batch is not None:
            given["num_items_in_batch"] = torch.as_tensor(num_items_in_batch, device=self.args.device)
        if self.static_inputs is None:
            self.static_inputs = {name: tensor.clone() for name, tensor in given.items()}
        static = self.static_inputs
        if {name: x.shape for name, x in given.items()} != {name: x.shape for name, x in static.items()}:
            return super().training_step(getattr(model, "_orig_mod", model), inputs, num_items_in_batch)
        for name, tensor in given.items():
            static[name].copy_(tensor)
        if self.num_warm < WARMUP_STEPS:
            self.num_warm += 1
            return self.eager_step(model)
        if self.graph is None:
            self.record(model)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss.clone()

    def static_step(self, model: nn.Module) -> torch.Tensor:
        inputs = dict(self.static_inputs)
        num_items_in_batch = inputs.pop("num_items_in_batch", None)
        return super().training_step(model, inputs, num_items_in_batch)

    def eager_step(self, model: nn.Module) -> torch.Tensor:
        """A step on the stream that is recorded later: what autograd remembers of streams must be that one."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.static_step(model)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def record(self, model: nn.Module) -> None:
        """Record a step, which computes nothing yet. Its gradients keep their memory, and are handed out anew."""
        self.graph = torch.cuda.CUDAGraph()
        model.zero_grad(set_to_none=True)
        try:
            # Other threads, such as those of a data loader, may go on.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.static_step(model)
        except RuntimeError as error:
            # Such as models of Transformers whose masks differ under recording: they would be compiled again in it.
            compiled = " with torch_compile: leave out one of both" if self.args.torch_compile else ""
            raise UserError(f"cuda_graphs cannot record {type(self.model).__name__}{compiled}: {error}") from error
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
