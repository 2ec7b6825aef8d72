# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss of a language model without its logits: libraries fuse the output layer with the cross-entropy."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import is_liger_kernel_available


try:
    from torch.nn import LinearCrossEntropyOptions
except ImportError:  # PyTorch has them from 2.13 on.
    LinearCrossEntropyOptions = None

# Number of tokens whose logits exist at a time. GPUs are busy with that many; more gains nothing on a CPU.
GPU_CHUNK_SIZE = 4096
CPU_CHUNK_SIZE = 256


# Liger reads a count back from the device, which no graph can hold.
@torch.compiler.disable
def liger_loss(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int):
    """[`summed_loss`] by Liger's Triton kernels."""
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ImportError(
            "The fused loss needs liger-kernel on a GPU: `pip install liger-kernel`. Or leave `fused_loss` (of the "
            "model), `skip_logits` and `use_liger_kernel` (of Trainer) at False."
        ) from error
    if weight.requires_grad and torch.is_grad_enabled() and not hidden_states.requires_grad:
        # Liger computes no gradient at all if this one is not needed, not even the weight's.
        hidden_states = hidden_states.detach().requires_grad_()
    length, hidden_size = hidden_states.shape
    # Liger's measure of a chunk of logits is the memory of all hidden states.
    budget = max(1, GPU_CHUNK_SIZE * weight.shape[0] // max(1, length * hidden_size))
    return liger_fused_linear_cross_entropy(
        hidden_states,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction="sum",
        accum_dtype=torch.float32,
        chunk_mem_const=budget,
    )


def torch_loss(hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int):
    """[`summed_loss`] by PyTorch, in chunks."""
    if LinearCrossEntropyOptions is None:
        raise ImportError(
            f"The fused loss needs PyTorch 2.13 or later where there is no GPU, this is {torch.__version__}: "
            "`pip install -U torch`. Or leave `fused_loss` and `skip_logits` at False."
        )
    # The sum is returned in the type of the hidden states: bfloat16 would keep three digits of it.
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    options = LinearCrossEntropyOptions(batch_chunk_size=CPU_CHUNK_SIZE, allow_retain_graph=True)
    return F.linear_cross_entropy(
        hidden_states.to(dtype), weight.to(dtype), labels, ignore_index=ignore_index, reduction="sum", options=options
    )


def summed_loss(
    hidden_states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """
    Cross-entropy of `hidden_states @ weight.T`, summed over all labels but `ignore_index`, in float32 or better.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, d)`): of the tokens.
        weight (`torch.Tensor` of shape `(vocab_size, d)`): of the output layer.
        labels (`torch.LongTensor` of shape `(N,)`): the tokens that follow.
    """
    loss = liger_loss if hidden_states.is_cuda else torch_loss
    return loss(hidden_states, weight, labels, ignore_index)


def fused_causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Transformers' `ForCausalLMLoss` of `lm_head(hidden_states)`, without that tensor.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, d)`): of the tokens.
        lm_head (`nn.Linear`): the output layer, without bias.
        labels (`torch.LongTensor` of shape `(B, T)`, *optional*): token ids, `ignore_index` where there is no loss.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            What the sum is divided by; the number of labels that count by default.
        ignore_index (`int`, *optional*, defaults to -100): the label of what has no loss.
        shift_labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
            Labels that are shifted already, in place of `labels`.

    Raises:
        ImportError: if the library that computes it is not installed.
        ValueError: if the output layer is more than a matrix, such as an adapter on one.
    """
    if not isinstance(lm_head, nn.Linear) or not lm_head.weight.is_floating_point():
        raise ValueError(
            f"The fused loss reads the weights of `lm_head`, which must be a plain linear layer, got "
            f"{type(lm_head).__name__}. Set `fused_loss` of the model to False, or put no adapter on `lm_head`."
        )
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    weight = lm_head.weight
    shift_labels = shift_labels.flatten().to(weight.device)  # (B, T) -> (B * T,)
    hidden_states = hidden_states.flatten(0, -2).to(weight.device)  # (B, T, d) -> (B * T, d)
    loss = summed_loss(hidden_states, weight, shift_labels, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def apply_liger_kernel_to_grassmann(fused_linear_cross_entropy: bool = True, model: nn.Module | None = None) -> None:
    """What `use_liger_kernel=True` of Transformers' Trainer does to a model: it turns the fused loss on."""
    if hasattr(model, "fused_loss"):
        model.fused_loss = fused_linear_cross_entropy


def register_with_liger() -> None:
    """Name our models in Liger's table of the models it knows, where Trainer looks them up."""
    if not is_liger_kernel_available():
        return
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception:  # Liger is broken here, and says so itself to those who ask for it.
        return
    MODEL_TYPE_TO_APPLY_LIGER_FN.setdefault("grassmann", apply_liger_kernel_to_grassmann)
