import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "trainer_scripts"

# A model that trains in seconds; dropout is on, so that its randomness is tested as well.
TINY_MODEL = [
    "--model_type=grassmann",
    '--config_overrides={"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "reduced_size": 4,'
    ' "offsets": [1, 2], "max_position_embeddings": 16}',
]


@pytest.fixture(scope="session")
def run_python():
    """Function that runs Python with the given arguments in the repository's root."""

    def run(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, **kwargs)

    return run


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict[str, Path]:
    """Files `train`, `validation`, `test` of invented sentences; no file fills its last block of 16 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    words = [*"acdefghijlm", "cat", "dog", "sees", "follows", "small", "house", "and"]
    generator = random.Random(0)
    files = {}
    for split, lines in [("train", 200), ("validation", 41), ("test", 30)]:
        files[split] = folder / f"{split}.txt"
        sentences = [" ".join(generator.choices(words, k=generator.randint(3, 9))) for _ in range(lines)]
        files[split].write_text("".join(f"{sentence} .\n" for sentence in sentences))
    return files


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, text_files) -> Path:
    from corpus import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(text_files["train"].read_text().splitlines(), 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(text_files, tokenizer_folder) -> list[str]:
    """Arguments of a tiny run, without its output_dir."""
    files = [f"--{split}_file={path}" for split, path in text_files.items()]
    sizes = ["--block_size=16", "--per_device_train_batch_size=8", "--per_device_eval_batch_size=4"]
    return [*TINY_MODEL, f"--tokenizer_name={tokenizer_folder}", *files, *sizes, "--use_cpu", "--learning_rate=5e-3"]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with WikiText-2 and public tokenizers."""
    folder = os.environ.get("GRASSMANN_DATA_DIR")
    if not folder:
        pytest.skip("GRASSMANN_DATA_DIR is not set: it names a folder with WikiText-2 and tokenizers")
    return Path(folder)
