# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every flavour. Fixtures are factories, so that a test says what matters to it and nothing else."""

import pytest
import torch

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM


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
}


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
