from pathlib import Path

import pytest
import run_clm
import run_nli
import torch
import yaml
from arguments import parse
from models import add_dropout
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel, DistilBertConfig, DistilBertModel


REPOSITORY = Path(__file__).parents[2]
WIKITEXT = sorted((REPOSITORY / "configuration/wikitext2").glob("*.yaml"))
MEMORY = sorted((REPOSITORY / "configuration/wikitext2_memory").glob("*.yaml"))
RECIPES = [*WIKITEXT, *MEMORY, REPOSITORY / "configuration/quickstart/stdlib_docs.yaml"]
SNLI = sorted((REPOSITORY / "configuration/snli").glob("*.yaml"))
# The published sizes of the encoders that the recipes build on.
BACKBONES = {
    "distilbert/distilbert-base-uncased": lambda: DistilBertModel(DistilBertConfig()),
    "sentence-transformers/all-MiniLM-L6-v2": lambda: BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    ),
}
# Recipes whose learning rate differs from that of their group.
TUNED = {"distilbert_grassmann_tuned_frozen": 1e-3, "grassmann_scratch_causal": 1.2e-3}
BASELINES = {"gpt2": 12.6e6, "gpt-neox": 12.6e6, "stablelm": 12.6e6, "llama": 12.6e6}


class BertVocabulary:
    """What `load_config` asks of a tokenizer, without the download."""

    pad_token_id, bos_token_id, eos_token_id = 0, None, None

    def __len__(self):
        return 30522


class AnyTokenizer:
    """What `check_max_length` asks of a tokenizer."""

    def num_special_tokens_to_add(self, pair):
        return 3


def build(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_its_model_builds(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for package in yaml.safe_load(recipe.read_text()).get("import_packages", []):
        pytest.importorskip(package, reason=f"{package} is missing: the extra `bench`")
    model_args, data_args, training_args, _ = parse(run_clm.ARGUMENTS, [str(recipe), "--use_cpu"])
    config = run_clm.load_config(model_args, BertVocabulary())
    model = build(config)
    assert run_clm.choose_block_size(data_args, model) == data_args.block_size
    assert model.get_output_embeddings().weight.shape[0] == (30528 if recipe in MEMORY else 30522)
    assert training_args.do_train and training_args.do_eval


@pytest.mark.parametrize("paths", [WIKITEXT, MEMORY], ids=["published", "memory"])
def test_recipes_differ_only_in_the_model_and_the_output_folder(paths):
    recipes = [yaml.safe_load(path.read_text()) for path in paths]
    for recipe in recipes:
        for name in ("config_name", "config_overrides", "added_dropout", "import_packages", "output_dir"):
            recipe.pop(name, None)
        assert recipe == recipes[0]


@pytest.mark.parametrize("recipe", MEMORY, ids=lambda path: path.stem)
def test_models_with_a_memory_and_their_peers_are_of_one_size(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for package in yaml.safe_load(recipe.read_text()).get("import_packages", []):
        pytest.importorskip(package, reason=f"{package} is missing: the extra `bench`")
    model_args = parse(run_clm.ARGUMENTS, [str(recipe), "--use_cpu"])[0]
    # Those of StableLM with that vocabulary.
    assert build(run_clm.load_config(model_args, BertVocabulary())).num_parameters() == pytest.approx(
        12_564_992, rel=1e-3
    )


@pytest.mark.parametrize("recipe", MEMORY, ids=lambda path: path.stem)
def test_recorded_runs_are_those_of_the_recipes(recipe, monkeypatch):
    record = REPOSITORY / "model_cards/wikitext2_memory" / f"{recipe.stem}_seed0" / "recipe.yaml"
    if not record.exists():
        pytest.skip(f"there is no record of {recipe.stem} yet")
    monkeypatch.chdir(REPOSITORY)
    asked, recorded = (parse(run_clm.ARGUMENTS, [str(path), "--use_cpu"]) for path in (recipe, record))
    configs = [run_clm.load_config(model_args, BertVocabulary()).to_dict() for model_args, *_ in (asked, recorded)]
    assert configs[0] == configs[1]
    assert asked[0].added_dropout == recorded[0].added_dropout
    for name in yaml.safe_load(recipe.read_text()).keys() & vars(asked[2]).keys():
        # How it was stored and shown, and how fast it was computed, is another matter.
        if name not in ("output_dir", "report_to", "save_total_limit"):
            assert getattr(asked[2], name) == getattr(recorded[2], name), name


def load_classifier(recipe, monkeypatch):
    """Arguments of a recipe and its classifier without weights, the published encoders replaced by new ones."""
    arguments = parse(run_nli.ARGUMENTS, [str(recipe), "--use_cpu"])
    from_backbone = run_nli.GrassmannPluckerForSequenceClassification.from_backbone
    make = BACKBONES.get(arguments[0].backbone_name_or_path)
    monkeypatch.setattr(
        run_nli.GrassmannPluckerForSequenceClassification,
        "from_backbone",
        lambda name, options, **fields: from_backbone(make(), **fields),
    )
    with torch.device("meta"):
        return arguments, run_nli.load_classifier(arguments[0], BertVocabulary(), arguments[1].class_names)


@pytest.mark.parametrize("recipe", SNLI, ids=lambda path: path.stem)
def test_classifier_recipe_parses_and_its_model_builds(recipe, monkeypatch):
    (_, data_args, training_args), model = load_classifier(recipe, monkeypatch)
    run_nli.check_arguments(training_args)
    run_nli.check_max_length(data_args, AnyTokenizer(), run_nli.usable_positions(model))
    assert list(model.config.id2label.values()) == ["entailment", "neutral", "contradiction"]
    assert training_args.do_train and training_args.do_eval and training_args.do_predict
    assert training_args.output_dir == f"runs/snli/{recipe.stem}"
    assert (training_args.head_learning_rate is None) or hasattr(model, "backbone")
    frozen = recipe.stem.endswith("_frozen")
    backbone, head = model.num_parameters() - (run_nli.head_parameters(model) or 0), run_nli.head_parameters(model)
    assert model.num_parameters(only_trainable=True) == (head if frozen else model.num_parameters())
    assert (head is None) == ("scratch" in recipe.stem)
    assert backbone > 10e6


def test_classifier_recipes_differ_only_in_what_they_compare():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in SNLI}
    # These were tuned: their rates are the best of several.
    rates = {name: float(recipes[name].pop("learning_rate")) for name in TUNED}
    assert rates == TUNED
    groups = [
        [recipe for name, recipe in recipes.items() if name.endswith("_frozen")],
        [recipe for recipe in recipes.values() if "head_learning_rate" in recipe],
        [recipe for name, recipe in recipes.items() if "scratch" in name],
    ]
    assert [len(group) for group in groups] == [8, 6, 3]
    for group in groups:
        common = next(recipe for recipe in group if "learning_rate" in recipe)
        for recipe in group:
            recipe.setdefault("learning_rate", common["learning_rate"])
            for name in ("backbone_name_or_path", "model_type", "config_overrides", "output_dir"):
                recipe.pop(name, None)
        assert all(recipe == common for recipe in group)


def test_models_from_scratch_are_of_one_size(monkeypatch):
    folder = REPOSITORY / "configuration/snli"
    names = ["bert_scratch", "grassmann_scratch", "grassmann_scratch_causal"]
    sizes = [load_classifier(folder / f"{name}.yaml", monkeypatch)[1].num_parameters() for name in names]
    assert sizes[1:] == pytest.approx(sizes[:1] * 2, rel=0.03)


def test_overridden_number_of_layers_gets_its_own_default_offsets():
    folder = str(REPOSITORY / "configuration/models/grassmann-6l")
    model_args = run_clm.ModelArguments(config_name=folder, config_overrides={"num_hidden_layers": 3})
    assert len(run_clm.load_config(model_args, BertVocabulary()).layer_offsets) == 3


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_have_the_size_of_the_paper_and_its_settings(name):
    small, large = (AutoConfig.from_pretrained(REPOSITORY / f"configuration/models/{name}-{n}l") for n in (6, 12))
    assert build(small).num_parameters() == pytest.approx(BASELINES[name], rel=0.01)
    assert build(large).num_parameters() == pytest.approx(17.3e6, rel=0.01)
    assert (small.num_hidden_layers, large.num_hidden_layers) == (6, 12)
    assert (small.hidden_size, small.num_attention_heads, small.max_position_embeddings) == (256, 4, 256)
    assert small.tie_word_embeddings


@pytest.mark.parametrize("name", ["gpt-neox-6l", "stablelm-6l", "llama-6l"])
def test_rotary_baselines_rotate_whole_heads(name):
    model = build(AutoConfig.from_pretrained(REPOSITORY / "configuration/models" / name))
    rotary = next(module for path, module in model.named_modules() if path.endswith("rotary_emb"))
    assert rotary.inv_freq.shape == (256 // 4 // 2,)
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    # Llama has none: its recipe adds it.
    assert set(dropouts) <= {0.1, 0.0} and (0.1 in dropouts) == (name != "llama-6l")


@pytest.mark.parametrize("name", ["gla", "mamba2"])
def test_models_of_flash_linear_attention_have_the_baselines_size_and_added_dropout(name):
    pytest.importorskip("fla", reason="flash-linear-attention is missing: the extra `bench`")
    small, large = (AutoConfig.from_pretrained(REPOSITORY / f"configuration/models/{name}-{n}l") for n in (6, 12))
    assert build(small).num_parameters() == pytest.approx(12_563_456, rel=0.001)
    assert build(large).num_parameters() == pytest.approx(17_312_768, rel=0.001)
    model = build(small)
    add_dropout(model, 0.1)
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    # The embedding; of each layer of GLA the mixer, the network and inside of it; of Mamba-2 the mixer alone.
    assert len(hooked) == 1 + {"gla": 3 * 6, "mamba2": 11}[name]
