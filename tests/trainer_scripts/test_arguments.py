import json

import pytest
import run_clm
import yaml
from arguments import UserError, exits_on_user_error, local_copy, parse, resolve


RECIPE = {"model_type": "gpt2", "learning_rate": 1e-4, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "do_eval": True}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def parse_run_clm(*argv):
    return parse(run_clm.ARGUMENTS, [str(value) for value in argv])


def test_fields_of_the_recipes_model_that_a_flag_leaves_out_are_named(recipe, caplog):
    recipe.write_text("config_name: a\nconfig_overrides: {dropout: 0.2}\n")
    assert parse_run_clm(recipe, "--config_name=b")[0].config_overrides is None
    (message,) = [record.getMessage() for record in caplog.records]
    assert all(part in message for part in (str(recipe), "--config_name", 'config_overrides: {"dropout": 0.2}'))
    caplog.clear()
    # A saved model has its fields with it.
    assert parse_run_clm(recipe, "--model_name_or_path=b")[0].config_overrides is None
    assert parse_run_clm(recipe, "--config_name=b", '--config_overrides={"n_embd": 8}')[0].config_overrides
    assert parse_run_clm(recipe, "--seed=7")[0].config_overrides == {"dropout": 0.2}
    assert not caplog.records


def test_flags_override_the_recipe_and_the_rest_stands(recipe):
    model, _, training, _ = parse_run_clm(recipe, "--learning_rate", "1e-3", "--seed=7", "--config_overrides={}")
    assert (training.learning_rate, training.seed, training.do_eval, model.model_type) == (1e-3, 7, True, "gpt2")
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert model.config_overrides == {}


def test_flags_replace_the_alternatives_that_the_recipe_names(recipe):
    recipe.write_text(
        "config_name: a\nconfig_overrides: {n_embd: 8}\ntokenizer_name: b\ndataset_name: c\ndataset_config_name: d\n"
    )
    model, data, *_ = parse_run_clm(recipe, "--model_name_or_path=x", "--train_file", "y.txt")
    assert (model.model_name_or_path, model.config_name, model.config_overrides) == ("x", None, None)
    assert (model.tokenizer_name, data.dataset_name, data.dataset_config_name) == (None, None, None)
    model, data, *_ = parse_run_clm(recipe, "--dataset_name=e", "--tokenizer_name=f")
    assert (model.config_name, model.config_overrides, model.tokenizer_name) == ("a", {"n_embd": 8}, "f")
    assert (data.dataset_name, data.dataset_config_name) == ("e", None)


def test_numbers_in_exponent_notation_are_numbers(recipe):
    recipe.write_text(
        "model_type: gpt2\nlearning_rate: 1e-3\nlr_scheduler_kwargs: {min_lr_rate: 1e-1}\nadam_epsilon: -1e-9\n"
    )
    training = parse_run_clm(recipe)[2]
    assert (training.learning_rate, training.adam_epsilon) == (1e-3, -1e-9)
    assert training.lr_scheduler_kwargs["min_lr_rate"] == 0.1


def test_lists_are_read_where_lists_are_allowed(recipe):
    recipe.write_text("model_type: gpt2\nreport_to: [tensorboard]\nlabel_names: [labels]\n")
    training = parse_run_clm(recipe)[2]
    assert (training.report_to, training.label_names) == (["tensorboard"], ["labels"])


def test_resolved_recipe_gives_the_same_arguments(recipe, tmp_path):
    argv = [recipe, "--seed=3", "--save_strategy=no", "--report_to=tensorboard", '--config_overrides={"n_embd": 8}']
    argv = [str(value) for value in argv]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolve(run_clm.ARGUMENTS, argv)))
    assert yaml.safe_load(again.read_text())["config_overrides"] == {"n_embd": 8}
    for first, second in zip(parse_run_clm(*argv), parse_run_clm(again)):
        assert vars(first).keys() == vars(second).keys()
        assert json.dumps(vars(first), default=str) == json.dumps(vars(second), default=str)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1\n", ["learning_rat", "learning_rate"]),
        ("learning_rate: fast\n", ["--learning_rate", "fast"]),
        ("learning_rate: [1, 2]\n", ["learning_rate", "single value"]),
        ("learning_rate: {a: 1}\n", ["learning_rate", "single value"]),
        ("eval_strategy: often\n", ["--eval_strategy", "often", "epoch"]),
        ("- a\n- b\n", ["mapping", "list"]),
        ("", ["mapping"]),
        ("a: [\n", ["not valid YAML"]),
        ("seed: 1\nseed: 2\n", ["not valid YAML", "seed is given twice"]),
    ],
)
def test_mistakes_in_a_recipe_name_the_file_and_the_key(recipe, text, words):
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        parse_run_clm(recipe)
    for word in [str(recipe), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.yaml"], ["missing.yaml", "No such file"]),
        (["--lerning_rate=1"], ["--lerning_rate", "learning_rate"]),
        (["--model_type=gpt2", "--learning_rate=fast"], ["--learning_rate", "fast"]),
        (["--model_type=gpt2", "--config_overrides={"], ["config_overrides", "JSON"]),
        (["--model_type=gpt2", "--config_overrides=[1]"], ["config_overrides", "mapping"]),
        (["--do_train"], ["model_name_or_path", "config_name", "model_type"]),
        (["--model_type=gpt2", "--dataset_name=x", "--train_file=y.txt"], ["dataset_name", "train_file"]),
        (["--model_type=gpt2", "--block_size=1"], ["block_size=1", "2"]),
    ],
)
def test_mistakes_in_flags_name_the_flag(argv, words):
    with pytest.raises(UserError) as error:
        parse_run_clm(*argv)
    for word in words:
        assert word in str(error.value)


def test_local_copies_stand_in_for_exactly_their_hub_ids(tmp_path, monkeypatch):
    (tmp_path / "wikitext-2").mkdir()
    monkeypatch.delenv("GRASSMANN_DATA_DIR", raising=False)
    assert local_copy("Salesforce/wikitext", "wikitext-2-v1") is None
    monkeypatch.setenv("GRASSMANN_DATA_DIR", str(tmp_path))
    assert local_copy("Salesforce/wikitext", "wikitext-2-v1") == str(tmp_path / "wikitext-2")
    assert local_copy("Salesforce/wikitext", "wikitext-103-v1") is None
    assert local_copy("openai-community/gpt2") is None
    monkeypatch.setenv("GRASSMANN_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="GRASSMANN_DATA_DIR"):
        local_copy("openai-community/gpt2")


def test_an_interrupt_by_the_keyboard_ends_in_one_line(capsys):
    @exits_on_user_error
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
