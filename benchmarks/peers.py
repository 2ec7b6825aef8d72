"""The models that training and generation compare: a Grassmann model, a Llama of its size, and their arithmetic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM
from modeling_grassmann.grassmann_memory import KERNELS
from modeling_grassmann.plucker import num_plucker_coordinates


SIZES = {
    "13M": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024, "reduced_size": 32},
    "110M": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "reduced_size": 64},
    # For tests of the benchmarks themselves.
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "reduced_size": 4, "vocab_size": 100},
}
# Of the same widths, with memories.
MEMORY = {"mixer_types": "memory", "gated_mlp": True, "hidden_act": "silu", "norm_placement": "pre"}
HEADS = {"num_memory_heads": 3, "memory_value_size": 64}
SIZES |= {
    "13M-memory": {**SIZES["13M"], **MEMORY, "intermediate_size": 768, "memory_reduced_size": 8},
    "13M-memory-r10": {**SIZES["13M"], **MEMORY, "intermediate_size": 752, "memory_reduced_size": 10},
    "13M-memory-r16": {**SIZES["13M"], **MEMORY, "intermediate_size": 704, "memory_reduced_size": 16},
    "13M-memory-r8-3heads": {**SIZES["13M"], **MEMORY, **HEADS, "intermediate_size": 800, "memory_reduced_size": 8},
    "13M-memory-r10-3heads": {**SIZES["13M"], **MEMORY, **HEADS, "intermediate_size": 792, "memory_reduced_size": 10},
    "13M-memory-r12-3heads": {**SIZES["13M"], **MEMORY, **HEADS, "intermediate_size": 784, "memory_reduced_size": 12},
    "110M-memory": {
        **SIZES["110M"],
        **MEMORY,
        "intermediate_size": 2352,
        "memory_reduced_size": 8,
        "num_memory_heads": 12,
        "memory_value_size": 64,
    },
    "tiny-memory": {
        **SIZES["tiny"],
        **MEMORY,
        "memory_reduced_size": 4,
        "num_memory_heads": 2,
        "memory_value_size": 8,
    },
}
MODELS = ("grassmann", "llama")
# BERT's 30,522 filled up to a multiple of 64, as is usual: rows of logits of odd sizes keep matrix units waiting.
VOCAB_SIZE = 30528
HEAD_SIZE = 64

# Under torch.compile, Transformers hands SDPA a (B, 1, L, L) mask, which rules the flash kernels out: it cannot see
# that no sequences are packed. A name without a mask function leaves causality to SDPA's own flag.
AttentionInterface.register("sdpa_causal", sdpa_attention_forward)


def make_grassmann(size: str, **overrides: Any) -> GrassmannForCausalLM:
    """The default model of the package, of a size of `SIZES`, without positions and without dropout."""
    fields = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": None, "offsets": None}
    config = GrassmannConfig(**fields | SIZES[size] | {"hidden_dropout": 0.0, "embedding_dropout": 0.0} | overrides)
    torch.manual_seed(0)
    return GrassmannForCausalLM(config)


def make_llama(grassmann: PreTrainedModel, attention: str, max_length: int, **overrides: Any) -> LlamaForCausalLM:
    """
    A Llama with as many parameters as a Grassmann model, within 1%, of its width and depth and with its vocabulary.

    Args:
        attention (`str`): `"sdpa_causal"` for training, `"sdpa"` for generation.
        max_length (`int`): the longest sequence.
    """
    config = grassmann.config
    width = config.hidden_size
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": max(width // HEAD_SIZE, 1),
        "intermediate_size": matching_intermediate_size(grassmann),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": True,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields | overrides))


def matching_intermediate_size(grassmann: PreTrainedModel) -> int:
    """Size of Llama's SwiGLU at which both have as many parameters: a round one for its kernels, if within 1%."""
    config, target = grassmann.config, grassmann.num_parameters()
    width, layers = config.hidden_size, config.num_hidden_layers

    def count(intermediate_size: int) -> int:
        # Attention, SwiGLU and two norms a layer, then the last norm and the tied embedding.
        layer = 4 * width**2 + 3 * width * intermediate_size + 2 * width
        return layers * layer + width + config.vocab_size * width

    exact = (target - count(0)) / (layers * 3 * width)
    candidates = [max(round(exact / step), 1) * step for step in (64, 8, 1)]
    return next(size for size in candidates if size == candidates[-1] or abs(count(size) / target - 1) < 0.01)


def mixer_flops(width: int, reduced_size: int, num_heads: int = 1) -> int:
    """Necessary operations a token of a Plücker mixer's forward: reduction, projection of planes, gate."""
    planes = num_heads * num_plucker_coordinates(reduced_size)
    return 2 * (width * reduced_size * num_heads + planes * width + 2 * width**2)


def memory_flops(config: GrassmannConfig, length: int) -> int:
    """
    Necessary operations a token of a memory's forward over `length` tokens: projections, and the cheaper of two ways
    to read: four products of vectors and a sum of values for each pair of tokens, or a state, written and read.
    """
    heads, values = config.num_memory_heads, config.memory_value_size
    # A memory that has no size of its own takes that of the other mixer.
    size = config.memory_reduced_size or config.reduced_size
    kernel = KERNELS[config.memory_kernel]
    planes = heads * kernel.num_vectors * size
    projections = 2 * config.hidden_size * (2 * planes + 3 * heads * values + heads)
    by_pairs = length * (kernel.num_vectors**2 * size + values)
    by_state = 2 * 2 * kernel.num_features(size) * values
    return projections + heads * min(by_pairs, by_state)


def forward_flops(config: GrassmannConfig | LlamaConfig, length: int) -> int:
    """
    Necessary operations a token of a model's forward over `length` tokens, the vocabulary head included: two for each
    multiplication and addition of a matrix product, causal attention at half. A training step has three times that.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    if config.model_type == "grassmann":
        of_mixer = {
            "plucker": mixer_flops(width, config.reduced_size, config.num_plucker_heads),
            "memory": memory_flops(config, length),
        }
        network = 2 * (3 if config.gated_mlp else 2) * width * hidden
        layers = sum(of_mixer[mixer] + network for mixer in config.layer_mixers)
    else:
        # Queries with keys and weights with values, 2 * width * length each, of which half is masked.
        layers = config.num_hidden_layers * (2 * (4 * width**2 + 3 * width * hidden) + 2 * width * length)
    return layers + 2 * width * config.vocab_size


def ratio_rows(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Iterator[tuple[tuple, dict[str, dict]]]:
    """(values of `keys`, model -> its row) for each of their combinations, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), {})[row["model"]] = row
    yield from sorted(groups.items(), key=lambda group: group[0])


def is_measured(models: dict[str, dict], figure: str) -> bool:
    """Whether both models' rows hold a figure."""
    return all(models.get(name, {}).get(figure) is not None for name in MODELS)


@contextmanager
def compilation_facts(row: dict[str, Any]) -> Iterator[None]:
    """Record in a row what silently takes the speed of compilation away: graph breaks and skipped CUDA graphs."""
    counters.clear()
    yield
    row["graph_breaks"] = sum(counters["graph_break"].values())
    row["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]


def tensor_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def or_dash(cell: Callable[[dict], str], row: dict[str, Any] | None) -> str:
    """A cell of a table: a figure of a row, or a dash where there is none."""
    return "—" if row is None or "failed" in row else cell(row)
