"""Train and evaluate a classifier of sentence pairs: a pretrained encoder with a new head, or any classifier.

    python trainer_scripts/run_nli.py configuration/snli/distilbert_grassmann.yaml --seed 1
    python trainer_scripts/run_nli.py --model_name_or_path runs/x --test_file a.csv --do_predict --output_dir runs/y

Works under `accelerate launch` and `torchrun` as well. All names of `TrainingArguments` are arguments.
"""

import logging
import os
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from arguments import UserError, exits_on_user_error, parse
from checkpoints import RunLog
from entailment_pairs import build_tokenizer
from metrics import compute_classification, first_output
from models import (
    MODEL_ERRORS,
    ModelArguments,
    check_vocabulary,
    find,
    load_config,
    load_model,
    load_tokenizer,
)
from outcomes import write_outcomes, write_predictions
from pair_data import (
    EMBEDDED,
    PairArguments,
    check_max_length,
    load_pairs,
    tokenize_pairs,
    warn_without_separator,
)
from positions import usable_positions
from training import (
    RunTrainer,
    check_training_arguments,
    checkpoint_to_resume,
    finish,
    make_trainer,
    report,
    setup_logging,
    train,
    wanted_splits,
    write_recipe,
)
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from modeling_grassmann import GrassmannPluckerForSequenceClassification


logger = logging.getLogger(__name__)


@dataclass
class ClassifierArguments(ModelArguments):
    """Which classifier to train or evaluate: a saved one, a new one, or a new head on a pretrained encoder."""

    SOURCES: ClassVar[tuple[str, ...]] = (*ModelArguments.SOURCES, "backbone_name_or_path")
    REPLACES: ClassVar[dict[str, tuple[str, ...]]] = {
        "model_name_or_path": (
            *("config_name", "model_type", "backbone_name_or_path"),
            *("config_overrides", "tokenizer_name"),
        ),
        "config_name": ("model_name_or_path", "model_type", "backbone_name_or_path", "config_overrides"),
        "model_type": ("model_name_or_path", "config_name", "backbone_name_or_path", "config_overrides"),
        "backbone_name_or_path": ("model_name_or_path", "config_name", "model_type", "tokenizer_name"),
    }

    backbone_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Pretrained encoder that gets a new head: folder or id on the Hub. config_overrides then change"
            " GrassmannPluckerConfig."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_labels", "id2label", "label2id"):
            if name in (self.config_overrides or {}):
                raise UserError(f"config_overrides: {name} follows from the data: name their classes with class_names")
        if "problem_type" in (self.config_overrides or {}):
            raise UserError("config_overrides: problem_type cannot be chosen: each pair has one of the classes")
        if self.backbone_name_or_path and "backbone_config" in (self.config_overrides or {}):
            raise UserError(
                "config_overrides: backbone_config follows from backbone_name_or_path; for a new backbone, use"
                " model_type=grassmann_plucker instead"
            )

    @property
    def tokenizer(self) -> str | None:
        return super().tokenizer or self.backbone_name_or_path


@dataclass
class ClassifierTrainingArguments(TrainingArguments):
    """Arguments of the Trainer, and those that only a classifier has."""

    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of all but the backbone; learning_rate then is the backbone's."},
    )
    write_predictions: bool = field(
        default=False, metadata={"help": "Write predictions_<split>.jsonl, with the probabilities of each pair."}
    )


ARGUMENTS = (ClassifierArguments, PairArguments, ClassifierTrainingArguments)
# What is measured, and whether more of it is better.
METRICS = {"loss": False, "accuracy": True}
# What the Trainer calls the splits in the names of metrics.
PREFIXES = {"train": "train", "validation": "eval", "test": "test"}


class ClassifierTrainer(RunTrainer):
    """Trainer with a learning rate for the head."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.args.head_learning_rate is not None:
            backbone = {id(parameter) for parameter in self.model.backbone.parameters()}
            for group in list(optimizer.param_groups):
                head = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in backbone]
                # Schedulers scale the rate that each group has when they are made.
                optimizer.add_param_group({**group, "params": head, "lr": self.args.head_learning_rate})
        return optimizer

    def _get_learning_rate(self) -> float:
        # Both of the same step; when it is logged, the optimizer's groups already have the rates of the next one.
        self._last_head_learning_rate = self.optimizer.param_groups[-1]["lr"]
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.args.head_learning_rate is not None and "learning_rate" in logs:
            logs["head_learning_rate"] = self._last_head_learning_rate
        super().log(logs, start_time)


def check_arguments(args: ClassifierTrainingArguments) -> None:
    """
    Raises:
        UserError: if an argument is impossible.
    """
    check_training_arguments(args, METRICS)
    if args.head_learning_rate is not None and not args.head_learning_rate > 0:
        raise UserError(f"head_learning_rate={args.head_learning_rate} must be more than 0")
    if not args.remove_unused_columns:
        raise UserError("remove_unused_columns must be true: the data have columns that are not for the model")


def load_classifier(
    args: ClassifierArguments, tokenizer: PreTrainedTokenizerBase, label_names: list[str]
) -> PreTrainedModel:
    """The saved classifier, or a new one for the classes of the data with the current random seed.

    Raises:
        UserError: if it cannot be loaded or built, or if a saved one has other classes than the data or no head.
    """
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    if args.backbone_name_or_path:
        name = find("backbone_name_or_path", args.backbone_name_or_path)
        try:
            model = GrassmannPluckerForSequenceClassification.from_backbone(
                name, args.options, **(args.config_overrides or {}), **labels
            )
        except MODEL_ERRORS as error:
            raise UserError(f"cannot put a head on {args.backbone_name_or_path}: {error}") from error
        check_vocabulary(model.config, tokenizer)
        return model

    if not args.model_name_or_path:
        return load_model(args, AutoModelForSequenceClassification, load_config(args, tokenizer, **labels))

    config = load_config(args, tokenizer)
    if set(config.id2label.values()) != set(label_names):
        raise UserError(
            f"{args.model_name_or_path} has the classes {', '.join(config.id2label.values())}, but the data have"
            f" {', '.join(label_names)}: name those of the data with class_names or label_mapping"
        )
    model, loading = load_model(args, AutoModelForSequenceClassification, config, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(
            f"{args.model_name_or_path} is no saved classifier: it has no {min(loading['missing_keys'])}. To put a new"
            " head on a pretrained encoder, name it with backbone_name_or_path"
        )
    return model


def head_parameters(model: PreTrainedModel) -> int | None:
    """Number of parameters outside of the backbone; None for a model without one."""
    if not hasattr(model, "backbone"):
        return None
    return model.num_parameters() - sum(parameter.numel() for parameter in model.backbone.parameters())


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    start = time.time()
    model_args, data_args, training_args = parse(ARGUMENTS, argv)
    splits = wanted_splits(training_args)
    check_arguments(training_args)
    setup_logging(training_args)
    resumed = checkpoint_to_resume(training_args)

    with training_args.main_process_first(desc="data"):
        pairs = load_pairs(data_args, splits)
        tokenizer = load_tokenizer(model_args, build_tokenizer if data_args.dataset_name == EMBEDDED else None)
        warn_without_separator(tokenizer)
        # Before the construction, so that the seed also decides the initial weights.
        set_seed(training_args.seed)
        model = load_classifier(model_args, tokenizer, pairs.label_names)
        if training_args.head_learning_rate is not None and not hasattr(model, "backbone"):
            raise UserError(f"head_learning_rate is for a head on a backbone; {type(model).__name__} has no backbone")
        # Those of a saved model may have another order than those of the data.
        label_names = [model.config.id2label[i] for i in range(len(pairs.label_names))]
        positions = usable_positions(model)
        check_max_length(data_args, tokenizer, positions)
        rows = {split: tokenize_pairs(pairs, split, tokenizer, label_names, positions, data_args) for split in splits}

    use_cache = getattr(model.config, "use_cache", None)
    facts: dict[str, Any] = {
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "head_parameters": head_parameters(model),
        "max_length": data_args.max_length,
    }
    logger.info("%s with %.2fM parameters", type(model).__name__, model.num_parameters() / 1e6)
    logger.info("Classes: %s", ", ".join(label_names))
    for split in splits:
        prefix = PREFIXES[split]
        facts[f"{prefix}_rows"] = len(rows[split])
        facts[f"{prefix}_unlabelled"] = pairs.unlabelled[split]
        lengths = rows[split]["length"][:]
        facts[f"{prefix}_truncated"] = sum(length > (data_args.max_length or length) for length in lengths)
        message = "%s: %d pairs of at most %d tokens, of which %d were cut; %d rows without a label were left out"
        counts = (facts[f"{prefix}_{name}"] for name in ("truncated", "unlabelled"))
        logger.info(message, split, len(lengths), max(lengths), *counts)

    trainer = make_trainer(
        ClassifierTrainer,
        model=model,
        args=training_args,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=partial(compute_classification, label_names=label_names),
        preprocess_logits_for_metrics=first_output,
        callbacks=[RunLog()],
    )
    write_recipe(trainer, ARGUMENTS, argv)

    results: dict[str, Any] = {}
    if training_args.do_train:
        metric = (training_args.metric_for_best_model or "accuracy").removeprefix("eval_")
        results.update(train(trainer, resumed, use_cache, metric, METRICS[metric]))
    for split in splits:
        if split == "train":
            continue
        prefix = PREFIXES[split]
        output = trainer.predict(rows[split], metric_key_prefix=prefix)
        trainer.log(output.metrics)
        results.update(report(trainer, prefix, output.metrics))
        if trainer.is_world_process_zero():
            write_outcomes(training_args.output_dir, split, output, label_names)
            if training_args.write_predictions:
                path = os.path.join(training_args.output_dir, f"predictions_{split}.jsonl")
                write_predictions(path, pairs.splits[split], output, label_names)

    finish(trainer, {**results, **facts}, start)


if __name__ == "__main__":
    main()
