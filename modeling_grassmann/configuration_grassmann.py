# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of Causal Grassmann models."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME


# The paper's six offsets; a model with N layers gives each of them to about N / 6 neighbouring layers.
PAPER_OFFSETS = (1, 2, 4, 8, 12, 16)
# Goes up with a change that older versions of this code would read as another model.
FORMAT_VERSION = 1
# Bounds that no model needs to exceed, and that a damaged file does: each layer is built one by one, and the decoding
# state holds as many vectors as the largest offset says.
MAX_LAYERS = 1024
MAX_OFFSET = 2**20
# Each label gets a name.
MAX_LABELS = 2**20
# What computes the mixers' features: `plucker.BACKENDS`, which this file does without, so that it needs no PyTorch.
BACKENDS = ("auto", "naive", "torch", "triton")
# What a layer mixes tokens with, and the name of what it keeps while decoding.
MIXERS = {"plucker": "plucker", "memory": "grassmann_memory"}
# `grassmann_memory.KERNELS`, with the vectors of a frame, which are the fewest dimensions for it.
MEMORY_KERNELS = {"binet_cauchy": 2, "projection": 2, "plucker": 2, "inner": 1, "inner_squared": 1}
# Ways to make one vector of a row's tokens.
POOLINGS = ("first", "last", "mean")


def check_format_version(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: if a newer version of this code wrote the configuration.
    """
    if not 1 <= config.format_version <= FORMAT_VERSION:
        raise ValueError(
            f"`format_version` is {config.format_version}, but this version of modeling_grassmann reads "
            f"{CONFIG_NAME} files up to format {FORMAT_VERSION}: the model was saved by a newer one. Update with "
            "`pip install --upgrade modeling-grassmann`."
        )


def check_label_count(fields: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if there are to be no labels, or more than anyone could have meant.
    """
    num_labels = fields.get("num_labels")
    if isinstance(num_labels, int) and not 1 <= num_labels <= MAX_LABELS:
        raise ValueError(f"`num_labels` must be from 1 to {MAX_LABELS}, got {num_labels}.")


@strict
class GrassmannConfig(PreTrainedConfig):
    r"""
    Configuration of a Causal Grassmann model (arXiv 2512.19428). The defaults are the paper's 6-layer model with the
    BERT vocabulary, read so that each layer looks at one offset: a layer that averages over all offsets cannot tell
    from which of them a past token came.

    Args:
        vocab_size (`int`, *optional*, defaults to 30522):
            Number of tokens in the vocabulary.
        hidden_size (`int`, *optional*, defaults to 256):
            Dimension `d` of the hidden states.
        num_hidden_layers (`int`, *optional*, defaults to 6):
            Number of blocks, at most 1024.
        intermediate_size (`int`, *optional*, defaults to 1024):
            Dimension of the feed-forward network.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward network.
        gated_mlp (`bool`, *optional*, defaults to `False`):
            Whether the feed-forward network has a gate, as SwiGLU does with `hidden_act="silu"`.
        reduced_size (`int`, *optional*, defaults to 32):
            Dimension `r`, at least 2, of the reduced vectors that span the planes.
        mixer_types (`str` or `list[str]`, *optional*, defaults to `"plucker"`):
            What each layer mixes tokens with, one name for all layers or one for each: `"plucker"`, the paper's mixer
            of a few offsets, or `"memory"`, a Grassmann memory of the whole past, which needs `norm_placement="pre"`.
        num_memory_heads (`int`, *optional*, defaults to 6):
            Heads of a memory, each with planes and values of its own.
        memory_reduced_size (`int`, *optional*):
            Dimension `r` in which a memory's planes are spanned, by default `reduced_size`. Its decoding state grows
            with r^4: 1.3 KiB a value for r = 8, 341 KiB for r = 32.
        memory_value_size (`int`, *optional*, defaults to 32):
            Size of the values of a memory's head.
        memory_kernel (`str`, *optional*, defaults to `"binet_cauchy"`):
            Similarity of planes: `"binet_cauchy"`, `"projection"` or `"plucker"`; `"inner"` and `"inner_squared"` take
            vectors in place of planes.
        memory_conv_size (`int`, *optional*, defaults to 4):
            Tokens, the present one included, over which a memory's keys are convolved; 1 for no convolution.
        offsets (`list[int]` or `list[list[int]]`, *optional*):
            Distances Δ, each from 1 to 2^20, at which tokens are paired. A flat list is given to every layer; a nested
            one holds one list per layer, of which a memory ignores its own. By default each layer has one offset,
            taken in order from 1, 2, 4, 8, 12, 16.
        norm_placement (`str`, *optional*, defaults to `"post"`):
            `"post"` (the paper): `x = Drop(LN(mix(h)))`, `out = LN(x + FFN(x))`.
            `"pre"`: `x = h + Drop(LN(mix(LN(h))))`, `out = x + FFN(LN(x))`.
        max_position_embeddings (`int`, *optional*, defaults to 256):
            Size of the learned position table; `None` for a model without positions.
        num_plucker_heads (`int`, *optional*, defaults to 1):
            Independent sets of planes per layer, each of size `reduced_size`.
        learned_offset_weights (`bool`, *optional*, defaults to `False`):
            Whether each head weighs its offsets by learned factors inside the average.
        separate_past_projection (`bool`, *optional*, defaults to `False`):
            Whether the past token of a pair is reduced by a projection of its own.
        mixer_out_proj (`bool`, *optional*, defaults to `False`):
            Whether the mixer applies a linear map between its gate and its LayerNorm.
        plucker_eps (`float`, *optional*, defaults to 1e-3):
            Sine of the angle up to which two vectors count as parallel and span no plane; 1e-6 suits float64.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorms.
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the mixer's output and inside the feed-forward network.
        embedding_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the embeddings.
        is_causal (`bool`, *optional*, defaults to `True`):
            `False` lets each offset look ahead as well, for encoders.
        classifier_pooling (`str`, *optional*):
            Which of a row's real tokens `GrassmannForSequenceClassification` classifies: `"last"`, the default of
            causal models, `"first"`, or the `"mean"` of all, the default with `is_causal=False`.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the language-model head shares the embedding matrix.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its decoding state.
        mixer_backend (`str`, *optional*, defaults to `"auto"`):
            What computes the mixers' features: `"triton"` (fused kernels for GPUs), `"torch"` (plain PyTorch),
            `"naive"` (the reference, slow), or `"auto"`: what the environment variable `GRASSMANN_BACKEND` names, or
            else the fastest that can serve. All give the same result up to rounding.
        pad_token_id (`int`, *optional*, defaults to 0):
            Id of the padding token; needed to classify batches.
        bos_token_id (`int`, *optional*):
            Id of the beginning-of-sequence token.
        eos_token_id (`int` or `list[int]`, *optional*):
            Id of the end-of-sequence token.
        format_version (`int`, *optional*, defaults to 1):
            Version of the file format; a newer one than this code knows is refused.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: for an impossible value; the message names the field.

    Example:

    ```python
    >>> from modeling_grassmann import GrassmannConfig, GrassmannModel

    >>> configuration = GrassmannConfig(num_hidden_layers=12)
    >>> configuration.layer_offsets
    [[1], [1], [2], [2], [4], [4], [8], [8], [12], [12], [16], [16]]
    >>> model = GrassmannModel(configuration)
    ```
    """

    model_type = "grassmann"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 30522
    hidden_size: int = 256
    num_hidden_layers: int = 6
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    reduced_size: int = 32
    mixer_types: str | list[str] = "plucker"
    num_memory_heads: int = 6
    memory_reduced_size: int | None = None
    memory_value_size: int = 32
    memory_kernel: str = "binet_cauchy"
    memory_conv_size: int = 4
    offsets: list[int] | list[list[int]] | None = None
    norm_placement: str = "post"
    max_position_embeddings: int | None = 256
    num_plucker_heads: int = 1
    learned_offset_weights: bool = False
    separate_past_projection: bool = False
    mixer_out_proj: bool = False
    plucker_eps: float = 1e-3
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.1
    embedding_dropout: float | int = 0.1
    is_causal: bool = True
    classifier_pooling: str | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    mixer_backend: str = "auto"
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        # Derived from other fields; a file may name them all the same.
        kwargs.pop("layer_types", None)
        check_label_count(kwargs)
        if self.offsets is None:
            layers = range(min(self.num_hidden_layers, MAX_LAYERS))
            self.offsets = [[PAPER_OFFSETS[i * len(PAPER_OFFSETS) // self.num_hidden_layers]] for i in layers]
        super().__post_init__(**kwargs)

    @property
    def layer_offsets(self) -> list[list[int]]:
        """Offsets of each layer."""
        if isinstance(self.offsets[0], list):
            return self.offsets
        return [self.offsets] * self.num_hidden_layers

    @property
    def layer_mixers(self) -> list[str]:
        """What each layer mixes tokens with."""
        if isinstance(self.mixer_types, list):
            return self.mixer_types
        # Asked for before the depth has been checked, too.
        return [self.mixer_types] * min(self.num_hidden_layers, MAX_LAYERS)

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps while decoding; Transformers' caches are built from it."""
        # Asked for before unknown names are refused, too, some of which Transformers would put others in place of.
        return [MIXERS.get(mixer, "plucker") for mixer in self.layer_mixers]

    def validate_layer_type(self):
        """`layer_types` follows from the other fields, and names a state that Transformers itself does not know."""

    def validate_format(self):
        check_format_version(self)

    def validate_architecture(self):
        sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_plucker_heads"]
        if self.max_position_embeddings is not None:
            sizes.append("max_position_embeddings")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {self.num_hidden_layers}.")
        if self.reduced_size < 2:
            raise ValueError(
                f"`reduced_size` must be at least 2, since a plane needs two dimensions, got {self.reduced_size}."
            )
        nested = bool(self.offsets) and isinstance(self.offsets[0], list)
        if nested and len(self.offsets) != self.num_hidden_layers:
            raise ValueError(
                f"`offsets` must hold one list per layer ({self.num_hidden_layers}, from `num_hidden_layers`), or be "
                f"one flat list for all of them, got {len(self.offsets)} lists: {self.offsets}."
            )
        for offsets in self.offsets if nested else [self.offsets]:
            if not offsets or min(offsets) < 1 or max(offsets) > MAX_OFFSET:
                raise ValueError(
                    f"`offsets` must be non-empty lists of integers from 1 to {MAX_OFFSET}, got {self.offsets}."
                )

    def validate_mixers(self):
        unknown = [mixer for mixer in self.layer_mixers if mixer not in MIXERS]
        if unknown:
            raise ValueError(f"`mixer_types` must be of {list(MIXERS)}, got {unknown[0]!r}.")
        if len(self.layer_mixers) != self.num_hidden_layers:
            raise ValueError(
                f"`mixer_types` must be one name, or hold one for each of the {self.num_hidden_layers} layers (from "
                f"`num_hidden_layers`), got {len(self.layer_mixers)}: {self.mixer_types}."
            )
        if self.memory_kernel not in MEMORY_KERNELS:
            raise ValueError(f"`memory_kernel` must be one of {list(MEMORY_KERNELS)}, got {self.memory_kernel!r}.")
        for name in ("num_memory_heads", "memory_value_size", "memory_conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        least = MEMORY_KERNELS[self.memory_kernel]
        if self.memory_reduced_size is not None and self.memory_reduced_size < least:
            raise ValueError(
                f"`memory_reduced_size` must be at least {least} for the kernel {self.memory_kernel!r}, got "
                f"{self.memory_reduced_size}."
            )
        if "memory" in self.layer_mixers and not self.is_causal:
            raise ValueError('`is_causal` must be True with "memory" in `mixer_types`: a memory is of the past.')
        if "memory" in self.layer_mixers and self.norm_placement != "pre":
            raise ValueError(
                '`norm_placement` must be "pre" with "memory" in `mixer_types`: a memory carries no token over by '
                f"itself, as the paper's gate does. Got {self.norm_placement!r}."
            )

    def validate_choices(self):
        if self.norm_placement not in ("post", "pre"):
            raise ValueError(f'`norm_placement` must be "post" or "pre", got {self.norm_placement!r}.')
        if self.classifier_pooling not in (None, *POOLINGS):
            raise ValueError(f"`classifier_pooling` must be one of {POOLINGS}, got {self.classifier_pooling!r}.")
        if self.mixer_backend not in BACKENDS:
            raise ValueError(f"`mixer_backend` must be one of {BACKENDS}, got {self.mixer_backend!r}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}.")

    def validate_ranges(self):
        for name in ("hidden_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 0 and less than 1, got {getattr(self, name)}.")
        if not 0 < self.plucker_eps < 1:
            raise ValueError(f"`plucker_eps` must be greater than 0 and less than 1, got {self.plucker_eps}.")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


__all__ = ["GrassmannConfig"]
