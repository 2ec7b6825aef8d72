"""Convert a checkpoint of alphaXiv's reproduction of arXiv 2512.19428 into a folder that `from_pretrained` loads.

    python trainer_scripts/convert_alphaxiv.py best.pt runs/alphaxiv --tokenizer google-bert/bert-base-uncased

Which of its four models the file holds, and all sizes, follow from the names and shapes of the weights:

| model | becomes | not in the file |
| --- | --- | --- |
| Grassmann language model | `GrassmannForCausalLM` | `--offsets` |
| Transformer language model | `GPT2LMHeadModel` | `--num_heads` |
| SNLI, Grassmann head | a classifier with `head_type="pooled_gated"` | `--backbone_heads` |
| SNLI, Transformer head | a classifier with `head_type="pooled_transformer"` | `--num_heads`, `--backbone_heads` |

Logits are those of the reproduction up to rounding. Dropout, which acts in training alone, is 0.1 as published, though
not in all the same places: GPT-2 has none inside of its feed-forward networks, a pooled head has some more.

Source: https://github.com/alphaXiv/paper-implementations, folder attention_is_not_all_you_need.
"""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from arguments import UserError, exits_on_user_error
from models import MODEL_ERRORS, ModelArguments, check_vocabulary, load_tokenizer
from run_records import RecordsParser, positive
from transformers import DistilBertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling_grassmann import (
    GrassmannConfig,
    GrassmannForCausalLM,
    GrassmannPluckerConfig,
    GrassmannPluckerForSequenceClassification,
)
from modeling_grassmann.configuration_grassmann import PAPER_OFFSETS
from modeling_grassmann.plucker import num_plucker_coordinates


# What `torch.compile` puts before all names.
COMPILED = "_orig_mod."
LABELS = ("entailment", "neutral", "contradiction")
# What reading raises where a file is damaged or is no checkpoint, or would run code.
READING_ERRORS = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)
READING_ERRORS += (pickle.UnpicklingError,)

# Modules with a weight and a bias: theirs, and those of the class that they become.
GRASSMANN_BLOCK = {
    "ln1": "mixer_norm",
    "grassmann.W_red": "mixer.reduce",
    "grassmann.W_plu": "mixer.plucker_proj",
    "grassmann.W_gate": "mixer.gate_proj",
    "grassmann.layer_norm": "mixer.norm",
    "ln2": "mlp_norm",
    "ffn.0": "mlp.up_proj",
    "ffn.3": "mlp.down_proj",
}
# Queries, keys and values are packed in the same order.
TRANSFORMER_BLOCK = {
    "ln1": "ln_1",
    "qkv_proj": "attn.c_attn",
    "out_proj": "attn.c_proj",
    "ln2": "ln_2",
    "ffn.0": "mlp.c_fc",
    "ffn.3": "mlp.c_proj",
}
MIXING_LAYER = {
    "gate.0": "mixer.gate_proj",
    "ln1": "mixer.norm",
    "ln2": "mlp_norm",
    "ffn.0": "mlp.up_proj",
    "ffn.3": "mlp.down_proj",
}


class Checkpoint:
    """
    The weights of a checkpoint, by their names without the prefix of `torch.compile`.

    Args:
        path: a file of `torch.save`, with the weights under `model_state_dict`. Nothing but tensors, numbers and the
            like is unpickled.

    Raises:
        UserError: if it cannot be read or holds no weights.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise self.error("there is no such file")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except READING_ERRORS as error:
            raise self.error(
                f"cannot be read ({type(error).__name__}): it is damaged, or no checkpoint, or holds more than tensors"
                " and numbers"
            ) from error
        weights = stored.get("model_state_dict") if isinstance(stored, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise self.error("has no model_state_dict")
        self.weights: dict[str, torch.Tensor] = {}
        for key, weight in weights.items():
            name = str(key).removeprefix(COMPILED)
            if name in self.weights:
                raise self.error(f"holds {name} twice, with and without {COMPILED}")
            if not isinstance(weight, torch.Tensor):
                raise self.error(f"{name} is no tensor")
            self.weights[name] = weight

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem}")

    def shape(self, name: str, dimensions: int) -> torch.Size:
        """
        Shape of a weight that sizes are inferred from.

        Raises:
            UserError: if it is missing, or has another number of dimensions, or one of size 0.
        """
        self.check_names([name])
        shape = self.weights[name].shape
        if len(shape) != dimensions or 0 in shape:
            raise self.error(f"{name} has shape {tuple(shape)}, which must have {dimensions} dimensions")
        return shape

    def num_layers(self, prefix: str) -> int:
        """How many different layers `PREFIX.i` there are."""
        pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
        return len({match[1] for match in map(pattern.match, self.weights) if match})

    def check_names(self, names: list[str]) -> None:
        """
        Raises:
            UserError: if one of them is missing.
        """
        if missing := [name for name in names if name not in self.weights]:
            raise self.error(f"lacks {enumeration(missing)}")

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """
        Raises:
            UserError: if a weight has another shape than the others let expect.
        """
        shape = tuple(self.weights[name].shape)
        if shape != tuple(expected):
            raise self.error(f"{name} has shape {shape}, but by the other weights it must be {tuple(expected)}")


def enumeration(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parameters(modules: dict[str, str]) -> dict[str, str]:
    """Names of the weights and biases of modules."""
    return {f"{old}.{kind}": f"{new}.{kind}" for old, new in modules.items() for kind in ("weight", "bias")}


def layers(prefix: str, new_prefix: str, modules: dict[str, str], num_layers: int) -> dict[str, str]:
    """[`parameters`] of the same modules in each layer."""
    return parameters(
        {f"{prefix}.{i}.{old}": f"{new_prefix}.{i}.{new}" for i in range(num_layers) for old, new in modules.items()}
    )


def pairs(encoders: list[str], reduced_size: int) -> dict[str, torch.Tensor]:
    """
    What the reproduction stores of the Plücker coordinates `z_i y_j - z_j y_i`: the enumeration of all i < j, which is
    that of this package too. It knows no other: with one, `W_plu` would be somebody else's.
    """
    i, j = torch.triu_indices(reduced_size, reduced_size, offset=1)
    return {f"{encoder}.{name}": index for encoder in encoders for name, index in (("idx_i", i), ("idx_j", j))}


def load(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    names: dict[str, str],
    indices: dict[str, torch.Tensor] | None = None,
    without_effect: dict[str, tuple[int, ...]] | None = None,
) -> PreTrainedModel:
    """
    Put the weights of a checkpoint into a model.

    Args:
        checkpoint: the checkpoint.
        model: a model with the sizes of the checkpoint.
        names: of each weight in the checkpoint the name in the model.
        indices: what the checkpoint must hold besides: [`pairs`].
        without_effect: shapes of other weights that have no place in the model.

    Returns:
        the model, in evaluation mode.

    Raises:
        UserError: if a weight is missing, left over, of another shape or not of floating-point numbers, or an
            index is another one.
    """
    weights, indices, without_effect = checkpoint.weights, indices or {}, without_effect or {}
    known = names | indices | without_effect
    checkpoint.check_names(list(known))
    if extra := [name for name in weights if name not in known]:
        raise checkpoint.error(f"holds {enumeration(extra)}, which a {type(model).__name__} has no place for")
    for name, shape in without_effect.items():
        checkpoint.check_shape(name, shape)
    for name, index in indices.items():
        checkpoint.check_shape(name, index.shape)
        if (weights[name] != index).any():
            raise checkpoint.error(f"{name} is not the enumeration of i < j that the reproduction stores")

    expected, state = model.state_dict(), {}
    for name, new_name in names.items():
        # Transformers' GPT-2 multiplies by its matrices from the other side.
        is_transposed = isinstance(model.get_submodule(new_name.rpartition(".")[0]), Conv1D)
        is_transposed = is_transposed and new_name.endswith(".weight")
        shape = expected[new_name].shape
        checkpoint.check_shape(name, shape[::-1] if is_transposed else shape)
        if not weights[name].is_floating_point():
            raise checkpoint.error(f"{name} holds {weights[name].dtype}, not floating-point numbers")
        state[new_name] = weights[name].t() if is_transposed else weights[name]
    model.load_state_dict(state)
    return model.eval()


def language_model_sizes(checkpoint: Checkpoint) -> tuple[dict[str, int], dict[str, str]]:
    """What both language models have in common: sizes, as [`GrassmannConfig`] calls them, and the output layer.

    Raises:
        UserError: if a weight is missing, or if the output layer is not the embedding.
    """
    vocab_size, hidden_size = checkpoint.shape("token_embedding.weight", 2)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": checkpoint.num_layers("blocks"),
        "intermediate_size": checkpoint.shape("blocks.0.ffn.0.weight", 2)[0],
        "max_position_embeddings": checkpoint.shape("position_embedding.weight", 2)[0],
    }
    checkpoint.check_names(["lm_head.weight"])
    checkpoint.check_shape("lm_head.weight", (vocab_size, hidden_size))
    if not torch.equal(checkpoint.weights["lm_head.weight"], checkpoint.weights["token_embedding.weight"]):
        raise checkpoint.error("lm_head.weight differs from token_embedding.weight, which it must be a copy of")
    return sizes, {"lm_head.weight": "lm_head.weight"}


def convert_grassmann_lm(checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict) -> PreTrainedModel:
    """
    The language model with a mixer of all offsets in each layer.

    The reproduction clamps norms of planes at 1e-8, and so scales all planes of pairs that are not parallel to the
    bit. `plucker_eps=1e-6` comes closest in float32, where smaller angles are rounding. With it gradients may become
    as large as they are there: to train the model further, load it with the default 1e-3.
    """
    sizes, names = language_model_sizes(checkpoint)
    reduced_size = checkpoint.shape("blocks.0.grassmann.W_red.weight", 2)[0]
    config = GrassmannConfig(
        **sizes,
        **special_tokens,
        reduced_size=reduced_size,
        # With 12 layers the reproduction lists each twice, which leaves the average as it is.
        offsets=list(args.offsets or PAPER_OFFSETS),
        norm_placement="pre",
        plucker_eps=1e-6,
    )
    num_layers = config.num_hidden_layers
    names |= {
        "token_embedding.weight": "model.embed_tokens.weight",
        "position_embedding.weight": "model.embed_positions.weight",
    }
    names |= parameters({"ln_f": "model.norm"}) | layers("blocks", "model.layers", GRASSMANN_BLOCK, num_layers)
    encoders = [f"blocks.{i}.grassmann.plucker" for i in range(num_layers)]
    return load(checkpoint, GrassmannForCausalLM(config), names, pairs(encoders, reduced_size))


def convert_transformer_lm(checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict) -> PreTrainedModel:
    """The Transformer that the language model is compared with: GPT-2 with the exact GELU."""
    sizes, names = language_model_sizes(checkpoint)
    config = GPT2Config(
        n_inner=sizes.pop("intermediate_size"),
        **sizes,
        **special_tokens,
        num_attention_heads=args.num_heads or 4,
        activation_function="gelu",
        attn_pdrop=0.0,
    )
    names |= {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
    }
    names |= parameters({"ln_f": "transformer.ln_f"})
    names |= layers("blocks", "transformer.h", TRANSFORMER_BLOCK, config.num_hidden_layers)
    return load(checkpoint, GPT2LMHeadModel(config), names)


def make_classifier(
    checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict, **head: Any
) -> tuple[PreTrainedModel, dict[str, str]]:
    """
    A new classifier with the sizes of the checkpoint.

    Args:
        head: fields of the head.

    Returns:
        the model, and names of all weights but those of the head's layers.
    """
    vocab_size, dim = checkpoint.shape("backbone.embeddings.word_embeddings.weight", 2)
    # Of the special tokens DistilBERT knows that of padding alone.
    backbone_config = DistilBertConfig(
        vocab_size=vocab_size,
        dim=dim,
        max_position_embeddings=checkpoint.shape("backbone.embeddings.position_embeddings.weight", 2)[0],
        n_layers=checkpoint.num_layers("backbone.transformer.layer"),
        n_heads=args.backbone_heads or 12,
        hidden_dim=checkpoint.shape("backbone.transformer.layer.0.ffn.lin1.weight", 2)[0],
        pad_token_id=special_tokens["pad_token_id"],
    )
    config = GrassmannPluckerConfig(
        backbone_config=backbone_config,
        hidden_size=checkpoint.shape("head.input_projection.weight", 2)[0],
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        **head,
    )
    model = GrassmannPluckerForSequenceClassification(config)
    names = {name: name for name in model.state_dict() if name.startswith("backbone.")}
    return model, names | parameters({"head.input_projection": "head.projection", "head.classifier": "classifier"})


def convert_grassmann_classifier(
    checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict
) -> PreTrainedModel:
    """
    The classifier with mixing layers on the mean of a pair's tokens. They take the plane of each vector with itself,
    whose coordinates are exact zeros, so that of the projection of the planes nothing but its bias has an effect.
    """
    prefix = "head.mixing_layers"
    reduced_size = checkpoint.shape(f"{prefix}.0.to_reduced.weight", 2)[0]
    model, names = make_classifier(
        checkpoint,
        args,
        special_tokens,
        head_type="pooled_gated",
        num_hidden_layers=checkpoint.num_layers(prefix),
        intermediate_size=checkpoint.shape(f"{prefix}.0.ffn.0.weight", 2)[0],
    )
    hidden_size, num_layers = model.config.hidden_size, model.config.num_hidden_layers
    names |= layers(prefix, "head.layers", MIXING_LAYER, num_layers)
    without_effect = {}
    for i in range(num_layers):
        names[f"{prefix}.{i}.from_plucker.bias"] = f"head.layers.{i}.mixer.feature"
        without_effect[f"{prefix}.{i}.to_reduced.weight"] = (reduced_size, hidden_size)
        without_effect[f"{prefix}.{i}.to_reduced.bias"] = (reduced_size,)
        without_effect[f"{prefix}.{i}.from_plucker.weight"] = (hidden_size, num_plucker_coordinates(reduced_size))
    count = sum(torch.Size(shape).numel() for shape in without_effect.values())
    encoders = [f"{prefix}.{i}.plucker_encoder" for i in range(num_layers)]
    load(checkpoint, model, names, pairs(encoders, reduced_size), without_effect)
    print(
        "warning: the head sees no Grassmann feature: it makes planes of one vector z with itself, and z ∧ z is zero. "
        f"The converted model computes the same without the {count:,} parameters of to_reduced and from_plucker.weight"
    )
    return model


def convert_transformer_classifier(
    checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict
) -> PreTrainedModel:
    """The classifier with a `torch.nn.TransformerEncoder` on the mean of a pair's tokens, a sequence of length 1."""
    prefix = "head.transformer1.layers"
    model, names = make_classifier(
        checkpoint,
        args,
        special_tokens,
        head_type="pooled_transformer",
        num_hidden_layers=checkpoint.num_layers(prefix),
        num_heads=args.num_heads or 4,
        intermediate_size=checkpoint.shape(f"{prefix}.0.linear1.weight", 2)[0],
        hidden_act="relu",
    )
    own = [name for name in model.state_dict() if name.startswith("head.layers.")]
    names |= {name.replace("head.layers", prefix): name for name in own}
    return load(checkpoint, model, names)


# By a part of names that no other of the models has: the model, its converter, and the options that it takes.
MODELS = {
    ".grassmann.": ("Grassmann language model", convert_grassmann_lm, {"offsets"}),
    ".qkv_proj.": ("Transformer language model", convert_transformer_lm, {"num_heads"}),
    "head.mixing_layers.": ("classifier with a Grassmann head", convert_grassmann_classifier, {"backbone_heads"}),
    "head.transformer1.": (
        "classifier with a Transformer head",
        convert_transformer_classifier,
        {"num_heads", "backbone_heads"},
    ),
}
OPTIONS = ("offsets", "num_heads", "backbone_heads")


def convert(checkpoint: Checkpoint, args: argparse.Namespace, special_tokens: dict) -> PreTrainedModel:
    """
    The model that a checkpoint holds.

    Args:
        checkpoint: the checkpoint.
        args: the options that [`OPTIONS`] names; None for the published value.
        special_tokens: `pad_token_id`, `bos_token_id` and `eos_token_id` of the tokenizer.

    Returns:
        the model, in evaluation mode.

    Raises:
        UserError: if it holds none of the four models, a weight is not what it must be, or an option does not apply.
    """
    part = next((part for part in MODELS if any(part in name for name in checkpoint.weights)), None)
    if part is None:
        raise checkpoint.error(f"is none of the reproduction's models: no name of a weight has {' or '.join(MODELS)}")
    model, converter, options = MODELS[part]
    for option in OPTIONS:
        if getattr(args, option) is not None and option not in options:
            raise checkpoint.error(f"--{option} is not for this model, a {model}")
    try:
        return converter(checkpoint, args, special_tokens)
    except MODEL_ERRORS as error:
        raise checkpoint.error(f"its sizes, with the options, make no model: {error}") from error


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = RecordsParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="File of the reproduction, such as best.pt.")
    parser.add_argument("output_dir", type=Path, help="Folder to write, which must be empty or not exist.")
    parser.add_argument("--tokenizer", help="Folder or Hub id of the tokenizer to save beside the model.")
    parser.add_argument(
        "--offsets", type=positive, nargs="+", help="Offsets of a Grassmann language model (1 2 4 8 12 16)."
    )
    parser.add_argument("--num_heads", type=positive, help="Attention heads of a Transformer (4).")
    parser.add_argument("--backbone_heads", type=positive, help="Attention heads of the DistilBERT backbone (12).")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    output_dir = args.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} is there already: name a new or an empty folder")

    # Those of the published tokenizer, bert-base-uncased.
    special_tokens, tokenizer = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}, None
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(ModelArguments(model_type="grassmann", tokenizer_name=args.tokenizer), None)
        special_tokens = {name: getattr(tokenizer, name) for name in special_tokens}
    model = convert(Checkpoint(args.checkpoint), args, special_tokens)
    try:
        if tokenizer is not None:
            check_vocabulary(model.config, tokenizer)
            tokenizer.save_pretrained(output_dir)
        model.save_pretrained(output_dir)
    except OSError as error:
        raise UserError(f"cannot write {output_dir}: {error}") from error
    print(f"{output_dir}: {type(model).__name__} with {model.num_parameters():,} parameters")
    for path in sorted(output_dir.iterdir()):
        print(f"  {path.stat().st_size:>14,}  {path.name}")


if __name__ == "__main__":
    main()
