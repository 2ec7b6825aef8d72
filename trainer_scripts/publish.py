"""Publish the model of a run on the Hub, with its code, its records and a model card.

    python trainer_scripts/publish.py runs/quickstart --repo-id user/name [--private] [--dry-run]

uploads, in one commit: weights (safetensors), configuration, tokenizer, generation settings, the modules that define
the model (so that `trust_remote_code=True` loads it anywhere), recipe, log, metrics, pictures and the model card.
`--dry-run` leaves the same folder in `RUN_DIR/hub`, says what would go, and asks nothing of the Hub.
"""

import fnmatch
import glob
import shutil
from dataclasses import replace
from pathlib import Path

import transformers
import yaml
from arguments import UserError, exits_on_user_error
from checkpoints import write_atomically
from curves import draw_training_curve
from hub import HUB_ERRORS, check_token, explain
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from model_card import CURVE, load_record, read_object, without_folders, write_card
from models import MODEL_ERRORS, check_vocabulary
from run_records import RecordsParser
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


AUTO_CLASSES = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "feature-extraction": AutoModel,
}
# Records of a run that go with its model.
RECORDS = ("log.jsonl", "metrics.json", "baseline.json", "confusion_matrix_*.json", "*.png")
# What an earlier revision may hold beside the weights and this one may not; both happen in one commit.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.py", "*.png", "training_args.bin")


def load(folder: Path, auto_class: type) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a run.

    Raises:
        UserError: if one is missing or damaged, or if they do not belong together.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter, not a model: merge it first (`merge_and_unload`), or publish it with PEFT's"
            " own `push_to_hub`"
        )
    for name, what in (("config.json", "saved model"), ("tokenizer_config.json", "tokenizer")):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: it needs a {what}, as `save_pretrained` writes it")
    model_type = read_object(folder / "config.json").get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{folder / 'config.json'} names the model_type {model_type}, which neither Transformers nor this package"
            " knows"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        check_vocabulary(config, tokenizer)
        model = auto_class.from_pretrained(folder, dtype="auto", use_safetensors=True)
        if config.architectures and type(model).__name__ not in config.architectures:
            raise UserError(
                f"{folder} holds a {config.architectures[0]}, which cannot be published here: language models,"
                " classifiers of texts and models without an output layer can"
            )
        return model, tokenizer
    except (*MODEL_ERRORS, AttributeError, LookupError, TypeError) as error:
        raise UserError(f"cannot load what {folder} holds: {error}") from error


def make_folder(run_dir: Path, repo_id: str, license: str = "apache-2.0", baseline: Path | None = None) -> Path:
    """Write all that goes to the Hub into `RUN_DIR/hub`, in the place of what was there.

    Args:
        run_dir: folder of the run.
        repo_id: name of the repository.
        license: of the weights, as the Hub names it.
        baseline: folder of the run that this one is compared with.

    Raises:
        UserError: if the run has no complete model, or a file cannot be written.
    """
    record = load_record(run_dir, baseline)
    model, tokenizer = load(run_dir, AUTO_CLASSES[record.task])
    partial, folder = run_dir / "hub.partial", run_dir / "hub"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            draw_training_curve(record.run, run_dir / CURVE)
        except UserError as error:
            print(f"warning: no picture of the training: {error}")
        for pattern in RECORDS:
            for path in sorted(run_dir.glob(pattern)):
                shutil.copyfile(path, partial / path.name)
        if record.recipe:
            recipe = yaml.safe_dump(without_folders(record.recipe), sort_keys=False, allow_unicode=True)
            write_atomically(partial / "recipe.yaml", recipe)
        # The saved configuration names the modules that were written beside it.
        record = replace(record, saved_config=read_object(partial / "config.json"))
        write_card(partial, record, repo_id=repo_id, license=license)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}") from error
    return folder


def upload(folder: Path, repo_id: str, message: str, private: bool = False, revision: str | None = None) -> str:
    """Upload a folder in one commit, to a repository that is made if need be.

    Args:
        folder: as `make_folder` writes it.
        repo_id: name of the repository.
        message: of the commit.
        private: whether a new repository is private.
        revision: branch, if not the main one.

    Returns:
        the address of the commit.

    Raises:
        UserError: if the Hub refuses.
    """
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        repo = api.repo_info(repo_id, revision=revision)
        if private and not repo.private:
            raise UserError(
                f"{repo_id} is there already, and public: make it private in its settings, or choose another name"
            )
        # Not what lies in folders, which patterns would reach.
        replaced = [
            glob.escape(name)
            for name in (file.rfilename for file in repo.siblings)
            if "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in REPLACED)
        ]
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=replaced,
        )
    except HUB_ERRORS as error:
        raise explain(error, repo_id) from error
    return commit.commit_url


@exits_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = RecordsParser(__doc__)
    parser.add_argument("run_dir", type=Path, help="Folder of the run, or of any saved model with its tokenizer.")
    parser.add_argument("--repo-id", required=True, help="Name of the repository, user/name. It is made if need be.")
    parser.add_argument("--private", action="store_true", help="Make a new repository private.")
    parser.add_argument("--dry-run", action="store_true", help="Write RUN_DIR/hub and upload nothing.")
    parser.add_argument("--baseline", type=Path, help="Folder of the run that the card compares this one with.")
    parser.add_argument("--license", default="apache-2.0", help="Licence of the weights (apache-2.0).")
    parser.add_argument("--commit-message", default="Upload model", help="Message of the commit.")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    if not args.run_dir.is_dir():
        raise UserError(f"{args.run_dir} is not a folder")
    try:
        validate_repo_id(args.repo_id)
    except HUB_ERRORS as error:
        raise explain(error, args.repo_id) from error
    if "/" not in args.repo_id:
        raise UserError(f"repo-id {args.repo_id} must be user/name: the model card says where the model lies")
    if not args.dry_run:
        check_token(None)

    folder = make_folder(args.run_dir, args.repo_id, args.license, args.baseline)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not (args.run_dir / "metrics.json").is_file():
        print(f"warning: {args.run_dir} holds no metrics.json: the card says that nothing was evaluated")
    print(f"{'Would upload' if args.dry_run else 'Uploading'} {folder} to {args.repo_id}, licence {args.license}:")
    for path in files:
        print(f"  {path.stat().st_size:>14,}  {path.relative_to(folder)}")
    if not args.dry_run:
        print(f"published {upload(folder, args.repo_id, args.commit_message, args.private)}")


if __name__ == "__main__":
    main()
