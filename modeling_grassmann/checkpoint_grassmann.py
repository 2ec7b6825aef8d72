# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""What all models here do when they are saved and loaded: their code travels, and damaged files are refused."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


# Layers that a model of another task brings along, or lacks: only they may be new, or left over, when loading.
OUTPUT_LAYERS = ("lm_head.", "score.", "classifier.")
# What reading a damaged file, or a damaged index of files, raises.
READING_ERRORS = (SafetensorError, FileNotFoundError, ValueError, TypeError, LookupError, AttributeError)


class CheckpointMixin:
    """
    Saving and loading of a `PreTrainedModel`. `AUTO_MAP` names the classes, as `module.Class`, that the Auto classes
    load from a checkpoint with `trust_remote_code=True`.
    """

    AUTO_MAP: ClassVar[dict[str, str]] = {}

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """
        Save the model as `PreTrainedModel.save_pretrained` does, and with it the modules that define it, so that the
        folder loads with `trust_remote_code=True` where this package is not installed.
        """
        if is_main_process and not os.path.isfile(save_directory):
            self.save_code(save_directory)
            # From a checkpoint the Trainer publishes weights and configuration alone, with what lies one folder above.
            folder = Path(save_directory).absolute()
            if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and is_folder_of_runs(folder.parent):
                self.save_code(folder.parent)
            self.config.auto_map = dict(self.AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @classmethod
    def save_code(cls, save_directory: str | os.PathLike) -> None:
        """Write the modules that the classes of `AUTO_MAP` are made of into a folder."""
        os.makedirs(save_directory, exist_ok=True)
        for module in cls.code_files():
            target = Path(save_directory, module.name)
            if target.resolve() != module.resolve():
                shutil.copyfile(module, target)

    @classmethod
    def code_files(cls) -> set[Path]:
        """The modules that the classes of `AUTO_MAP` are made of."""
        folder = Path(__file__).parent
        modules = {folder / f"{reference.partition('.')[0]}.py" for reference in cls.AUTO_MAP.values()}
        return modules | {Path(file) for module in modules for file in get_relative_import_files(module)}

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # What `save_pretrained(push_to_hub=True)` does not upload, as it was there before: not so the code.
        code = {module.name for module in self.code_files()}
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if name not in code}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Load the model as `PreTrainedModel.from_pretrained` does, but nothing that does not fit.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder, or id on the Hub.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`):
                Whether weights that are missing, left over, or of another shape than the configuration says are
                allowed, and start anew. An output layer (of another task) may always be missing or left over.
            use_safetensors (`bool`, *optional*, defaults to `True`):
                `False`, and not `None`, reads `pytorch_model.bin`, which is a pickle, restricted to tensors.

        Raises:
            OSError: if a file is missing or damaged; the message names it.
            RuntimeError: if the weights are not those of the configuration.
        """
        name, stored = pretrained_model_name_or_path, {}
        use_safetensors = use_safetensors is not False
        if use_safetensors and name is not None and os.path.isdir(name):
            stored = read_headers(weight_folder(name, kwargs), kwargs.get("variant"))
        try:
            model, info = super().from_pretrained(
                name,
                *model_args,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                use_safetensors=use_safetensors,
                output_loading_info=True,
                **kwargs,
            )
        except READING_ERRORS:
            # A file in the cache of the Hub, which may have been downloaded just now.
            if use_safetensors and name is not None and (folder := weight_folder(name, kwargs)) is not None:
                read_headers(folder, kwargs.get("variant"))
            raise
        if not ignore_mismatched_sizes:
            # Again: whether Transformers calls the method below is its own affair.
            check_weights(name, info)
        check_types(name, stored, model)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        # Checked before missing weights are made: a damaged configuration may ask for any amount of memory.
        if not load_config.ignore_mismatched_sizes:
            model._adjust_missing_and_unexpected_keys(loading_info)
            info = loading_info.to_dict()
            info["missing_keys"] = info["missing_keys"] - model.all_tied_weights_keys.keys()
            check_weights(load_config.pretrained_model_name_or_path, info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)


def is_folder_of_runs(folder: Path) -> bool:
    """Whether modules may be written into a folder: a Python that is started there would find them."""
    notice = Path(__file__).read_text(encoding="utf-8").partition("\n")[0]
    ours = (path.read_text(encoding="utf-8", errors="replace").startswith(notice) for path in folder.glob("*.py"))
    return folder != Path.cwd() and all(ours)


def check_weights(name: str | os.PathLike | None, info: dict[str, Any]) -> None:
    """
    Raises:
        RuntimeError: if weights other than an output layer's are missing or left over, or any has another shape.
    """
    problems = []
    for kind, text in (("missing_keys", "not in the file"), ("unexpected_keys", "not in the model")):
        if keys := sorted(key for key in info[kind] if not key.startswith(OUTPUT_LAYERS)):
            problems.append(f"{text}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}")
    for key, in_file, in_model in sorted(info["mismatched_keys"])[:3]:
        problems.append(f"{key} has shape {tuple(in_file)} in the file, {tuple(in_model)} in the model")
    if problems:
        raise RuntimeError(
            f"The weights in {name} are not those of the model that {CONFIG_NAME} describes. {'; '.join(problems)}. "
            "Load weights and configuration that were saved together, or pass `ignore_mismatched_sizes=True` for new "
            "random weights in their place."
        )


def check_types(name: str | os.PathLike | None, stored: dict[str, str], model: Any) -> None:
    """
    Raises:
        RuntimeError: if weights that are floats in the model are stored as integers, and not because of quantization.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    weights = model.state_dict()
    for key, dtype in stored.items():
        if dtype.startswith(("I", "U", "BOOL")) and key in weights and weights[key].is_floating_point():
            raise RuntimeError(
                f"The weights in {name} are not those of the model that {CONFIG_NAME} describes. {key} is stored as "
                f"{dtype}, not as floating-point numbers. Load another checkpoint, or copy or download this one again."
            )


def weight_folder(name: str | os.PathLike, kwargs: dict[str, Any]) -> Path | None:
    """The folder of a checkpoint's weights, perhaps in the cache of the Hub; None if there is none."""
    folder = Path(name)
    if not folder.is_dir():
        options = {key: kwargs[key] for key in ("cache_dir", "revision", "token") if kwargs.get(key) is not None}
        config = cached_file(
            name, CONFIG_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False, **options
        )
        if config is None:
            return None
        folder = Path(config).parent
    return folder / (kwargs.get("subfolder") or "")


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """
    The files of a checkpoint's weights: one, or those that an index names; none if there is neither.

    Raises:
        OSError: if the index is damaged, or names files outside of its folder.
    """
    # model.safetensors, or model.VARIANT.safetensors
    single, index = (
        folder / (f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}")
        for stem, _, suffix in (name.rpartition(".") for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    )
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        valid = isinstance(content["metadata"], dict) and names and all(isinstance(name, str) for name in names)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise damaged(f"{index} is not an index of weights")
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise damaged(f"{index} names {name}, which is not in its folder")
    return [folder / name for name in names]


def read_headers(folder: Path, variant: str | None) -> dict[str, str]:
    """
    Type of each stored weight, by name.

    Raises:
        OSError: if a file is missing or damaged; the message names it.
    """
    stored = {}
    for path in weight_files(folder, variant):
        try:
            with safe_open(path, framework="pt") as file:
                stored.update({key: file.get_slice(key).get_dtype() for key in file.keys()})  # noqa: SIM118
        except FileNotFoundError as error:
            raise damaged(f"{path}, which the index of weights names, is missing") from error
        except SafetensorError as error:
            raise damaged(f"{path} is truncated or damaged ({error})") from error
    return stored


def damaged(problem: str) -> OSError:
    return OSError(
        f"{problem}. Copy or download it again, or load another checkpoint. (A file in the cache of the Hub has to be "
        "deleted first.)"
    )
