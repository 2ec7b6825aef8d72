"""Perplexity by position: how well saved models predict with few and with many tokens before.

    python trainer_scripts/evaluate_by_position.py --models runs/wikitext2/grassmann_6l_pre runs/wikitext2/gpt2_6l \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-v1 --unk_placeholder "<unk>" \
        --output_dir runs/length --bf16

writes `by_position.json`, and of it tables and a picture as `report_by_position.py` makes them, `by_position.md` and
`by_position.png`. The text is cut into blocks of several sizes, as `run_clm.py` does it for an evaluation. All names
of `TrainingArguments` are arguments.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import UserError, exits_on_user_error, parse
from checkpoints import write_json
from data_files import check_split
from metrics import Perplexity
from model_card import read_object
from models import ModelArguments, import_all, load_config, load_model, load_tokenizer
from positions import beyond_positions, mean_by_distance, position_limit
from records import environment
from report_by_position import write_report
from run_clm import METRICS, check_causality
from run_records import new_figure
from text_data import BlockCollator, DataArguments, cut_into_blocks, load_texts, tokenize
from torch.nn import functional as F
from training import check_training_arguments, make_trainer, place, setup_logging
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


logger = logging.getLogger(__name__)

NO_LABEL = -100
# Positions of a row whose logits are held in float32 at once.
CHUNK = 1024


@dataclass
class PositionArguments:
    """Which models to evaluate, and on what."""

    models: list[str] = field(metadata={"help": "Saved models: folders or ids on the Hub."})
    block_sizes: list[int] = field(
        default_factory=lambda: [256, 1024, 4096, 16384], metadata={"help": "Tokens per block, one or several."}
    )
    split: str = field(default="test", metadata={"help": "Split to evaluate.", "choices": ["validation", "test"]})
    tokens_per_batch: int = field(
        default=16384, metadata={"help": "Tokens that are read at once, in blocks that fit in, but at least in one."}
    )
    import_packages: list[str] | None = field(
        default=None,
        metadata={"help": "Installed packages to import first, as they add models to the Auto classes, such as fla."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model on the Hub brings."})

    def __post_init__(self):
        self.block_sizes = sorted(set(self.block_sizes))
        if min(self.block_sizes) < 2:
            raise UserError(f"block_sizes={self.block_sizes} must be at least 2")
        self.models = [os.path.normpath(name) for name in self.models]
        names = [self.name(model) for model in self.models]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UserError(f"models: two are named {repeated[0]}: rename one of the folders")

    @staticmethod
    def name(model: str) -> str:
        """A model is called by the name of its folder."""
        return os.path.basename(os.path.abspath(model))


ARGUMENTS = (PositionArguments, DataArguments, TrainingArguments)


def negative_log_likelihood(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` of the Trainer.

    Args:
        logits: (B, T, V), or a tuple that starts with them.
        labels: (B, T), not shifted; -100 marks positions that are not predicted.

    Returns:
        (B, T) float32: of each token its negative log-likelihood in nats, 0 where it is not predicted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    nll = torch.zeros(labels.shape, device=logits.device)
    for row, targets, losses in zip(logits, labels, nll):
        for start in range(0, len(targets) - 1, CHUNK):
            following = targets[start + 1 : start + 1 + CHUNK]  # (C,)
            predicted = row[start : start + len(following)].float()  # (C, V)
            losses[start + 1 : start + 1 + CHUNK] = F.cross_entropy(predicted, following, reduction="none")
    return nll


def summarise(prediction: EvalPrediction) -> dict[str, Any]:
    """Loss and perplexity of all predicted tokens, and mean loss by the number of tokens before in the block."""
    predicted = prediction.label_ids != NO_LABEL
    predicted[:, 0] = False
    nll, before = prediction.predictions[predicted].astype(np.float64), np.nonzero(predicted)[1]
    total = Perplexity().compute(predictions=nll.tolist(), references=[1] * len(nll))
    return {**total, "by_position": mean_by_distance(before, nll)}


def load_tokens(tokenizers: dict[str, PreTrainedTokenizerBase], args: DataArguments, split: str) -> np.ndarray:
    """The tokens of a split, which must be the same for all models.

    Raises:
        UserError: if the split is missing or empty, or models cut it into different tokens.
    """
    texts = load_texts(args)
    check_split(split, texts)
    tokens = None
    for name, tokenizer in tokenizers.items():
        own = tokenize(texts[split], tokenizer, args)
        if tokens is not None and not np.array_equal(own, tokens):
            raise UserError(
                f"models: {name} cuts the text into other tokens than {next(iter(tokenizers))}, so that their losses"
                " cannot be compared: evaluate them one by one"
            )
        tokens = own
    if len(tokens) < 2:
        raise UserError(f"the {split} data of {args.source(split)} hold {len(tokens)} tokens, fewer than 2")
    return tokens


def source_name(args: DataArguments, split: str) -> str:
    """What the data are called, without the folders that a file is in."""
    file = args.files[split] or args.train_file
    return os.path.basename(file) if file else " ".join(filter(None, [args.dataset_name, args.dataset_config_name]))


def training_facts(name: str) -> dict[str, Any]:
    """Seed and commit of the training, where the folder of the model is that of a run."""
    metrics = read_object(Path(name) / "metrics.json")
    return {key: metrics[key] for key in ("seed", "git_commit") if key in metrics}


def evaluate(
    name: str,
    tokens: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    args: PositionArguments,
    options: TrainingArguments,
) -> dict[str, Any]:
    """What is measured of one model.

    Args:
        name: folder or id on the Hub.
        tokens: (N,) the token ids of the text.
        tokenizer: the model's tokenizer.
        args: sizes of the blocks.
        options: arguments of the Trainer.

    Raises:
        UserError: if the model cannot be loaded or is not causal.
    """
    facts = {"name": args.name(name), "training": training_facts(name)}
    model_args = ModelArguments(model_name_or_path=name, trust_remote_code=args.trust_remote_code)
    model = load_model(model_args, AutoModelForCausalLM, load_config(model_args, tokenizer))
    # A state for further tokens would only take memory.
    model.config.use_cache = False
    limit = position_limit(model)
    place(model, options)
    check_causality(model, min(limit or 8, 8))
    blocks = []
    for block_size in args.block_sizes:
        if reason := beyond_positions(block_size, limit):
            logger.warning("%s in blocks of %d: %s", name, block_size, reason)
            blocks.append({"block_size": block_size, "refused": reason})
            continue
        options.per_device_eval_batch_size = max(1, args.tokens_per_batch // block_size)
        trainer = make_trainer(
            Trainer,
            model=model,
            args=options,
            data_collator=BlockCollator(tokenizer),
            preprocess_logits_for_metrics=negative_log_likelihood,
        )
        rows = cut_into_blocks(tokens, block_size, keep_last=True)
        block = {"block_size": block_size, **summarise(trainer.predict(rows))}
        logger.info("%s in blocks of %d: perplexity %.2f", name, block_size, block["perplexity"])
        blocks.append(block)
    return facts | {"parameters": model.num_parameters(), "position_limit": limit, "blocks": blocks}


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    args, data_args, training_args = parse(ARGUMENTS, argv)
    if data_args.block_size is not None:
        raise UserError("block_size is that of a training: name the sizes of blocks with block_sizes")
    if data_args.max_eval_samples is not None:
        raise UserError(
            "max_eval_samples counts blocks, which are of several sizes here: the whole split is evaluated"
        )
    if training_args.do_train or training_args.push_to_hub:
        raise UserError("do_train and push_to_hub mean nothing here: saved models are evaluated")
    check_training_arguments(training_args, METRICS)
    setup_logging(training_args)
    import_all(args.import_packages)
    # Rather now than after the evaluation.
    new_figure()
    path = Path(training_args.output_dir) / "by_position.json"
    if path.exists():
        raise UserError(f"output_dir={training_args.output_dir} holds an evaluation: choose another output_dir")

    with training_args.main_process_first(desc="data"):
        tokenizers = {
            name: load_tokenizer(
                ModelArguments(model_name_or_path=name, trust_remote_code=args.trust_remote_code), None
            )
            for name in args.models
        }
        tokens = load_tokens(tokenizers, data_args, args.split)
    record: dict[str, Any] = {
        "data": {
            "source": source_name(data_args, args.split),
            "split": args.split,
            "tokens": len(tokens),
        },
        "models": [evaluate(name, tokens, tokenizers[name], args, training_args) for name in args.models],
        **environment(training_args),
    }
    if training_args.should_save:
        write_json(path, record)
        write_report([record], path.with_suffix(""))


if __name__ == "__main__":
    main()
