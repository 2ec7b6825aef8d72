"""publish.py and the training scripts' own publishing, from a run to a model that somebody else loads."""

import json
import random
import re
import shutil

import huggingface_hub
import pytest
import torch
from corpus import train_tokenizer
from huggingface_hub import ModelCard
from model_card import load_record
from publish import main
from safetensors.torch import load_file, save_file
from server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from modeling_grassmann import GrassmannPluckerForSequenceClassification


MODEL = ["--model_type=grassmann", "--block_size=16"]
MODEL += [
    '--config_overrides={"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "reduced_size": 4,'
    ' "offsets": [1, 2], "max_position_embeddings": 32}'
]
TRAINING = [
    "--do_train",
    "--do_eval",
    "--num_train_epochs=2",
    "--per_device_train_batch_size=8",
    "--learning_rate=5e-3",
]
TRAINING += ["--logging_steps=5", "--eval_strategy=epoch", "--save_strategy=epoch", "--use_cpu", "--report_to=none"]

# Runs the code of a card and reports the logits of the model that it loads.
CARD_CODE = """
import re, sys, torch
from huggingface_hub import ModelCard
card = ModelCard.load(sys.argv[1])
exec(re.search(r"```python\\n(.*?)```", card.text, flags=re.DOTALL).group(1))
with torch.no_grad():
    logits = model(torch.arange(1, 13).view(2, 6)).logits
torch.save(logits, sys.argv[2])
"""

CLASSIFIER_CARD_CODE = """
import re, sys
from huggingface_hub import ModelCard
code = re.search(r"```python\\n(.*?)```", ModelCard.load(sys.argv[1]).text, flags=re.DOTALL).group(1)
print(code)
exec(code)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_repo_id, run_python):
    """Folder of a tiny run, and the repository that the script itself published it to."""
    folder = tmp_path_factory.mktemp("trained")
    generator = random.Random(0)
    words = [*"acdefghijlm", "cat", "dog", "sees", "follows", "small", "house", "and"]
    for split, lines in (("train", 150), ("validation", 40)):
        text = "".join(f"{' '.join(generator.choices(words, k=6))} .\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text)
    train_tokenizer((folder / "train.txt").read_text().splitlines(), 300).save_pretrained(folder / "tokenizer")
    files = [f"--{split}_file={folder / split}.txt" for split in ("train", "validation")]
    repo_id = make_repo_id("trained")
    run_python(
        "trainer_scripts/run_clm.py",
        *MODEL,
        *TRAINING,
        *files,
        f"--tokenizer_name={folder / 'tokenizer'}",
        f"--output_dir={folder / 'run'}",
        "--push_to_hub",
        f"--hub_model_id={repo_id}",
        f"--hub_token={WRITE_TOKEN}",
        token=None,
        check=True,
    )
    return folder / "run", repo_id


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, as a test may change it."""
    ignored = shutil.ignore_patterns("checkpoint-*", "hub*")
    return shutil.copytree(trained[0], tmp_path / "run", ignore=ignored)


@pytest.fixture
def publish(hub, make_client, monkeypatch, capsys, tmp_path):
    """Function that runs publish.py against the `hub` and returns its exit code, what it printed, and its last error.

    In this process, since importing Transformers takes longer than all the rest.
    """
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))

    def publish(run, repo_id, *options, token=WRITE_TOKEN):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        code = 0
        try:
            main([str(run), "--repo-id", repo_id, *options])
        except SystemExit as exit:
            code = exit.code
        printed, errors = capsys.readouterr()
        return code, printed, errors

    return publish


def refusal(outcome):
    code, _, errors = outcome
    assert code == 2
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def success(outcome):
    code, printed, errors = outcome
    assert code == 0, errors
    return printed


def run_card(run_python, repo_id, path, python):
    """Logits of the model that the code of a card loads, and what that code prints."""
    process = run_python("-c", CARD_CODE, repo_id, path, python=python, check=True)
    return torch.load(path, weights_only=True), process.stdout


def own_logits(run):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(run)(torch.arange(1, 13).view(2, 6)).logits


def test_a_run_that_pushes_publishes_its_code_records_and_final_card(trained, hub, bare_python, run_python, tmp_path):
    run, repo_id = trained
    files = hub.files(repo_id)
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_grassmann.py", "plucker.py"} <= set(files)
    assert {"recipe.yaml", "log.jsonl", "metrics.json", "training_curve.png", "README.md"} <= set(files)
    metrics = json.loads((run / "metrics.json").read_text())
    card = ModelCard(files["README.md"].decode())
    assert [result.metric_value for result in card.data.eval_results if result.metric_type == "perplexity"] == [
        metrics["eval_perplexity"]
    ]
    # What was published while it trained brings its code as well.
    commits = hub.repositories[repo_id].commits.values()
    in_training = [commit.files for commit in commits if commit.title.startswith("Training in progress")]
    assert in_training and all("modeling_grassmann.py" in files for files in in_training)

    theirs, printed = run_card(run_python, repo_id, tmp_path / "theirs.pt", bare_python)
    assert torch.equal(theirs, own_logits(run))
    assert printed.strip().startswith("This is the")


def test_nothing_that_a_run_publishes_holds_the_token_and_its_last_revision_no_pickle_or_path(trained, hub):
    run, repo_id = trained
    for commit in hub.repositories[repo_id].commits.values():
        assert not [path for path, content in commit.files.items() if WRITE_TOKEN.encode() in content]
    files = hub.files(repo_id)
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pth"))]
    # Where the run and its data lie is nobody's business.
    assert not [path for path, content in files.items() if str(run.parent).encode() in content]


def test_a_dry_run_writes_the_folder_says_what_would_go_and_asks_nothing(run, repo_id, hub, publish):
    before = len(hub.requests)
    printed = success(publish(run, repo_id, "--dry-run", token=None))
    assert len(hub.requests) == before
    written = {path.name: path.stat().st_size for path in (run / "hub").iterdir()}
    listed = re.findall(r"^ +([\d,]+)  (\S+)$", printed, flags=re.MULTILINE)
    assert {name: int(size.replace(",", "")) for size, name in listed} == written
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pth"))]
    assert ModelCard.load(run / "hub" / "README.md").data.pipeline_tag == "text-generation"


def test_what_is_published_loads_and_writes_by_the_cards_own_code(
    run, repo_id, hub, publish, run_python, bare_python, tmp_path
):
    printed = success(publish(run, repo_id, "--private", "--license", "mit"))
    files = hub.files(repo_id)
    written = {path.name: path.read_bytes() for path in (run / "hub").iterdir()}
    assert {name: files[name] for name in written} == written
    assert set(files) - set(written) <= {".gitattributes"}
    assert hub.repositories[repo_id].private
    assert f"published {hub.url}/{repo_id}/commit/" in printed
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    theirs, printed = run_card(run_python, repo_id, tmp_path / "theirs.pt", bare_python)
    assert torch.equal(theirs, own_logits(run)) and printed.strip()


def test_a_public_repository_is_not_taken_for_a_private_one(run, repo_id, hub, publish):
    success(publish(run, repo_id))
    before = hub.files(repo_id)
    (run / "metrics.json").write_text("{}")
    line = refusal(publish(run, repo_id, "--private"))
    assert repo_id in line and "public" in line
    assert hub.files(repo_id) == before


def test_an_update_replaces_weights_and_code_in_one_commit(run, repo_id, hub, publish):
    success(publish(run, repo_id))
    first = hub.files(repo_id)
    old = list(hub.repositories[repo_id].commits)
    # As a larger model's, which came in parts and had another module.
    (run / "hub").rename(run / "uploaded")
    replaced = {"model-00001-of-00002.safetensors": b"x", "old_module.py": b"x", "training_args.bin": b"x"}
    own = {"notes.txt": b"mine", "demo/app.py": b"mine"}
    hub.repositories[repo_id].commit("main", "sharded", first | replaced | own)
    (run / "baseline.json").write_text('{"name": "bigram", "eval_perplexity": 300.5}')
    success(publish(run, repo_id, "--commit-message", "Compare with a bigram"))
    files = hub.files(repo_id)
    assert not replaced.keys() & files.keys()
    assert own.items() <= files.items()
    assert "300.50" in files["README.md"].decode()
    commits = hub.repositories[repo_id].commits
    assert [commit.title for commit in commits.values()][-1] == "Compare with a bigram"
    assert len(commits) == len(old) + 2
    assert hub.files(repo_id, old[-1]) == first


@pytest.mark.parametrize("fault", [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_a_failed_upload_leaves_the_previous_revision_whole(fault, run, repo_id, hub, publish):
    success(publish(run, repo_id))
    before = hub.files(repo_id)
    (run / "metrics.json").write_text("{}")
    # Other weights have to be uploaded anew.
    state = load_file(run / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, run / "model.safetensors", {"format": "pt"})
    with hub.failing(*fault, status=403):
        line = refusal(publish(run, repo_id))
    assert repo_id in line
    assert hub.files(repo_id) == before
    success(publish(run, repo_id))
    assert hub.files(repo_id) != before


def test_a_missing_or_refused_token_is_named(run, repo_id, hub, publish, trained):
    line = refusal(publish(run, repo_id, token=None))
    assert "hf auth login" in line and "HF_TOKEN" in line
    assert not (run / "hub").exists()
    line = refusal(publish(run, repo_id, token="hf_unknown"))
    assert "401" in line and "HF_TOKEN" in line
    line = refusal(publish(run, repo_id, token=READ_TOKEN))
    assert "403" in line and "write permission" in line
    line = refusal(publish(run, trained[1], token=OTHER_TOKEN))
    assert trained[1] in line and "write permission" in line
    assert repo_id not in hub.repositories


def test_training_that_cannot_publish_ends_before_it_starts(run_python, trained, tmp_path):
    folder = trained[0].parent
    argv = [*MODEL, *TRAINING, f"--train_file={folder / 'train.txt'}", f"--tokenizer_name={folder / 'tokenizer'}"]
    argv += ["--validation_split_percentage=10", "--push_to_hub", "--hub_model_id=user/never"]
    argv += [f"--output_dir={tmp_path / 'out'}"]
    for token, words in ((None, ["hf auth login"]), (READ_TOKEN, ["403", "user/never"])):
        process = run_python("trainer_scripts/run_clm.py", *argv, token=token)
        line = refusal((process.returncode, process.stdout, process.stderr))
        assert all(word in line for word in words)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_that_is_no_complete_model_is_refused(run, repo_id, publish, tmp_path):
    line = refusal(publish(tmp_path / "nowhere", repo_id))
    assert "nowhere is not a folder" in line
    line = refusal(publish(run, "no/such/name", "--dry-run"))
    assert "no/such/name is not the name of a repository" in line
    line = refusal(publish(run, "name", "--dry-run"))
    assert "must be user/name" in line
    weights = run / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    line = refusal(publish(run, repo_id, "--dry-run"))
    assert "model.safetensors" in line and "truncated" in line
    weights.write_bytes(content)
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    size = json.loads((run / "config.json").read_text())["vocab_size"]
    tokenizer["added_tokens"].append(
        {"id": size, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
    )
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(publish(run, repo_id, "--dry-run"))
    assert f"vocab_size={size}" in line and f"{size + 1} tokens" in line
    config = json.loads((run / "config.json").read_text())
    for model_type in ("grasman", None):
        (run / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        line = refusal(publish(run, repo_id, "--dry-run"))
        assert f"names the model_type {model_type}" in line
    (run / "tokenizer_config.json").unlink()
    line = refusal(publish(run, repo_id, "--dry-run"))
    assert "has no tokenizer_config.json" in line
    assert not (run / "hub").exists()


def test_any_saved_model_with_its_tokenizer_can_be_published(run, repo_id, hub, publish):
    for path in ("recipe.yaml", "log.jsonl", "metrics.json", "training_curve.png", "README.md"):
        (run / path).unlink()
    success(publish(run, repo_id))
    card = hub.files(repo_id)["README.md"].decode()
    assert "has not been evaluated" in card and "Nothing was recorded about the training" in card
    assert load_record(run).task == "text-generation"


@pytest.mark.parametrize("metrics", [{}, {"eval_unlabelled": 0, "max_length": 16, "eval_accuracy": 0.5}])
def test_the_card_of_a_classifier_holds_code_that_answers(
    metrics, make_backbone, trained, tmp_path, repo_id, publish, run_python, bare_python
):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    backbone = make_backbone("distilbert", vocab_size=len(tokenizer))
    names = {0: "entailment", 1: "neutral", 2: "contradiction"}
    model = GrassmannPluckerForSequenceClassification.from_backbone(backbone, id2label=names, hidden_size=16)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    success(publish(tmp_path / "run", repo_id))
    process = run_python("-c", CLASSIFIER_CARD_CODE, repo_id, python=bare_python, check=True)
    assert re.search(r"'label': '(entailment|neutral|contradiction)'", process.stdout)
    assert ("text_pair" in process.stdout) == bool(metrics)


def test_a_model_whose_output_layer_would_be_lost_is_refused(trained, tmp_path, repo_id, publish):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for saved in (BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer):
        saved.save_pretrained(tmp_path / "run")
    assert "BertForMaskedLM" in refusal(publish(tmp_path / "run", repo_id, "--dry-run"))
