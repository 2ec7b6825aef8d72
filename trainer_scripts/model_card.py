"""Write the model cards of runs, from nothing but the files that the runs left behind.

    python trainer_scripts/model_card.py model_cards/wikitext2_* [--baseline model_cards/wikitext2_gpt2_6l]

writes `README.md` into each folder. The baseline is another run, or what `baseline.json` in the run's folder holds, or
the run that `baselines.yaml` beside the folder names. `publish.py` writes the card of a model that goes to the Hub.
"""

import fnmatch
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import yaml
from arguments import UserError, exits_on_user_error
from checkpoints import write_atomically
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from models import MODEL_ERRORS, find_folder, text_config
from positions import position_limit
from run_records import MISSING, PREFIXES, RecordsParser, Run, load_run, parse_json, read, table_head
from transformers import AutoConfig, AutoModel, PreTrainedConfig


REPOSITORY = Path(__file__).parents[1]
TEMPLATE = REPOSITORY / "model_cards" / "template.md"
CURVE = "training_curve.png"
PICTURES = {
    CURVE: "Training loss and validation metrics by epoch",
    "confusion_matrix_validation.png": "Confusion matrix of the validation split",
    "confusion_matrix_test.png": "Confusion matrix of the test split",
}
# Fields of a configuration that say what a model is, as far as it has them.
ARCHITECTURE = (
    *("model_type", "head_type", "freeze_backbone", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "num_heads", "num_plucker_heads", "reduced_size", "offsets", "norm_placement"),
    *("mixer_out_proj", "separate_past_projection", "learned_offset_weights", "is_causal"),
    *("window_size", "window_stride", "pair_sharing", "use_plucker_features", "pooling", "classifier_pooling"),
    *("max_position_embeddings", "vocab_size"),
)
# And those of models with memories.
MEMORY = (
    *("mixer_types", "num_memory_heads", "memory_reduced_size", "memory_value_size", "memory_kernel"),
    *("memory_conv_size", "gated_mlp"),
)
# By what each kernel weighs; the others are kernels of planes.
KERNELS = {"inner": "the inner product of vectors", "inner_squared": "the squared inner product of vectors"}
# What only layers of the paper's mixer have.
PLUCKER = {
    *("num_plucker_heads", "reduced_size", "offsets"),
    *("mixer_out_proj", "separate_past_projection", "learned_offset_weights"),
}
# Facts of `metrics.json` about the training, as far as it has them, and how a card shows them.
FACTS = {
    "seed": ("random seed", str),
    "parameters": ("parameters", "{:,}".format),
    "trainable_parameters": ("trained parameters", "{:,}".format),
    "head_parameters": ("parameters of the head", "{:,}".format),
    "block_size": ("tokens in a block", "{:,}".format),
    "max_length": ("tokens of a text, at most", "{:,}".format),
    "train_rows": ("training rows", "{:,}".format),
    "train_unlabelled": ("training rows left out, without a label", "{:,}".format),
    "eval_rows": ("validation rows", "{:,}".format),
    "eval_tokens": ("validation tokens", "{:,}".format),
    "test_rows": ("test rows", "{:,}".format),
    "test_tokens": ("test tokens", "{:,}".format),
    "epoch": ("epochs", "{:g}".format),
    "best_epoch": ("epoch of the weights, the best by validation", "{:g}".format),
    "train_runtime": ("training time (s)", "{:.0f}".format),
    "train_samples_per_second": ("training rows per second", "{:.1f}".format),
    "device": ("hardware", str),
    "git_commit": ("commit of the code", str),
}
TASKS = {
    "text-generation": "Language modelling",
    "text-classification": "Text classification",
    "feature-extraction": "Feature extraction",
}
# And those of `run_recall.py`, whose sequences are generated.
GENERATED = {"recall": "Recall of values by their keys", "copying": "Copying of a segment"}


@dataclass
class Record:
    """What is known about a run.

    Attributes:
        run: its metrics and log, empty where it left none.
        recipe: content of `recipe.yaml`, empty where there is none.
        saved_config: content of `config.json`, empty where there is none.
        baseline: name and metrics of what it is compared with, None if there is nothing.
    """

    run: Run
    recipe: dict[str, Any]
    saved_config: dict[str, Any]
    baseline: tuple[str, dict[str, Any]] | None

    @property
    def task(self) -> str:
        """The Hub's name for what the model does."""
        names = str(self.saved_config.get("architectures"))
        generated = self.recipe.get("task") in GENERATED
        if generated or "block_size" in self.run.metrics or "CausalLM" in names or "LMHead" in names:
            return "text-generation"
        if "max_length" in self.run.metrics or "SequenceClassification" in names:
            return "text-classification"
        return "feature-extraction"

    @property
    def task_name(self) -> str:
        return GENERATED.get(self.recipe.get("task"), TASKS[self.task])

    def hub_id(self, key: str) -> str | None:
        """The data set or model that the recipe names under `key`, if it is one of the Hub's."""
        name, folders = self.recipe.get(key), self.run.metrics.get("folders")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        # A run records which names were folders. Older ones did not, and took data sets alone from the Hub.
        is_folder = key in folders if isinstance(folders, list) else key != "dataset_name"
        return None if is_folder else name

    @property
    def start(self) -> str | None:
        """The model that the training started from, if any."""
        return self.recipe.get("backbone_name_or_path") or self.recipe.get("model_name_or_path")

    @cached_property
    def config(self) -> PreTrainedConfig | None:
        """Configuration of the model, from its file or else from the recipe; None if neither tells it."""
        fields = dict(self.saved_config)
        if not fields:
            given = self.recipe.get("config_overrides")
            fields = dict(given) if isinstance(given, dict) else {}
            if name := self.recipe.get("config_name"):
                fields = {**read_object(Path(find_folder(name) or name) / "config.json"), **fields}
            elif self.recipe.get("backbone_name_or_path"):
                fields["model_type"] = "grassmann_plucker"
            else:
                fields["model_type"] = self.recipe.get("model_type")
        model_type = fields.pop("model_type", None)
        if self.recipe.get("import_packages") and not str(model_type).startswith("grassmann"):
            # A type of another package: what its file says, whether or not the package is there.
            config = PreTrainedConfig(**fields)
            config.model_type = model_type
            return config
        try:
            return AutoConfig.for_model(model_type, **fields)
        except (AttributeError, TypeError, ValueError, StrictDataclassError):
            # Remote code, or a type that this version of Transformers does not know.
            return None


def load_record(folder: Path, baseline: Path | None = None) -> Record:
    """Read what a run left.

    Args:
        folder: of the run; files that are missing count as empty.
        baseline: folder of the run that it is compared with.

    Raises:
        UserError: if a file is not what it should be, or the baseline is no run.
    """
    run = load_run(folder, complete=False)
    recipe = read_mapping(run.folder / "recipe.yaml")
    return Record(run, recipe, read_object(run.folder / "config.json"), find_baseline(run, baseline))


def read_mapping(path: Path) -> dict[str, Any]:
    """Content of a YAML file, empty if there is none.

    Raises:
        UserError: if it is not a mapping.
    """
    try:
        content = yaml.safe_load(read(path)) if path.is_file() else None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{path} must be a mapping `name: value`")
    return content or {}


def read_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file, empty if there is none."""
    return parse_json(read(path), str(path)) if path.is_file() else {}


def find_baseline(run: Run, folder: Path | None) -> tuple[str, dict[str, Any]] | None:
    """Name and metrics of what a run is compared with: the run in `folder`, what its own `baseline.json` holds, or the
    run that the first fitting line of `baselines.yaml` beside it names.

    Raises:
        UserError: if the run that is named is none.
    """
    own, named = run.folder / "baseline.json", run.folder.parent / "baselines.yaml"
    if folder is None and own.is_file():
        metrics = read_object(own)
        return str(metrics.pop("name", "baseline")), metrics
    if folder is None and named.is_file():
        for pattern, name in read_mapping(named).items():
            if fnmatch.fnmatchcase(run.name, str(pattern)):
                folder = run.folder.parent / str(name).replace("{seed}", str(run.metrics.get("seed")))
                break
        # The run may come first.
        folder = folder if folder and (folder / "metrics.json").is_file() else None
    if folder is None:
        return None
    other = load_run(folder)
    return None if other.folder == run.folder else (other.name, other.metrics)


def measured(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """Losses, perplexities and accuracies of a split, under their names without its prefix."""
    kinds = ("loss", "perplexity", "accuracy")
    prefix += "_"
    values = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {key: value for key, value in values.items() if key.startswith(kinds) and isinstance(value, (int, float))}


def shown(metric: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if metric.startswith("accuracy"):
        return f"{100 * value:.2f}%"
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.4f}"


def metric_name(metric: str) -> str:
    kind, _, part = metric.partition("_")
    part = re.sub(r"(\d+)_pairs_(\d+)_tokens", r"\1 pairs in \2 tokens", part)
    return f"{kind} on {part}" if part else kind


def evaluation_table(record: Record) -> str:
    """Markdown table of every metric of the run, beside the baseline's."""
    columns = {(split, ""): measured(record.run.metrics, prefix) for split, prefix in PREFIXES.items()}
    columns = {key: values for key, values in columns.items() if values}
    if not columns:
        return "The model has not been evaluated: the files of its run hold no metric."
    note = "No baseline was recorded for this run."
    if record.baseline:
        name, metrics = record.baseline
        columns |= {(split, name): measured(metrics, PREFIXES[split]) for split, _ in list(columns)}
        note = f"`{name}` is the baseline."
    metrics = sorted({metric for (_, name), values in columns.items() if not name for metric in values})
    header = ["metric", *(f"{split}, `{name}`" if name else split for split, name in columns)]
    lines = table_head(header)
    for metric in metrics:
        name = escaped(metric_name(metric))
        lines.append(f"| {' | '.join([name, *(shown(metric, values.get(metric)) for values in columns.values())])} |")
    if "perplexity" in metrics:
        note += " Perplexity is `exp(summed negative log-likelihood / predicted tokens)` over the whole split."
    return "\n".join([*lines, "", note])


def escaped(text: str) -> str:
    """Text in which Markdown finds nothing to interpret, for the cell of a table."""
    return re.sub(r"([|*_<>`\\])", r"\\\1", " ".join(text.split()))


def eval_results(record: Record) -> list[EvalResult]:
    """The metrics as the Hub reads them. Infinite and undefined ones, which it refuses, are left out."""
    generated = record.recipe.get("task") in GENERATED
    dataset = str(record.recipe.get("dataset_name") or ("generated sequences" if generated else "local files"))
    results = []
    for split, prefix in PREFIXES.items():
        for metric, value in measured(record.run.metrics, prefix).items():
            if math.isfinite(value):
                result = EvalResult(
                    task_type=record.task,
                    task_name=record.task_name,
                    dataset_type=dataset,
                    dataset_name=dataset,
                    dataset_config=record.recipe.get("dataset_config_name"),
                    dataset_split=split,
                    metric_type=metric.partition("_")[0],
                    metric_name=metric_name(metric),
                    metric_value=value,
                )
                results.append(result)
    return results


def summary(record: Record) -> str:
    config = record.config
    size = record.run.number("parameters")
    size = f" with {size / 1e6:.2f} million parameters" if size else ""
    task = record.task_name.lower()
    if config is None:
        return f"A model for {task}{size}."
    if config.model_type == "grassmann":
        kind = "Causal" if config.is_causal else "bidirectional"
        mixed = f"no attention; {mixing(config)}, at a cost linear in length"
        return f"A {kind} Grassmann model for {task}{size}: {mixed}."
    if config.model_type == "grassmann_plucker":
        grassmann = config.head_type == "grassmann"
        head = "Grassmann-Plücker head (arXiv 2512.19428)" if grassmann else f"{config.head_type} head"
        return f"A classifier of texts{size}: an encoder with a {head}."
    return f"A `{config.model_type}` model for {task}{size}."


def mixing(config: PreTrainedConfig) -> str:
    """How the layers of a Grassmann model mix tokens."""
    weight = KERNELS.get(config.memory_kernel, "the similarity of planes on a Grassmann manifold")
    mixers = {
        "plucker": "pairs of tokens are encoded as planes on a Grassmann manifold through Plücker coordinates"
        " (arXiv 2512.19428)",
        "memory": "memories weigh what a token and all before it wrote by"
        f" {weight} (the kernel `{config.memory_kernel}`)",
    }
    return " in some layers, and in others ".join(mixers[name] for name in mixers if name in config.layer_mixers)


def training(record: Record) -> str:
    """Data, facts and versions of the training."""
    recipe, metrics = without_folders(record.recipe), record.run.metrics
    if not recipe and not metrics:
        return "Nothing was recorded about the training."
    sources = [f"`{recipe['dataset_name']}`"] if recipe.get("dataset_name") else []
    sources += [f"configuration `{recipe['dataset_config_name']}`"] if recipe.get("dataset_config_name") else []
    sources += [
        f"`{os.path.basename(str(recipe[key]))}`" for key in sorted(recipe) if key.endswith("_file") and recipe[key]
    ]
    if recipe.get("task") in GENERATED:
        sources = [f"sequences generated by `recall_data.py`, seed {recipe.get('generator_seed', 0)}"]
    rows = [("data", ", ".join(sources) or "not recorded")]
    if recipe.get("train_file") and not recipe.get("validation_file") and measured(metrics, PREFIXES["validation"]):
        rows.append(("validation", "held out from the training data"))
    if record.start:
        rows.append(("started from", f"`{without_folders(record.start)}`"))
    for key, (text, show) in FACTS.items():
        if key == "best_epoch" and not recipe.get("load_best_model_at_end"):
            # The weights are those of the last one.
            continue
        value = metrics.get(key) if show is str else record.run.number(key)
        rows += [(text, show(value))] if value is not None else []
    versions = metrics.get("versions")
    versions = versions.items() if isinstance(versions, dict) else []
    versions = [f"{name} {version}" for name, version in versions if version]
    rows.append(("versions", ", ".join(versions) or "not recorded"))
    return "\n".join(["| | |", "| --- | --- |", *(f"| {text} | {value} |" for text, value in rows)])


def architecture(record: Record) -> str:
    config = record.config
    if config is None:
        return "The files of the run do not say what the model is made of."
    mixers = getattr(config, "layer_mixers", ())
    names = ARCHITECTURE + (MEMORY if "memory" in mixers else ())
    fields = {name: getattr(config, name, None) for name in names}
    if mixers and "plucker" not in mixers:
        # A memory that has no size of its own takes that of the other mixer.
        shared = {"reduced_size"} if config.memory_reduced_size is None else set()
        fields = {name: value for name, value in fields.items() if name not in PLUCKER - shared}
    if not record.saved_config:
        # Follows from a tokenizer that is not here.
        del fields["vocab_size"]
    elif hasattr(config, "backbone_config"):
        fields["backbone"] = config.backbone_config.model_type
    if record.saved_config and record.task == "text-classification":
        fields["classes"] = list(config.id2label.values())
    rows = [
        f"| `{name}` | `{json.dumps(value, ensure_ascii=False)}` |"
        for name, value in fields.items()
        if value is not None
    ]
    return "\n".join(["| field | value |", "| --- | --- |", *rows])


def learned_positions(record: Record) -> int | None:
    """Tokens after which a learned position table ends; None if there is none, or the files do not tell.

    Models with other positions may read badly beyond `max_position_embeddings`, but they do read.
    """
    config = record.config
    if config is None or (hasattr(config, "backbone_config") and not record.saved_config):
        return None
    config = text_config(config)
    if getattr(config, "max_position_embeddings", None) is None:
        return None
    try:
        # The model tells, without its weights.
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        limit = position_limit(model)
    except (*MODEL_ERRORS, AssertionError, AttributeError, ImportError, LookupError, TypeError):
        # A type of another package, or fields that do not fit each other.
        return None
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and re.search(r"(pos[^.]*|wpe)$", name):
            # Positions that start after the padding token's id depend on a tokenizer that may not be here.
            return limit if record.saved_config or module.padding_idx is None else None
    return None


def limits(record: Record) -> str:
    config, lines = record.config, []
    if record.task == "text-generation" and config is not None and config.model_type == "grassmann":
        reach = sum(max(offsets) for offsets in config.layer_offsets)
        line = f"- The context is local: a prediction depends on its token and the {reach} before it, no further."
        if "memory" in config.layer_mixers:
            line = "- The past is kept in a state of constant size: it cannot recall all of a long text exactly."
        lines.append(line)
    if (positions := learned_positions(record)) is not None:
        lines.append(f"- It takes no text of more than {positions} tokens.")
    if record.task == "text-classification":
        lines.append("- It always answers with one of its classes, also where none applies.")
    if eval_results(record):
        lines.append("- One run with one seed stands behind the figures above; other seeds give others.")
    source = "It learned from the data named above alone, and repeats"
    if record.start:
        before = f"starting from `{os.path.basename(str(record.start))}` and what that had learned"
        source = f"It learned from the data named above, {before}, and repeats"
    elif not record.recipe:
        source = "What it learned from was not recorded; it repeats"
    beyond = ", and nothing was measured beyond the table above" if eval_results(record) else ""
    lines.append(f"- {source} the errors and biases of its data. Nothing was done about harmful content{beyond}.")
    return "\n".join(lines)


def usage(record: Record, repo_id: str) -> str:
    """Code that loads the model from the Hub and uses it."""
    name = json.dumps(repo_id, ensure_ascii=False)
    remote = ", trust_remote_code=True" if record.saved_config.get("auto_map") else ""
    if record.task == "text-classification":
        text = (
            '{"text": "A man is asleep.", "text_pair": "Nobody is awake."}'
            if is_pair_task(record)
            else '"A good day."'
        )
        return "\n".join(
            [
                "from transformers import pipeline",
                "",
                f'classifier = pipeline("text-classification", model={name}{remote})',
                f"print(classifier({text}))",
            ]
        )
    auto_class = "AutoModelForCausalLM" if record.task == "text-generation" else "AutoModel"
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name}{remote})",
        f"model = {auto_class}.from_pretrained({name}{remote})",
        'inputs = tokenizer("This is the", add_special_tokens=False, return_tensors="pt")',
    ]
    if record.task == "text-generation":
        lines += [
            "outputs = model.generate(**inputs, max_new_tokens=20)",
            "print(tokenizer.decode(outputs[0], skip_special_tokens=True))",
        ]
    else:
        lines.append("print(model(**inputs).last_hidden_state.shape)")
    return "\n".join(lines)


def tags(config: PreTrainedConfig | None) -> list[str] | None:
    if config is None or not config.model_type.startswith("grassmann"):
        return None
    if config.model_type == "grassmann":
        return ["grassmann", "attention-free"]
    # Encoder and head may have attention.
    return ["grassmann"] if config.head_type == "grassmann" else None


def is_pair_task(record: Record) -> bool:
    return "train_unlabelled" in record.run.metrics or "eval_unlabelled" in record.run.metrics


def without_folders(value: Any) -> Any:
    """A recipe in which files and folders of this machine have lost the folders that they are in."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value


def make_card(record: Record, repo_id: str | None = None, license: str = "apache-2.0") -> ModelCard:
    """
    Args:
        record: what the run left.
        repo_id: where its model can be loaded from; None for a run of which only the record is kept.
        license: the weights', as the Hub names it.
    """
    recipe, config = without_folders(record.recipe), record.config
    name = Path(repo_id).name if repo_id else record.run.name
    dataset = record.hub_id("dataset_name")
    data = ModelCardData(
        model_name=name,
        license=license,
        library_name="transformers",
        pipeline_tag=record.task,
        tags=tags(config),
        datasets=[dataset] if dataset else None,
        base_model=record.hub_id("backbone_name_or_path") or record.hub_id("model_name_or_path"),
        eval_results=eval_results(record) or None,
    )
    folder = record.run.folder
    if folder.is_relative_to(REPOSITORY):
        folder = folder.relative_to(REPOSITORY)
    paths = [quote(path) for path in (f"{folder.as_posix()}/recipe.yaml", f"runs/{name}")]
    script = "run_nli.py" if record.task == "text-classification" else "run_clm.py"
    if "train_size" in recipe or "test_num_pairs" in recipe:
        script = "run_recall.py"
    licence = f"The weights: {license}. The modeling code: Apache License 2.0."
    if recipe:
        licence += " What they were made from has licences of its own, which its sources state."
    recipe_text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip() if recipe else None
    return ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        name=name,
        summary=summary(record),
        repo_id=repo_id,
        usage=usage(record, repo_id) if repo_id else None,
        remote_code="auto_map" in record.saved_config,
        command=f"python trainer_scripts/{script} {paths[0]} --output_dir {paths[1]}",
        evaluation=evaluation_table(record),
        training=training(record),
        pictures={name: text for name, text in PICTURES.items() if (record.run.folder / name).is_file()},
        recipe=recipe_text,
        architecture=architecture(record),
        limits=limits(record),
        licence=licence,
    )


def write_card(folder: Path, record: Record, **options: Any) -> None:
    """Write the card into a folder as `README.md`; options are those of [`make_card`]."""
    write_atomically(folder / "README.md", str(make_card(record, **options)).strip() + "\n")


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = RecordsParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of the runs.")
    parser.add_argument("--baseline", type=Path, help="Folder of the run that they are compared with.")
    args = parser.parse_args(argv)
    for folder in args.runs:
        load_run(folder)
        write_card(folder, load_record(folder, args.baseline))
    print(f"wrote README.md into {len(args.runs)} folders")


if __name__ == "__main__":
    main()
