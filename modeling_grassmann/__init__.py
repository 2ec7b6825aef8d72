# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Causal Grassmann models for Transformers. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .cache_grassmann import PluckerCacheLayer
from .configuration_grassmann import GrassmannConfig
from .configuration_grassmann_plucker import GrassmannPluckerConfig
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

# A checkpoint that was loaded before with `trust_remote_code=True` may have registered its own copy of a class.
AutoConfig.register("grassmann", GrassmannConfig, exist_ok=True)
AutoModel.register(GrassmannConfig, GrassmannModel, exist_ok=True)
AutoModelForCausalLM.register(GrassmannConfig, GrassmannForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(GrassmannConfig, GrassmannForSequenceClassification, exist_ok=True)

AutoConfig.register("grassmann_plucker", GrassmannPluckerConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    GrassmannPluckerConfig, GrassmannPluckerForSequenceClassification, exist_ok=True
)

__all__ = [
    "GrassmannConfig",
    "GrassmannForCausalLM",
    "GrassmannForSequenceClassification",
    "GrassmannModel",
    "GrassmannPluckerConfig",
    "GrassmannPluckerForSequenceClassification",
    "GrassmannPreTrainedModel",
    "PluckerCacheLayer",
    "PluckerMixer",
    "PluckerProjection",
    "PluckerWindowMixer",
    "plucker_features",
    "plucker_window_features",
    "wedge",
]
