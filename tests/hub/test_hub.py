"""Our models through the Hub: pushed as any model is, they load where this package is not installed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from server import READ_TOKEN

import modeling_grassmann


PACKAGE = Path(modeling_grassmann.__file__).parent
TEXTS = ["the cat sees the dog", "a house", "the small dog follows a cat and sees the house"]

# A user's process, where the package is installed: new models are pushed one by one, and others by a Trainer. It knows
# nothing of this package but the import.
PUBLISH = """
import json, sys
from safetensors.torch import load_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import Trainer, TrainingArguments
import modeling_grassmann

tokenizer_folder, models, trained = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
for name, (auto_class, config, weights) in json.loads(models).items():
    model = globals()[auto_class].from_config(AutoConfig.for_model(**json.load(open(config))))
    load_model(model, weights)
    if auto_class == "AutoModelForCausalLM":
        model.push_to_hub(name)
    else:
        model.save_pretrained(f"{weights}_saved", push_to_hub=True, repo_id=name)
    tokenizer.push_to_hub(name)

sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "reduced_size": 4, "offsets": [1, 2]}
for name, (strategy, folder) in json.loads(trained).items():
    config = AutoConfig.for_model("grassmann", vocab_size=len(tokenizer), max_position_embeddings=16, **sizes)
    args = TrainingArguments(
        output_dir=folder, max_steps=2, save_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        push_to_hub=True, hub_model_id=name, hub_strategy=strategy, disable_tqdm=True,
    )
    data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    trainer = Trainer(AutoModelForCausalLM.from_config(config), args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
"""

# What the scripts below share: names of the repositories, the inputs, and comparisons to the bit.
LOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

lm, classifier, stacked, other, expected, trained, folder, *texts = sys.argv[1:]
expected = load_file(expected)
ids = expected["ids"]
result = {}

def same(name, actual):
    return torch.equal(actual, expected[name])

@torch.no_grad()
def works(model):
    same_ids = same("generated", model.generate(ids, max_new_tokens=8, do_sample=False))
    return same("logits", model(ids).logits) and same_ids

@torch.no_grad()
def classify(models):
    return same("classifier", models[0](ids).logits) and same("stacked", models[1](ids).logits)

def classifiers(**kwargs):
    return [AutoModelForSequenceClassification.from_pretrained(name, **kwargs) for name in (classifier, stacked)]

def source(model):
    return type(model).__module__.partition(".")[0]
"""

# A process where the package is not installed.
BARE = """
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    try:
        result[f"refusal of {auto_class.__name__}"] = str(auto_class.from_pretrained(lm))
    except ValueError as error:
        result[f"refusal of {auto_class.__name__}"] = str(error)

trust = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(lm, **trust)
result["language model"] = works(model)
result["language model's source"] = source(model)
with torch.no_grad():
    base = AutoModel.from_pretrained(lm, **trust)
    result["base model"] = same("hidden", base(ids).last_hidden_state)
    head, info = AutoModelForSequenceClassification.from_pretrained(
        lm, num_labels=5, output_loading_info=True, pad_token_id=0, **trust
    )
    result["new head"] = list(info["missing_keys"])
    result["new head's shape"] = list(head(ids).logits.shape)
    result["new head's base"] = same("hidden", head.model(ids).last_hidden_state)
result["classifiers"] = classify(classifiers(**trust))
with torch.no_grad():
    local = AutoModelForSequenceClassification.from_pretrained(folder, **trust)
    result["from a folder"] = same("stacked", local(ids).logits)
pipe = pipeline("text-classification", model=classifier, top_k=None, **trust)
result["pipeline"] = [{row["label"]: row["score"] for row in rows} for rows in pipe(texts)]
writer = pipeline("text-generation", model=lm, **trust)
result["written"] = len(writer(texts[0], max_new_tokens=4, return_tensors=True)[0]["generated_token_ids"])

old = model.push_to_hub(other).oid
result["pushed on"] = works(AutoModelForCausalLM.from_pretrained(other, **trust))
with torch.no_grad():
    model.get_input_embeddings().weight.mul_(2)
model.push_to_hub(other)
result["old revision"] = works(AutoModelForCausalLM.from_pretrained(other, revision=old, **trust))
result["new revision"] = works(AutoModelForCausalLM.from_pretrained(other, **trust))

result["trained"] = {}
for name, (_, folder) in json.loads(trained).items():
    model = AutoModelForCausalLM.from_pretrained(name, **trust)
    state, weights = model.state_dict(), load_file(f"{folder}/model.safetensors")
    same_weights = all(torch.equal(state[key], value) for key, value in weights.items())
    prompt = AutoTokenizer.from_pretrained(name, **trust)(texts[0], return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=3, min_new_tokens=3)
    result["trained"][name] = [same_weights, list(written.shape) == [1, prompt.shape[1] + 3]]
result["package"] = "modeling_grassmann" in sys.modules
print(f"\\n{json.dumps(result)}")
"""

OFFLINE = """
result["model"] = works(AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True))
result["classifiers"] = classify(classifiers(trust_remote_code=True))
print(f"\\n{json.dumps(result)}")
"""

DAMAGED = """
try:
    AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True)
except OSError as error:
    result["message"] = str(error)
print(f"\\n{json.dumps(result)}")
"""

# Processes with the package, in both orders.
PACKAGE_FIRST = """
import modeling_grassmann

plain = AutoModelForCausalLM.from_pretrained(lm)
result["plain"], result["plain's source"] = works(plain), source(plain)
remote = AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True)
result["remote"] = works(remote)
again = AutoModelForCausalLM.from_pretrained(lm)
result["again"] = works(again) and works(plain) and works(remote)
plain_classifiers = classifiers()
result["classifiers' source"] = source(plain_classifiers[0])
result["classifiers"] = classify(plain_classifiers)
result["remote classifiers"] = classify(classifiers(trust_remote_code=True)) and classify(classifiers())
print(f"\\n{json.dumps(result)}")
"""
REMOTE_FIRST = """
remote = AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True)
remote_classifiers = classifiers(trust_remote_code=True)
result["remote"], result["remote's source"] = works(remote), source(remote)

import modeling_grassmann

plain = AutoModelForCausalLM.from_pretrained(lm)
result["plain"], result["plain's source"] = works(plain), source(plain)
result["again"] = works(AutoModelForCausalLM.from_pretrained(lm, trust_remote_code=True)) and works(remote)
plain_classifiers = classifiers()
result["classifiers' source"] = source(plain_classifiers[0])
result["classifiers"] = classify(plain_classifiers)
result["remote classifiers"] = classify(remote_classifiers) and classify(classifiers(trust_remote_code=True))
# Either kind of model still saves.
remote.push_to_hub(other)
result["pushed on"] = works(AutoModelForCausalLM.from_pretrained(other))
print(f"\\n{json.dumps(result)}")
"""


def last_line(process) -> dict:
    # A line of its own: the question whether to trust the code, which nobody answers, does not end its line.
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer with a token for each word of TEXTS, saved in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )
    tokenizer.save_pretrained(folder)
    tokenizer.folder = folder
    return tokenizer


@pytest.fixture(scope="module")
def published(tmp_path_factory, make_model, make_classifier, make_ids, make_repo_id, run_python, tokenizer):
    """Names of the repositories of a language model and two classifiers, their answers, and what Trainer pushed."""
    folder = tmp_path_factory.mktemp("models")
    models = {
        "lm": make_model(),
        "classifier": make_classifier(num_labels=3).eval(),
        # Here the backbone's code has to come along too.
        "stacked": make_classifier("grassmann", num_labels=3).eval(),
    }
    lm, classifier, stacked = models.values()
    names = {key: make_repo_id(key) for key in models}
    ids = make_ids(2, 7)
    with torch.no_grad():
        expected = {
            "ids": ids,
            "logits": lm(ids).logits,
            "hidden": lm.model(ids).last_hidden_state,
            "generated": lm.generate(ids, max_new_tokens=8, do_sample=False),
            "classifier": classifier(ids).logits,
            "stacked": stacked(ids).logits,
        }
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        probabilities = classifier(**batch).logits.softmax(-1)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )
    new = {}
    for key, model in models.items():
        model.config.to_json_file(folder / f"{key}.json", use_diff=False)
        save_model(model, folder / f"{key}.safetensors")
        auto_class = "AutoModelForCausalLM" if key == "lm" else "AutoModelForSequenceClassification"
        new[names[key]] = [auto_class, str(folder / f"{key}.json"), str(folder / f"{key}.safetensors")]
    trained = {make_repo_id(strategy): (strategy, str(folder / strategy)) for strategy in ("every_save", "end")}
    run_python("-c", PUBLISH, tokenizer.folder, json.dumps(new), json.dumps(trained), check=True)
    return names | {
        "expected": folder / "expected.safetensors",
        "probabilities": probabilities,
        "folder": f"{folder / 'stacked'}.safetensors_saved",
        "trained": trained,
    }


@pytest.fixture(scope="module")
def load(published, make_repo_id, run_python):
    """Function that runs a script after LOAD in a child process, and returns what it prints and its new repository."""

    def run(script, **kwargs):
        other = make_repo_id("other")
        trained = json.dumps(published["trained"])
        names = [published[key] for key in ("lm", "classifier", "stacked")]
        arguments = [*names, other, published["expected"], trained, published["folder"], *TEXTS]
        return last_line(run_python("-c", LOAD + script, *arguments, check=True, **kwargs)) | {"other": other}

    return run


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory):
    """Folder of the cache that `bare` fills."""
    return tmp_path_factory.mktemp("hub_home")


@pytest.fixture(scope="module")
def bare(load, bare_python, hub_home):
    """What a process without the package finds; the tests below ask for it in turn."""
    return load(BARE, python=bare_python, HF_HOME=hub_home)


def modules_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path.endswith(".py")}


def test_a_pushed_repository_holds_weights_configuration_code_and_tokenizer(hub, published):
    types = {"lm": "grassmann", "classifier": "grassmann_plucker", "stacked": "grassmann_plucker"}
    for key, model_type in types.items():
        files = hub.files(published[key])
        assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(files)
        modules = modules_of(files)
        config = json.loads(files["config.json"])
        assert config["model_type"] == model_type
        assert {f"{reference.split('.')[0]}.py" for reference in config["auto_map"].values()} <= set(modules)
        assert modules == {path: (PACKAGE / path).read_bytes() for path in modules}
        # Nothing else: no pickles, no caches.
        assert all(path.endswith((".py", ".json", ".safetensors", ".md", ".gitattributes")) for path in files)


def test_without_the_package_a_pushed_language_model_is_the_same(bare):
    assert not bare["package"]
    assert bare["language model's source"] == "transformers_modules"
    assert bare["language model"] and bare["base model"]
    assert bare["written"] == len(TEXTS[0].split()) + 4


def test_without_the_package_a_pushed_language_model_takes_a_new_head(bare):
    assert bare["new head"] == ["score.weight"]
    assert bare["new head's shape"] == [2, 5]
    assert bare["new head's base"]


def test_without_the_package_pushed_classifiers_answer_the_same(bare, published):
    assert bare["classifiers"]
    answers = torch.tensor([[row[f"LABEL_{i}"] for i in range(3)] for row in bare["pipeline"]])
    # The pipeline passes one text at a time, whose sums have another order than a padded batch's.
    torch.testing.assert_close(answers, published["probabilities"], atol=1e-5, rtol=1e-5)


def test_without_the_package_a_head_on_a_model_of_ours_loads_from_a_folder(bare):
    assert bare["from a folder"]


def test_without_the_package_and_without_trust_a_model_is_refused(bare):
    for auto_class in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        assert "trust_remote_code=True" in bare[f"refusal of {auto_class}"]


def test_without_the_package_a_loaded_model_is_pushed_with_its_code(bare, hub, published):
    assert bare["pushed on"]
    assert modules_of(hub.files(bare["other"])) == modules_of(hub.files(published["lm"]))


def test_an_older_revision_loads_after_an_update(bare):
    assert bare["old revision"] and not bare["new revision"]


def test_a_cached_model_loads_offline_without_the_package(load, bare, bare_python, hub_home):
    result = load(OFFLINE, python=bare_python, HF_HOME=hub_home, HF_HUB_OFFLINE=1)
    assert result == {"model": True, "classifiers": True, "other": result["other"]}


def test_a_damaged_file_in_the_cache_is_named(load, bare, bare_python, hub_home, published, tmp_path):
    home = shutil.copytree(hub_home, tmp_path / "home", symlinks=True)
    [weights] = (home / "hub").glob(f"models--{published['lm'].replace('/', '--')}/snapshots/*/model.safetensors")
    os.truncate(weights, weights.stat().st_size - 10)
    message = load(DAMAGED, python=bare_python, HF_HOME=home, HF_HUB_OFFLINE=1)["message"]
    assert f"{weights} is truncated or damaged" in message and "deleted first" in message


def test_with_the_package_no_trust_is_needed_and_given_trust_does_no_harm(load):
    result = load(PACKAGE_FIRST, token=READ_TOKEN)
    assert result["plain's source"] == result["classifiers' source"] == "modeling_grassmann"
    assert result["plain"] and result["remote"] and result["again"]
    assert result["classifiers"] and result["remote classifiers"]


def test_importing_the_package_after_remote_code_does_no_harm(load):
    result = load(REMOTE_FIRST)
    assert result["remote's source"] == "transformers_modules"
    assert result["plain's source"] == result["classifiers' source"] == "modeling_grassmann"
    assert result["remote"] and result["plain"] and result["again"] and result["pushed on"]
    assert result["classifiers"] and result["remote classifiers"]


def test_a_users_own_trainer_publishes_models_that_load_without_the_package(bare, hub, published):
    assert bare["trained"] == {name: [True, True] for name in published["trained"]}
    for name, (strategy, _) in published["trained"].items():
        files = hub.files(name)
        assert {"model.safetensors", "tokenizer.json"} <= set(files)
        assert modules_of(files) == {path: (PACKAGE / path).read_bytes() for path in modules_of(files)} != {}
        titles = [commit.title for commit in hub.repositories[name].commits.values()]
        assert ("Training in progress, step 1" in titles) == (strategy == "every_save")
