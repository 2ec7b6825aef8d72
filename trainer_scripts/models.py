"""Which model a training script works on: the arguments that name it, its tokenizer, configuration and weights."""

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from arguments import UserError, closest, local_copy
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import modeling_grassmann  # noqa: F401  (registers the Grassmann classes with the Auto classes)


# What building or loading a model raises because of what the user named.
MODEL_ERRORS = (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError)


@dataclass
class ModelArguments:
    """Which model to train or evaluate: a saved one, or a new one of a given configuration or type.

    Attributes:
        SOURCES: the arguments of which exactly one names the model.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("model_name_or_path", "config_name", "model_type")
    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        "model_name_or_path": ("config_name", "model_type", "config_overrides", "tokenizer_name"),
        "config_name": ("model_name_or_path", "model_type", "config_overrides"),
        "model_type": ("model_name_or_path", "config_name", "config_overrides"),
    }

    model_name_or_path: str | None = field(default=None, metadata={"help": "Saved model: folder or id on the Hub."})
    config_name: str | None = field(
        default=None, metadata={"help": "Configuration of a new model: id on the Hub, or folder with a config.json."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Type of a new model, such as grassmann or gpt2, with its default sizes."}
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "Changes to the configuration of a new model; JSON on the command line."}
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not that of the model."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Type of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention, such as sdpa or eager."})
    added_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Dropout, in training, for Llama and its like, which have none: of embeddings, of what each "
            "sublayer returns and inside of feed-forward networks, as in Grassmann models."
        },
    )
    import_packages: list[str] | None = field(
        default=None,
        metadata={"help": "Installed packages to import first, as they add models to the Auto classes, such as fla."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model on the Hub brings."})

    def __post_init__(self):
        if sum(getattr(self, name) is not None for name in self.SOURCES) != 1:
            raise UserError(f"name the model with exactly one of {', '.join(self.SOURCES)}")
        if not 0 <= self.added_dropout < 1:
            raise UserError(f"added_dropout={self.added_dropout} must be at least 0 and less than 1")
        self.config_overrides = mapping("config_overrides", self.config_overrides)
        if self.config_overrides and self.model_name_or_path:
            raise UserError("config_overrides are for new models; model_name_or_path names a saved one")

    @property
    def tokenizer(self) -> str | None:
        """Name of the tokenizer: the one that is given, or that of the saved model."""
        return self.tokenizer_name or self.model_name_or_path

    @property
    def options(self) -> dict[str, Any]:
        """Options of `from_pretrained` and `from_config` that are given."""
        given = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        return {"trust_remote_code": self.trust_remote_code, **{name: value for name, value in given.items() if value}}


def mapping(argument: str, value: dict | str | None) -> dict | None:
    """The mapping that an argument holds, as such or as JSON.

    Raises:
        UserError: if it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{argument}={value} is not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{argument}={value} is not a mapping of names to values")
    return value


def find_folder(name: str) -> str | None:
    """The folder of that name, here or in this repository; None if there is none."""
    if os.path.exists(name):
        return name
    in_repository = Path(__file__).parents[1] / name
    return str(in_repository) if in_repository.is_dir() else None


def find(argument: str, name: str) -> str:
    """The folder or Hub id `name`; a folder is also looked for in this repository, so that recipes work anywhere.

    Raises:
        UserError: if it can only be a folder, and there is none.
    """
    if (folder := find_folder(name)) is not None:
        return folder
    first, *rest = name.split("/")
    if first in ("", ".", "..", "~") or len(rest) > 1 or os.path.isdir(first):
        raise UserError(f"{argument}={name}: there is no such folder")
    return name


def load_tokenizer(
    args: ModelArguments, embedded: Callable[[], PreTrainedTokenizerBase] | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or else the one for the data that the script brings. It can pad, on the right.

    Args:
        args: the arguments that name the model and perhaps its tokenizer.
        embedded: makes the tokenizer for the data that the script brings; None if the data are others.

    Raises:
        UserError: if no tokenizer is named and there is none for the data, or if it cannot be loaded.
    """
    name = args.tokenizer
    if name is None:
        if embedded is None:
            raise UserError("tokenizer_name is missing: a new model needs a folder or Hub id of a tokenizer")
        return embedded()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(name) or find("tokenizer_name", name), trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {name}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer {name} has neither a pad nor an eos token to pad shorter rows with")
    # On the right it changes no prediction: causal models never look there, and positions count from the first token.
    tokenizer.padding_side = "right"
    return tokenizer


def import_all(packages: list[str] | None) -> None:
    """Import the packages that add models to the Auto classes.

    Raises:
        UserError: if one cannot be imported.
    """
    for package in packages or []:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"import_packages: cannot import {package}: {error}") from error


def load_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, **fields: Any) -> PreTrainedConfig:
    """Configuration of the saved model, or of a new one with the size and special tokens of the tokenizer.

    Args:
        args: the arguments that name the model.
        tokenizer: the model's tokenizer.
        fields: further fields of a new model, which follow from the data.

    Raises:
        UserError: if it or a package it needs cannot be loaded, an override is unknown or impossible, or the
            vocabulary is too small.
    """
    import_all(args.import_packages)
    try:
        if args.model_type:
            config, values = AutoConfig.for_model(args.model_type), {}
        else:
            argument = "config_name" if args.config_name else "model_name_or_path"
            name = find(argument, getattr(args, argument))
            config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
            values, _ = config.get_config_dict(name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot load the configuration: {error}") from error

    if not args.model_name_or_path:
        given = args.config_overrides or {}
        try:
            config = new_config(config, values, given, tokenizer, **fields)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(f"config_overrides {given} do not fit {config.model_type}: {error}") from error
    check_vocabulary(config, tokenizer)
    return config


def new_config(
    config: PreTrainedConfig,
    values: dict[str, Any],
    given: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    **fields: Any,
) -> PreTrainedConfig:
    """Configuration of a new model with the size and special tokens of the tokenizer.

    Args:
        config: a configuration of that kind.
        values: what its file says.
        given: config_overrides, which have the last word; those of a `backbone_config` may be of another `model_type`.
        tokenizer: the model's tokenizer.
        fields: fields that follow from the data.

    Raises:
        UserError: if an override is unknown.
    """
    check_fields(config, given)
    if (backbone := getattr(config, "backbone_config", None)) is not None:
        nested = dict(given.get("backbone_config") or {})
        nested_values = values.get("backbone_config") or {}
        model_type = nested.pop("model_type", backbone.model_type)
        if model_type != backbone.model_type:
            backbone, nested_values = AutoConfig.for_model(model_type), {}
        # The head has no vocabulary of its own.
        fields["backbone_config"] = new_config(backbone, nested_values, nested, tokenizer)
        overrides = {}
    else:
        overrides = {"vocab_size": len(tokenizer)}
        overrides.update({name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})
    overrides.update({config.attribute_map.get(key, key): value for key, value in given.items()})
    # From what is given alone, as defaults may depend on it: the offsets on the number of layers.
    return type(config).from_dict({**values, **overrides, **fields})


def check_fields(config: PreTrainedConfig, given: dict[str, Any]) -> None:
    """
    Raises:
        UserError: if a key of `given`, from config_overrides, is no field of that kind of configuration.
    """
    allowed = {*config.to_dict(), *config.attribute_map} - {"model_type", "transformers_version", "architectures"}
    for key in given:
        if key not in allowed:
            raise UserError(f"config_overrides: {config.model_type} has no {key}: {closest(key, allowed)}")


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        UserError: if the tokenizer has more tokens than the model.
    """
    vocab_size = getattr(text_config(config), "vocab_size", None)
    if vocab_size is not None and vocab_size < len(tokenizer):
        raise UserError(
            f"the model's vocab_size={vocab_size} is smaller than the {len(tokenizer)} tokens of the tokenizer"
        )


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that holds the vocabulary and the positions."""
    return (getattr(config, "backbone_config", None) or config).get_text_config()


def load_model(args: ModelArguments, auto_class: type, config: PreTrainedConfig, **options: Any) -> Any:
    """The saved model, or a new one with the current random seed.

    Args:
        args: the arguments that name the model.
        auto_class: the Auto class of the task.
        config: its configuration.
        options: further arguments of `from_pretrained`.

    Returns:
        what `from_config` or `from_pretrained` returns.

    Raises:
        UserError: if it cannot be loaded or is not a model for the task.
    """
    try:
        if not args.model_name_or_path:
            model = auto_class.from_config(config, **args.options)
        else:
            name = find("model_name_or_path", args.model_name_or_path)
            model = auto_class.from_pretrained(name, config=config, **args.options, **options)
    except MODEL_ERRORS as error:
        raise UserError(f"cannot build the model: {error}") from error
    if args.added_dropout:
        add_dropout(model, args.added_dropout)
    return model


def add_dropout(model: PreTrainedModel, p: float) -> None:
    """Add what [`ModelArguments.added_dropout`] says. Checkpoints stay those of the architecture.

    Args:
        model: a model of Llama's layout, or of its relatives without attention in flash-linear-attention.
        p: probability of a zero.

    Raises:
        UserError: if the model is not laid out like these, or has dropout of its own.
    """

    def drop(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], p, module.training), *output[1:])
        return nn.functional.dropout(output, p, module.training)

    def drop_input(module: nn.Module, args: tuple) -> torch.Tensor:
        return nn.functional.dropout(args[0], p, module.training)

    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise UserError(f"added_dropout={p}: {type(model).__name__} has dropout of its own, see its configuration")
    layers = getattr(model.base_model, "layers", [])
    sublayers = [
        module for layer in layers for name, module in layer.named_children() if name in ("self_attn", "attn", "mixer")
    ]
    networks = [layer.mlp for layer in layers if hasattr(layer, "mlp")]
    # A network that is one kernel would pass over the hook inside of it.
    if not sublayers or any(not hasattr(mlp, "down_proj") or getattr(mlp, "fuse_swiglu", False) for mlp in networks):
        raise UserError(f"added_dropout={p}: {type(model).__name__} is not laid out like Llama, or computes otherwise")
    for module in (model.get_input_embeddings(), *sublayers, *networks):
        module.register_forward_hook(drop)
    for mlp in networks:
        mlp.down_proj.register_forward_pre_hook(drop_input)
