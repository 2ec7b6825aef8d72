# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Causal Grassmann models for Transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_grassmann import MemoryCacheLayer, PluckerCacheLayer
from .configuration_grassmann import GrassmannConfig
from .configuration_grassmann_plucker import GrassmannPluckerConfig
from .memory_mixer import MemoryMixer
from .modeling_grassmann import (
    GrassmannForCausalLM,
    GrassmannForSequenceClassification,
    GrassmannModel,
    GrassmannPreTrainedModel,
)
from .modeling_grassmann_plucker import GrassmannPluckerForSequenceClassification
from .plucker import (
    PluckerMixer,
    PluckerProjection,
    PluckerWindowMixer,
    plucker_features,
    plucker_window_features,
    wedge,
)


__version__ = "0.1.0"

AutoConfig.register("grassmann", GrassmannConfig)
AutoModel.register(GrassmannConfig, GrassmannModel)
AutoModelForCausalLM.register(GrassmannConfig, GrassmannForCausalLM)
AutoModelForSequenceClassification.register(GrassmannConfig, GrassmannForSequenceClassification)

AutoConfig.register("grassmann_plucker", GrassmannPluckerConfig)
AutoModelForSequenceClassification.register(GrassmannPluckerConfig, GrassmannPluckerForSequenceClassification)

__all__ = [
    "GrassmannConfig",
    "GrassmannForCausalLM",
    "GrassmannForSequenceClassification",
    "GrassmannModel",
    "GrassmannPluckerConfig",
    "GrassmannPluckerForSequenceClassification",
    "GrassmannPreTrainedModel",
    "MemoryCacheLayer",
    "MemoryMixer",
    "PluckerCacheLayer",
    "PluckerMixer",
    "PluckerProjection",
    "PluckerWindowMixer",
    "plucker_features",
    "plucker_window_features",
    "wedge",
]
