import json
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


@pytest.fixture(scope="session")
def pair_files(tmp_path_factory) -> dict[str, Path]:
    """Files `train`, `validation`, `test` of invented pairs, whose labels E, N, C follow from one word.

    Every split has rows without a label, and pairs of 5 to 15 words.
    """
    folder = tmp_path_factory.mktemp("pairs")
    generator = random.Random(0)
    words = ["cat", "dog", "sees", "follows", "small", "house", "and", "the"]
    answers = {"E": "yes", "N": "perhaps", "C": "never"}
    files = {}
    for split, rows in [("train", 150), ("validation", 41), ("test", 30)]:
        lines = ["premise,hypothesis,label\n"]
        for row in range(rows):
            label = generator.choice(list(answers))
            premise, hypothesis = (generator.choices(words, k=generator.randint(2, 7)) for _ in range(2))
            hypothesis.insert(generator.randint(0, len(hypothesis)), answers[label])
            lines.append(f"{' '.join(premise)},{' '.join(hypothesis)},{'-' if row % 10 == 3 else label}\n")
        files[split] = folder / f"{split}.csv"
        files[split].write_text("".join(lines))
    return files


@pytest.fixture(scope="session")
def pair_tokenizer(tmp_path_factory, pair_files):
    """Folder of a tokenizer with a token for each word of the pairs, which tells the two texts apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = pair_files["train"].read_text().partition("\n")[2].replace(",", " ")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(text.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("pair_tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory, pair_tokenizer) -> Path:
    """Folder of a tiny encoder, with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = AutoTokenizer.from_pretrained(pair_tokenizer)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    # Embeddings far enough apart that a head learns something from them at once.
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=20, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_data(pair_files) -> list[str]:
    """Arguments that name the pairs, for a run with batches of 8 on the CPU, without its model and output_dir."""
    files = [f"--{split}_file={path}" for split, path in pair_files.items()]
    names = ['--label_mapping={"E": "entailment", "N": "neutral", "C": "contradiction"}']
    return [*files, *names, "--per_device_train_batch_size=8", "--use_cpu", "--report_to=none", "--disable_tqdm=true"]


@pytest.fixture(scope="session")
def tiny_classifier(pair_data, backbone) -> list[str]:
    """Arguments of a tiny run with a head on a backbone, without its output_dir."""
    head = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 16, "reduced_size": 8}
    head |= {"window_size": 4, "window_stride": 4}
    model = [f"--backbone_name_or_path={backbone}", f"--config_overrides={json.dumps(head)}"]
    return [*model, *pair_data, "--learning_rate=5e-3", "--head_learning_rate=1e-2"]
