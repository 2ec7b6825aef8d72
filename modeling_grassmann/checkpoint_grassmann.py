# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""What all models here do when they are saved and loaded: their code travels, and damaged files are refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file


# Layers that a model of another task brings along, or lacks: only they may be new, or left over, when loading.
OUTPUT_LAYERS = ("lm_head.", "score.", "classifier.")


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
            os.makedirs(save_directory, exist_ok=True)
            for file in self.code_files():
                if Path(save_directory, file.name).resolve() != file.resolve():
                    shutil.copyfile(file, Path(save_directory, file.name))
            self.config.auto_map = dict(self.AUTO_MAP)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @classmethod
    def code_files(cls) -> list[Path]:
        """The modules that the classes of `AUTO_MAP` are made of."""
        folder = Path(__file__).parent
        modules = {folder / f"{reference.partition('.')[0]}.py" for reference in cls.AUTO_MAP.values()}
        imported = {Path(file) for module in modules for file in get_relative_import_files(module)}
        return sorted(modules | imported)

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
                `False` reads `pytorch_model.bin`, which is a pickle, restricted to tensors.

        Raises:
            OSError: if a file is missing or damaged; the message names it.
            RuntimeError: if the weights are not those of the configuration.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                ignore_mismatched_sizes=True,
                use_safetensors=use_safetensors,
                output_loading_info=True,
                **kwargs,
            )
        except (SafetensorError, FileNotFoundError, json.JSONDecodeError) as error:
            damage = describe_damage(pretrained_model_name_or_path, kwargs)
            if damage is None:
                raise
            raise OSError(
                f"{damage} Copy or download it again, or load another checkpoint. (A file in the cache of the Hub has "
                "to be deleted first.)"
            ) from error
        if not ignore_mismatched_sizes:
            check_weights(pretrained_model_name_or_path, info)
        return (model, info) if output_loading_info else model


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


def describe_damage(name: str | os.PathLike, kwargs: dict[str, Any]) -> str | None:
    """A sentence that says which file of a checkpoint cannot be read; None if all can."""
    folder = Path(name)
    if not folder.is_dir():
        options = {key: kwargs[key] for key in ("cache_dir", "revision", "token") if kwargs.get(key) is not None}
        config = cached_file(
            name, CONFIG_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False, **options
        )
        if config is None:
            return None
        folder = Path(config).parent
    folder = folder / kwargs.get("subfolder", "")
    files = set(folder.glob("*.safetensors"))
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        try:
            files |= {folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{index} is not an index of weights ({error!r})."
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError:
            return f"{file}, which {index.name} names, is missing."
        except SafetensorError as error:
            return f"{file} is truncated or damaged ({error})."
    return None
