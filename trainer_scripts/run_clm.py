"""Train and evaluate a causal language model of any architecture that Transformers or this package knows.

    python trainer_scripts/run_clm.py configuration/wikitext2/grassmann_6l_post.yaml --seed 1
    python trainer_scripts/run_clm.py --model_name_or_path runs/x --train_file a.txt --validation_file b.txt --do_eval

Works under `accelerate launch` and `torchrun` as well. All names of `TrainingArguments` are arguments.
"""

import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
import yaml
from arguments import UserError, closest, exits_on_user_error, local_copy, parse, resolve
from checkpoints import RunLog, checkpoints, is_complete, last_complete_checkpoint, write_atomically, write_json
from corpus import train_tokenizer
from huggingface_hub.errors import StrictDataclassError
from metrics import compute_perplexity, sum_negative_log_likelihood
from records import best_epoch, environment, mean_logged_loss
from safetensors import SafetensorError
from text_data import EMBEDDED_CORPUS, DataArguments, load_blocks, load_texts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import modeling_grassmann  # noqa: F401  (registers the Grassmann classes with the Auto classes)


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model to train or evaluate: a saved one, or a new one of a given configuration or type."""

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
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model on the Hub brings."})

    def __post_init__(self):
        if sum(name is not None for name in (self.model_name_or_path, self.config_name, self.model_type)) != 1:
            raise UserError("name the model with exactly one of model_name_or_path, config_name, model_type")
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = json.loads(self.config_overrides)
            except ValueError as error:
                raise UserError(f"config_overrides={self.config_overrides} is not JSON: {error}") from error
        if self.config_overrides is not None and not isinstance(self.config_overrides, dict):
            raise UserError(f"config_overrides={self.config_overrides} is not a mapping of names to values")
        if self.config_overrides and self.model_name_or_path:
            raise UserError("config_overrides are for new models; model_name_or_path names a saved one")


ARGUMENTS = (ModelArguments, DataArguments, TrainingArguments)


def find(argument: str, name: str) -> str:
    """The folder or Hub id `name`; a folder is also looked for in this repository, so that recipes work anywhere.

    Raises:
        UserError: if it can only be a folder, and there is none.
    """
    if os.path.exists(name):
        return name
    if (in_repository := Path(__file__).parents[1] / name).is_dir():
        return str(in_repository)
    first, *rest = name.split("/")
    if first in ("", ".", "..", "~") or len(rest) > 1 or os.path.isdir(first):
        raise UserError(f"{argument}={name}: there is no such folder")
    return name


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments, texts: datasets.DatasetDict
) -> PreTrainedTokenizerBase:
    """The named tokenizer, or one trained on the embedded corpus. It can pad, on the right.

    Raises:
        UserError: if no tokenizer is named and the data are not the embedded corpus, or if it cannot be loaded.
    """
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name is None:
        if data_args.dataset_name != EMBEDDED_CORPUS:
            raise UserError("tokenizer_name is missing: a new model needs a folder or Hub id of a tokenizer")
        return train_tokenizer(texts["train"]["text"], data_args.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local_copy(name) or find("tokenizer_name", name), trust_remote_code=model_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer {name}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer {name} has neither a pad nor an eos token to pad the last block with")
    # Causal models never look at what follows on the right, so this padding cannot change a prediction.
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Configuration of the saved model, or of a new one with the size and special tokens of the tokenizer.

    Raises:
        UserError: if it cannot be loaded, an override is unknown or impossible, or the vocabulary is too small.
    """
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
        allowed = {*config.to_dict(), *config.attribute_map} - {"model_type", "transformers_version", "architectures"}
        for key in given:
            if key not in allowed:
                raise UserError(f"config_overrides: {config.model_type} has no {key}: {closest(key, allowed)}")
        overrides = {"vocab_size": len(tokenizer)}
        overrides.update({name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})
        overrides.update({config.attribute_map.get(key, key): value for key, value in given.items()})
        try:
            # From what is given alone, as defaults may depend on it: the offsets on the number of layers.
            config = type(config).from_dict({**values, **overrides})
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(f"config_overrides {given} do not fit {config.model_type}: {error}") from error

    if config.get_text_config().vocab_size < len(tokenizer):
        raise UserError(
            f"the model's vocab_size={config.get_text_config().vocab_size} is smaller than the {len(tokenizer)} tokens"
            " of the tokenizer"
        )
    return config


def choose_block_size(args: DataArguments, config: PreTrainedConfig) -> int:
    """Tokens per block: `block_size`, or all positions of the model but at most 1024.

    Raises:
        UserError: if the model has fewer positions than `block_size`.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if args.block_size is None:
        return min(positions or 1024, 1024)
    if positions is not None and args.block_size > positions:
        raise UserError(f"block_size={args.block_size} exceeds the {positions} positions of the model")
    return args.block_size


def load_model(args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The saved model, or a new one with the current random seed.

    Raises:
        UserError: if it cannot be loaded or is not a causal language model.
    """
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.dtype:
        options["dtype"] = args.dtype
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    try:
        if args.model_name_or_path:
            name = find("model_name_or_path", args.model_name_or_path)
            return AutoModelForCausalLM.from_pretrained(name, config=config, **options)
        return AutoModelForCausalLM.from_config(config, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot build the model: {error}") from error


def check_causality(model: PreTrainedModel, length: int) -> None:
    """
    Args:
        length: tokens to try it with, at most as many as the model has positions.

    Raises:
        UserError: if the model's prediction of a token depends on that token or later ones, as an encoder's does: its
            perplexity would mean nothing.
    """
    model.eval()
    ids = torch.arange(length, device=model.device)[None]
    other = ids.clone()
    other[0, -1] += 1
    with torch.inference_mode():
        logits, changed = (model(input_ids=tokens).logits[0, :-1].float() for tokens in (ids, other))
    # Up to rounding: inputs of one shape take the same path.
    if (logits - changed).abs().max() > 1e-5 * logits.abs().max():
        raise UserError(f"{type(model).__name__} is not causal: its predictions depend on the tokens they predict")


def check_training_arguments(args: TrainingArguments) -> None:
    """
    Raises:
        UserError: if an argument is impossible that the Trainer itself would stumble on later.
    """
    folder = Path(args.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output_dir={args.output_dir} cannot be written: {folder} is not a folder, or not writable")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}={getattr(args, name)} must be at least 1")
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        raise UserError(f"num_train_epochs={args.num_train_epochs} must be more than 0")
    metric, allowed = args.metric_for_best_model, ("loss", "perplexity")
    if metric is not None:
        if metric.removeprefix("eval_") not in allowed:
            raise UserError(f"metric_for_best_model={metric} is not measured: choose one of {', '.join(allowed)}")
        # The Trainer takes any name but a loss for one of which more is better.
        args.greater_is_better = False
    if args.dataloader_drop_last or args.prediction_loss_only or args.batch_eval_metrics:
        raise UserError(
            "dataloader_drop_last, prediction_loss_only and batch_eval_metrics must be false: perplexity is measured"
            " over the whole evaluation split"
        )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Checkpoint folder to resume from: none, the one named, or for `true` the newest complete one, if any.

    Raises:
        UserError: if the named folder is not a complete checkpoint, or if a new run would mix its checkpoints with
            those of an earlier one.
    """
    found = checkpoints(args.output_dir)
    resume = str(args.resume_from_checkpoint or "false")
    if resume.lower() == "false":
        if found:
            raise UserError(
                f"output_dir={args.output_dir} holds checkpoints of an earlier run: continue it with"
                " resume_from_checkpoint=true, or choose another output_dir"
            )
        return None
    if resume.lower() != "true":
        if not is_complete(resume):
            raise UserError(
                f"resume_from_checkpoint={resume} is not a complete checkpoint: name a folder checkpoint-N, or true"
                " for the newest complete one in output_dir"
            )
        return resume
    last = last_complete_checkpoint(args.output_dir)
    if incomplete := found[: found.index(last)] if last else found:
        logger.warning("Ignoring incomplete checkpoints: %s", ", ".join(incomplete))
    if last:
        logger.info("Resuming from %s", last)
    else:
        logger.info("No complete checkpoint in %s: training starts from the beginning", args.output_dir)
    return last


def restore_finished(trainer: Trainer, checkpoint: str) -> bool:
    """
    If the checkpoint is that of the run's last step, give the trainer the state and the model with which the run
    ended; the Trainer itself would train for one more step. Returns whether it is.
    """
    args, state = trainer.args, TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    steps = args.max_steps
    if steps <= 0:
        per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    if state.global_step < steps:
        return False
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    saved = type(trainer.model).from_pretrained(best or checkpoint)
    trainer.model.load_state_dict(saved.state_dict())
    trainer.state = state
    logger.info("The run is complete: %d steps were trained before", state.global_step)
    return True


def setup_logging(args: TrainingArguments) -> None:
    """Log to stdout, so that stderr holds progress bars and errors only; processes other than the first warn only."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler(sys.stdout)],
        level=logging.INFO if args.should_log else logging.WARNING,
    )
    logging.captureWarnings(True)
    # Requests to the Hub are no news.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    logging.getLogger("datasets").handlers.clear()
    datasets.utils.logging.enable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    start = time.time()
    model_args, data_args, training_args = parse(ARGUMENTS, argv)
    splits = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    splits = [split for split, wanted in splits.items() if wanted]
    if not splits:
        raise UserError("nothing to do: pass at least one of do_train, do_eval, do_predict")
    check_training_arguments(training_args)
    setup_logging(training_args)
    output_dir = training_args.output_dir
    resumed = checkpoint_to_resume(training_args) if training_args.do_train else None
    if not training_args.do_train and os.path.exists(os.path.join(output_dir, "metrics.json")):
        raise UserError(f"output_dir={output_dir} holds the record of another run: choose another output_dir")

    with training_args.main_process_first(desc="data"):
        texts = load_texts(data_args)
        tokenizer = load_tokenizer(model_args, data_args, texts)
        config = load_config(model_args, tokenizer)
        block_size = choose_block_size(data_args, config)
        blocks = load_blocks(texts, splits, tokenizer, block_size, data_args)

    # Before the construction, so that the seed also decides the initial weights.
    set_seed(training_args.seed)
    model = load_model(model_args, config)
    check_causality(model, min(block_size, 8))
    use_cache = getattr(model.config, "use_cache", None)
    logger.info("%s with %.2fM parameters", type(model).__name__, model.num_parameters() / 1e6)
    logger.info("Blocks of %d tokens: %s", block_size, {split: len(rows) for split, rows in blocks.items()})

    try:
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=blocks.get("train"),
            eval_dataset=blocks.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            compute_metrics=compute_perplexity,
            preprocess_logits_for_metrics=sum_negative_log_likelihood,
            callbacks=[RunLog()],
        )
    except (ImportError, RuntimeError, ValueError) as error:
        # Such as a package that `report_to` or `optim` needs and that is not installed.
        raise UserError(f"cannot set up the training: {error}") from error
    if trainer.is_world_process_zero():
        recipe = yaml.safe_dump(resolve(ARGUMENTS, argv), sort_keys=False, allow_unicode=True)
        write_atomically(os.path.join(output_dir, "recipe.yaml"), recipe)

    results: dict[str, Any] = {}
    if training_args.do_train:
        finished = resumed is not None and restore_finished(trainer, resumed)
        metrics = {} if finished else trainer.train(resume_from_checkpoint=resumed).metrics
        if use_cache is not None:
            # The Trainer turns the decoding state off for the training.
            model.config.use_cache = use_cache
        trainer.save_model()
        trainer.save_state()
        if resumed:
            # The Trainer relates the losses and samples since the resume to steps and time of different runs.
            for name in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
                metrics.pop(name, None)
            if (loss := mean_logged_loss(trainer.state.log_history)) is not None:
                metrics["train_loss"] = loss
        results["best_epoch"] = best_epoch(trainer.state.log_history)
        results.update(report(trainer, "train", metrics))
    if training_args.do_eval:
        results.update(report(trainer, "eval", trainer.evaluate()))
    if training_args.do_predict:
        metrics = trainer.predict(blocks["test"], metric_key_prefix="test").metrics
        results.update(report(trainer, "test", metrics))

    if trainer.is_world_process_zero():
        results |= {"parameters": model.num_parameters(), "block_size": block_size, **environment(training_args)}
        results["wall_time_seconds"] = round(time.time() - start, 1)
        write_json(os.path.join(output_dir, "metrics.json"), results)


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print the metrics and add them to `all_results.json`."""
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


if __name__ == "__main__":
    main()
