# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every flavour. Fixtures are factories, so that a test says what matters to it and nothing else."""

import os

import pytest
import torch


# Triton decides when it is imported whether kernels run on a GPU or, slowly, in its interpreter on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoConfig, AutoModel

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM, GrassmannPluckerForSequenceClassification


try:
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:
    InterpretedFunction = None


def refuse_unknown_options(launch):
    """A launch in Triton's interpreter that refuses, as one on a GPU does, what the kernel has no argument for."""

    def run(kernel, *args, **kwargs):
        unknown = kwargs.keys() - {*kernel.arg_names, "num_warps", "num_stages", "maxnreg", "grid", "warmup"}
        if unknown:
            raise KeyError(f"{kernel.fn.__name__} has no arguments {sorted(unknown)}")
        return launch(kernel, *args, **kwargs)

    return run


if InterpretedFunction is not None:
    InterpretedFunction.run = refuse_unknown_options(InterpretedFunction.run)

# Threads cost tiny tensors more time than they save, and the tests themselves run in several processes.
torch.set_num_threads(1)

VOCAB_SIZE = 100
FLAVOURS = {
    "one_offset_per_layer": {},
    "flat_offsets": {"offsets": [1, 2, 5]},
    "heads": {
        "offsets": [[1, 2], [3], [2, 7]],
        "num_plucker_heads": 3,
        "learned_offset_weights": True,
        "separate_past_projection": True,
    },
    "pre_norm": {"norm_placement": "pre"},
    "no_positions": {"max_position_embeddings": None},
    "mixer_out_proj": {"mixer_out_proj": True, "tie_word_embeddings": False},
    "memory": {
        "mixer_types": "memory",
        "norm_placement": "pre",
        "num_memory_heads": 2,
        "memory_value_size": 5,
        "max_position_embeddings": None,
        "hidden_act": "silu",
        "gated_mlp": True,
    },
    "memory_and_offsets": {
        "mixer_types": ["plucker", "memory", "plucker"],
        "norm_placement": "pre",
        "memory_reduced_size": 5,
        "memory_kernel": "projection",
        "memory_conv_size": 1,
    },
}
BERT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GRASSMANN = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "reduced_size": 4,
    "offsets": [[1], [2]],
    "max_position_embeddings": 64,
    "hidden_dropout": 0.0,
    "embedding_dropout": 0.0,
}
# Text encoders that a classification head may stand on: model type and configuration.
BACKBONES = {
    "distilbert": (
        "distilbert",
        {
            "vocab_size": VOCAB_SIZE,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "bert": ("bert", BERT),
    "roberta": ("roberta", BERT | {"max_position_embeddings": 80}),
    "electra": ("electra", BERT | {"embedding_size": 12}),
    "albert": ("albert", BERT | {"embedding_size": 12}),
    # Calls its pooler without asking whether there is one.
    "squeezebert": ("squeezebert", BERT | {"embedding_size": 16}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "grassmann": ("grassmann", GRASSMANN | {"is_causal": False}),
    "grassmann_causal": ("grassmann", GRASSMANN),
}
HEADS = ("grassmann", "transformer", "linear")


@pytest.fixture(scope="session", params=FLAVOURS.values(), ids=FLAVOURS.keys())
def flavour(request):
    """Configuration overrides of each kind of model in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_config():
    def make(**overrides):
        fields = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "reduced_size": 6,
            "offsets": [[1], [2], [4]],
            "max_position_embeddings": 64,
            "hidden_dropout": 0.0,
            "embedding_dropout": 0.0,
        }
        return GrassmannConfig(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    def make(model_class=GrassmannForCausalLM, seed=0, **overrides):
        torch.manual_seed(seed)
        model = model_class(make_config(**overrides)).eval()
        # Fresh weights have zero biases and equal offset weights, and so cannot tell apart what depends on them.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def make_ids():
    def make(*shape, seed=1):
        """Token ids without the padding id, 0."""
        return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session", params=BACKBONES)
def backbone(request):
    """Name of each kind of backbone in turn."""
    return request.param


@pytest.fixture(scope="session", params=HEADS)
def head_type(request):
    """Each kind of classification head in turn."""
    return request.param


@pytest.fixture(scope="session")
def make_backbone():
    def make(name="distilbert", seed=0, **overrides):
        model_type, fields = BACKBONES[name]
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **(fields | overrides))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def make_classifier(make_backbone):
    def make(backbone="distilbert", seed=0, **overrides):
        """A tiny backbone with a head whose every weight matters."""
        fields = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "intermediate_size": 24,
            "reduced_size": 8,
            "hidden_dropout": 0.0,
            "num_labels": 3,
        }
        model = GrassmannPluckerForSequenceClassification.from_backbone(
            make_backbone(backbone, seed), **(fields | overrides)
        )
        with torch.no_grad():
            for parameter in [*model.head.parameters(), *model.classifier.parameters()]:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model

    return make
