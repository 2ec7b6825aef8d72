"""Train and evaluate a causal language model of any architecture that Transformers or this package knows.

    python trainer_scripts/run_clm.py configuration/wikitext2/grassmann_6l_post.yaml --seed 1
    python trainer_scripts/run_clm.py --model_name_or_path runs/x --train_file a.txt --validation_file b.txt --do_eval

Works under `accelerate launch` and `torchrun` as well. All names of `TrainingArguments` are arguments.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import torch
from arguments import UserError, exits_on_user_error, parse
from checkpoints import RunLog
from corpus import train_tokenizer
from cuda_graphs import GraphArguments, GraphTrainer, check_graph_arguments
from metrics import compute_perplexity, sum_negative_log_likelihood
from models import ModelArguments, load_config, load_model, load_tokenizer, text_config
from positions import usable_positions
from text_data import EMBEDDED_CORPUS, BlockCollator, DataArguments, load_blocks, load_texts
from training import (
    RunTrainer,
    check_training_arguments,
    checkpoint_to_resume,
    finish,
    make_trainer,
    place,
    report,
    setup_logging,
    train,
    wanted_splits,
    write_recipe,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


logger = logging.getLogger(__name__)

ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments, GraphArguments)
# What is measured, and whether more of it is better.
METRICS = {"loss": False, "perplexity": False}


def embedded_tokenizer(
    args: DataArguments, texts: datasets.DatasetDict
) -> Callable[[], PreTrainedTokenizerBase] | None:
    """Trains a tokenizer on the embedded corpus; None if the data are others."""
    if args.dataset_name != EMBEDDED_CORPUS:
        return None
    return partial(train_tokenizer, texts["train"]["text"], args.vocab_size)


def choose_block_size(args: DataArguments, model: PreTrainedModel) -> int:
    """Tokens per block: `block_size`, or all positions of the model but at most 1024.

    Raises:
        UserError: if the model has fewer positions than `block_size`.
    """
    positions = usable_positions(model)
    if args.block_size is None:
        return min(positions or 1024, 1024)
    if positions is not None and args.block_size > positions:
        raise UserError(f"block_size={args.block_size} exceeds the {positions} positions of the model")
    return args.block_size


def check_causality(model: PreTrainedModel, length: int) -> None:
    """
    Args:
        length: tokens to try it with, at most as many as the model has positions.

    Raises:
        UserError: if the model's prediction of a token depends on that token or later ones, as an encoder's does: its
            perplexity would mean nothing.
    """
    model.eval()
    vocab_size = text_config(model.config).vocab_size
    # A vocabulary may be smaller than the length.
    ids = torch.arange(length, device=model.device)[None] % vocab_size
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % vocab_size
    with torch.inference_mode():
        logits, changed = (model(input_ids=tokens).logits[0, :-1].float() for tokens in (ids, other))
    # Up to rounding: inputs of one shape take the same path.
    if (logits - changed).abs().max() > 1e-5 * logits.abs().max():
        raise UserError(f"{type(model).__name__} is not causal: its predictions depend on the tokens they predict")


def check_label_smoothing(model: PreTrainedModel, args: TrainingArguments) -> None:
    """
    Raises:
        UserError: if labels would be smoothed that the Trainer does not shift.
    """
    if args.label_smoothing_factor and type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise UserError(
            f"label_smoothing_factor={args.label_smoothing_factor} must be 0 for {type(model).__name__}: the Trainer"
            " does not know it as a causal language model, and would have each token predict itself"
        )


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    start = time.time()
    model_args, data_args, training_args, graph_args = parse(ARGUMENTS, argv)
    splits = wanted_splits(training_args)
    check_training_arguments(training_args, METRICS)
    if graph_args.cuda_graphs:
        check_graph_arguments(training_args)
    setup_logging(training_args)
    resumed = checkpoint_to_resume(training_args)

    with training_args.main_process_first(desc="data"):
        texts = load_texts(data_args)
        tokenizer = load_tokenizer(model_args, embedded_tokenizer(data_args, texts))
        config = load_config(model_args, tokenizer)

    # Before the construction, so that the seed also decides the initial weights.
    set_seed(training_args.seed)
    # By all processes at a time, among which weights may be spread.
    model = load_model(model_args, AutoModelForCausalLM, config)
    block_size = choose_block_size(data_args, model)
    with training_args.main_process_first(desc="blocks"):
        blocks = load_blocks(texts, splits, tokenizer, block_size, data_args)
    place(model, training_args)
    check_causality(model, min(block_size, 8))
    check_label_smoothing(model, training_args)
    use_cache = getattr(model.config, "use_cache", None)
    logger.info("%s with %.2fM parameters", type(model).__name__, model.num_parameters() / 1e6)
    logger.info("Blocks of %d tokens: %s", block_size, {split: len(rows) for split, rows in blocks.items()})

    trainer = make_trainer(
        GraphTrainer if graph_args.cuda_graphs else RunTrainer,
        model=model,
        args=training_args,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=BlockCollator(tokenizer),
        compute_metrics=compute_perplexity,
        preprocess_logits_for_metrics=sum_negative_log_likelihood,
        callbacks=[RunLog()],
    )
    write_recipe(trainer, ARGUMENTS, argv)

    results: dict[str, Any] = {}
    if training_args.do_train:
        results.update(train(trainer, resumed, use_cache, "perplexity", METRICS["perplexity"]))
    if training_args.do_eval:
        results.update(report(trainer, "eval", trainer.evaluate()))
    if training_args.do_predict:
        metrics = trainer.predict(blocks["test"], metric_key_prefix="test").metrics
        results.update(report(trainer, "test", metrics))

    finish(trainer, {**results, "parameters": model.num_parameters(), "block_size": block_size}, start)


if __name__ == "__main__":
    main()
