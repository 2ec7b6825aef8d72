"""What the training scripts have in common around the Trainer: checks, resuming, and the records of a run."""

import copy
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml
from arguments import UserError, resolve
from checkpoints import (
    KeepBest,
    best_checkpoint,
    checkpoints,
    is_complete,
    is_of_fsdp,
    last_complete_checkpoint,
    write_atomically,
    write_json,
)
from curves import draw_training_curve
from hub import HUB_ERRORS, check_token, explain
from model_card import CURVE, load_record, read_mapping, write_card
from models import find_folder
from publish import make_folder, upload
from records import best_epoch, environment, mean_logged_loss
from run_records import load_run
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments

from modeling_grassmann.cache_grassmann import CACHE_NAMES


logger = logging.getLogger(__name__)

# What numbers may be, in words and as a test, and which arguments hold such.
NUMBERS: list[tuple[str, Callable[[float], bool], tuple[str, ...]]] = [
    (
        "at least 1",
        lambda number: number >= 1,
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("eval_accumulation_steps", "dataloader_prefetch_factor"),
        ),
    ),
    ("at least 0", lambda number: number >= 0, ("dataloader_num_workers",)),
    (
        "at least 0 and finite",
        lambda number: 0 <= number < math.inf,
        ("learning_rate", "weight_decay", "adam_epsilon", "neftune_noise_alpha"),
    ),
    ("at least 0 and less than 1", lambda number: 0 <= number < 1, ("adam_beta1", "adam_beta2")),
    ("from 0 to 2**32 - 1", lambda number: 0 <= number < 2**32, ("seed",)),
]


def wanted_splits(args: TrainingArguments) -> list[str]:
    """The splits that a run needs.

    Raises:
        UserError: if it needs none.
    """
    splits = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    splits = [split for split, wanted in splits.items() if wanted]
    if not splits:
        raise UserError("nothing to do: pass at least one of do_train, do_eval, do_predict")
    return splits


def check_training_arguments(args: TrainingArguments, metrics: dict[str, bool]) -> None:
    """
    Args:
        args: the arguments.
        metrics: what the script measures, and whether more of it is better.

    Raises:
        UserError: if an argument is impossible that the Trainer itself would stumble on later.
    """
    folder = Path(args.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output_dir={args.output_dir} cannot be written: {folder} is not a folder, or not writable")
    if args.push_to_hub:
        if not args.do_train:
            raise UserError(
                "push_to_hub needs do_train: an evaluation alone leaves no model to publish; publish.py publishes a"
                " saved one"
            )
        check_token(args.hub_token)
        if args.hub_token:
            # The Trainer would write it into training_args.bin, and publish that.
            os.environ["HF_TOKEN"], args.hub_token = args.hub_token, None
    for allowed, is_allowed, names in NUMBERS:
        for name in names:
            number = getattr(args, name)
            if number is not None and not is_allowed(number):
                raise UserError(f"{name}={number} must be {allowed}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise UserError(f"num_train_epochs={args.num_train_epochs} must be more than 0 and finite")
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise UserError("dataloader_persistent_workers needs a dataloader_num_workers of at least 1")
    metric = args.metric_for_best_model
    if metric is not None:
        if metric.removeprefix("eval_") not in metrics:
            raise UserError(
                f"metric_for_best_model={metric} cannot choose the best model; these can: {', '.join(metrics)}"
            )
        # The Trainer takes any name but a loss for one of which more is better.
        args.greater_is_better = metrics[metric.removeprefix("eval_")]
    in_parts = args.dataloader_drop_last or args.prediction_loss_only or args.batch_eval_metrics
    if in_parts or not args.eval_do_concat_batches:
        raise UserError(
            "dataloader_drop_last, prediction_loss_only and batch_eval_metrics must be false, and"
            " eval_do_concat_batches true: what is measured, is measured over the whole evaluation split"
        )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Checkpoint folder to resume from: none, the one named, or for `true` the newest complete one, if any.

    Raises:
        UserError: if the named folder is not a complete checkpoint, if a new run would mix its checkpoints with those
            of an earlier one, or if an evaluation alone would replace the record of another run.
    """
    found = checkpoints(args.output_dir)
    if not args.do_train:
        # A training that was interrupted has no metrics, and before its first checkpoint only its recipe. So has an
        # evaluation, which may be begun anew.
        trained = read_mapping(Path(args.output_dir) / "recipe.yaml").get("do_train")
        if found or trained or os.path.exists(os.path.join(args.output_dir, "metrics.json")):
            raise UserError(f"output_dir={args.output_dir} holds the record of another run: choose another output_dir")
        return None
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


class RunTrainer(Trainer):
    """Trainer that publishes the run's own model card, and whose predictions keep the order of the data."""

    def _get_eval_sampler(self, eval_dataset) -> None:
        # By default `group_by_length` also shuffles what is evaluated.
        return None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # A decoding state is no prediction, whether or not the configuration says so.
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [])
        return super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, *CACHE_NAMES])

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except HUB_ERRORS as error:
            raise explain(error, self.args.hub_model_id or self.args.output_dir) from error

    def create_model_card(self, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            write_card(folder, load_record(folder), repo_id=self.hub_model_id or folder.as_posix())


def restore_finished(trainer: Trainer, checkpoint: str) -> bool:
    """
    If the checkpoint is that of the run's last step, give the trainer the state and the model with which the run
    ended; the Trainer itself would train for one more step. Returns whether it is.

    Raises:
        UserError: if it is, under FSDP, which can evaluate only what it trained, or without its best checkpoint.
    """
    args, state = trainer.args, TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    steps = args.max_steps
    if steps <= 0:
        per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
        steps = math.ceil(args.num_train_epochs * per_epoch)
    if state.global_step < steps:
        return False
    if trainer.is_fsdp_enabled:
        raise UserError(f"the run is complete: {state.global_step} steps were trained; under FSDP it is not repeated")
    best = best_checkpoint(checkpoint)
    if args.load_best_model_at_end and state.best_model_checkpoint is not None and best is None:
        raise UserError(
            f"the best checkpoint of the run, {state.best_model_checkpoint}, is neither there nor beside {checkpoint}:"
            " put it back, or pass load_best_model_at_end=false for the model of the last step"
        )
    state.best_model_checkpoint = best
    saved = type(trainer.model).from_pretrained((args.load_best_model_at_end and best) or checkpoint)
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
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    logging.getLogger("datasets").handlers.clear()
    datasets.utils.logging.enable_propagation()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def place(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Move a model to where the Trainer will have it, as some models compute on a GPU alone."""
    # These place its shards themselves.
    if not (args.fsdp or args.deepspeed):
        model.to(args.device)


def make_trainer(trainer_class: type[Trainer], **options: Any) -> Trainer:
    """
    Raises:
        UserError: if the Trainer cannot be made, such as for want of a package that `report_to` or `optim` needs, or
            cannot do what is asked.
    """
    args, is_new = options["args"], not os.path.isdir(options["args"].output_dir)
    try:
        trainer = trainer_class(**options)
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot set up the training: {error}") from error
    try:
        if trainer.accelerator.is_fsdp2 and not args.do_train:
            raise UserError("FSDP2 needs do_train: evaluate a model with one process, or with DDP")
        # DeepSpeed has optimizers of its own.
        if args.do_train and not trainer.is_deepspeed_enabled:
            check_optimizer(trainer)
    except UserError:
        # The Trainer made it, and nothing in it.
        if is_new:
            with suppress(OSError):
                os.rmdir(args.output_dir)
        raise
    return trainer


def check_optimizer(trainer: Trainer) -> None:
    """
    Raises:
        UserError: if the optimizer or the schedule that the Trainer will make when it trains cannot be made.
    """
    args = trainer.args
    # For a copy without weights: some optimizers leave hooks on the parameters that they are made for.
    copies: dict[int, Any] = {id(x): x.to("meta") for x in trainer.model.buffers()}
    for x in trainer.model.parameters():
        copies[id(x)] = nn.Parameter(x.detach().to("meta"), x.requires_grad)
    model = copy.deepcopy(trainer.model, copies)
    of = f"optim={args.optim.value}"
    try:
        optimizer = trainer.create_optimizer(model)
        of = f"lr_scheduler_type={args.lr_scheduler_type.value}"
        if args.lr_scheduler_kwargs:
            of += f" with lr_scheduler_kwargs={args.lr_scheduler_kwargs}"
        trainer.create_scheduler(max(args.max_steps, 1), optimizer)
    except RuntimeError:
        # Perhaps for want of the weights: with them, the training will tell.
        logger.info("Whether %s can be set up shows when the training starts", of)
    except Exception as error:
        # Of all packages that make them, each has errors of its own.
        raise UserError(f"cannot set up {of}: {error}") from error
    finally:
        trainer.optimizer = trainer.lr_scheduler = None


def write_recipe(trainer: Trainer, argument_types: tuple[type, ...], argv: list[str] | None) -> None:
    """Write `recipe.yaml`: all that the command line and its recipe say."""
    if trainer.is_world_process_zero():
        recipe = yaml.safe_dump(resolve(argument_types, argv), sort_keys=False, allow_unicode=True)
        write_atomically(os.path.join(trainer.args.output_dir, "recipe.yaml"), recipe)


def train(
    trainer: Trainer, resumed: str | None, use_cache: bool | None, metric: str, greater_is_better: bool
) -> dict[str, Any]:
    """Train, from the beginning or from the checkpoint `resumed`, and save the model.

    Args:
        trainer: the trainer.
        resumed: folder of a checkpoint, or None.
        use_cache: the model's setting before the Trainer turned the decoding state off; None if it has none.
        metric: by which the best epoch is named.
        greater_is_better: whether more of it is better.

    Returns:
        the metrics of the training, and `best_epoch`.

    Raises:
        UserError: if the checkpoint is one of FSDP and this run is not, or the other way round.
    """
    if resumed and is_of_fsdp(resumed) != trainer.is_fsdp_enabled:
        other = "with" if is_of_fsdp(resumed) else "without"
        raise UserError(f"{resumed} was written {other} FSDP: resume it {other} FSDP")
    finished = resumed is not None and restore_finished(trainer, resumed)
    if resumed:
        trainer.add_callback(KeepBest(resumed))
    metrics = {} if finished else trainer.train(resume_from_checkpoint=resumed).metrics
    if use_cache is not None:
        trainer.model.config.use_cache = use_cache
    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded; the model itself is saved whole.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # Published is the whole run, when it has been evaluated.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if resumed:
        # The Trainer relates the losses and samples since the resume to steps and time of different runs.
        for name in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
            metrics.pop(name, None)
        if (loss := mean_logged_loss(trainer.state.log_history)) is not None:
            metrics["train_loss"] = loss
    best = best_epoch(trainer.state.log_history, metric, greater_is_better)
    return {"best_epoch": best, **report(trainer, "train", metrics)}


def report(trainer: Trainer, split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print the metrics and add them to `all_results.json`."""
    # Of a finished run that is resumed, nothing may be left to print.
    if metrics:
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    return metrics


def named_folders(recipe: dict[str, Any]) -> list[str]:
    """Keys of a recipe whose values could be names on the Hub, and are folders of this machine."""
    keys = ("dataset_name", "backbone_name_or_path", "model_name_or_path")
    return [key for key in keys if recipe.get(key) and find_folder(recipe[key]) is not None]


def finish(trainer: Trainer, results: dict[str, Any], start: float) -> None:
    """Write `metrics.json`; of a training, also draw it, write the model's card, and publish both if that is asked.

    Args:
        trainer: the trainer.
        results: what was measured.
        start: time at which the run began.

    Raises:
        UserError: if the Hub refuses.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        facts = {"folders": named_folders(read_mapping(folder / "recipe.yaml")), **environment(trainer.args)}
        facts["wall_time_seconds"] = round(time.time() - start, 1)
        write_json(folder / "metrics.json", {**results, **facts})
        if not trainer.args.do_train:
            # A card would describe, and load, a model that lies elsewhere.
            return
        try:
            draw_training_curve(load_run(folder, complete=False), folder / CURVE)
        except UserError as error:
            # The training is done; a picture must not cost it.
            logger.warning("No picture of the training: %s", error)
        try:
            trainer.create_model_card()
        except UserError as error:
            logger.warning("No model card: %s", error)
        if trainer.args.push_to_hub:
            # What the Trainer uploads in the background comes first.
            if trainer.push_in_progress is not None:
                trainer.push_in_progress.wait_until_done()
            try:
                published = make_folder(folder, trainer.hub_model_id)
                upload(published, trainer.hub_model_id, "End of training", revision=trainer.args.hub_revision)
            except UserError:
                logger.error("The run is complete in %s, but not published: publish.py does that alone", folder)
                raise
