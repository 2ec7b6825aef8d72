"""A model card says what the run's files say, all of it, and nothing else."""

import json
import re
import shutil

import pytest
from arguments import UserError
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from model_card import load_record, main, make_card, summary, write_card
from run_records import MISSING, load_run
from transformers import AutoConfig


RECORDED = sorted(path.parent for path in (REPOSITORY / "model_cards").rglob("metrics.json"))


def content(card):
    return str(card).strip() + "\n"


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", content(card), flags=re.DOTALL | re.MULTILINE).group(1)


def cells(table):
    """Rows of a Markdown table, without its rule."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [row for row in rows if not set(row[0]) <= {"-", " "}]


@pytest.fixture
def run(tmp_path):
    """A copy of a recorded run, on its own."""
    return shutil.copytree(REPOSITORY / "model_cards" / "wikitext2_grassmann_6l_pre", tmp_path / "run")


def test_every_recorded_run_has_the_card_that_its_files_give():
    assert len(RECORDED) > 90
    for folder in RECORDED:
        assert (folder / "README.md").read_text(encoding="utf-8") == content(make_card(load_record(folder))), folder


def test_every_metric_and_no_other_figure_is_in_the_table_and_in_the_metadata():
    for folder in RECORDED:
        record = load_record(folder)
        card = make_card(record)
        metrics = json.loads((folder / "metrics.json").read_text())
        expected = {key: value for key, value in metrics.items() if re.match("(eval|test)_(loss|perpl|accur)", key)}

        header, *rows = cells(section(card, "Evaluation"))
        figures = {}
        for name, *values in rows:
            for column, value in zip(header[1:], values):
                if "," not in column and value != MISSING:
                    prefix = {"validation": "eval", "test": "test"}[column]
                    figures[f"{prefix}_{re.sub(' (on |in )?', '_', name)}"] = value
        assert figures.keys() == expected.keys()
        for key, shown in figures.items():
            figure = float(shown.rstrip("%")) / (100 if shown.endswith("%") else 1)
            assert figure == pytest.approx(expected[key], abs=0.005 if "perplexity" in key else 5.1e-5)

        results = ModelCard(content(card)).data.eval_results
        assert sorted(result.metric_value for result in results) == sorted(expected.values())
        assert all(result.task_type and result.dataset_type and result.dataset_split for result in results)


def test_a_baseline_stands_beside_each_metric(run, tmp_path):
    other = REPOSITORY / "model_cards" / "wikitext2_gpt2_6l"
    header, *rows = cells(section(make_card(load_record(run, other)), "Evaluation"))
    assert header[3:] == ["validation, `wikitext2_gpt2_6l`", "test, `wikitext2_gpt2_6l`"]
    metrics = load_run(other).metrics
    assert {row[0]: row[3:] for row in rows}["perplexity"] == [
        f"{metrics['eval_perplexity']:.2f}",
        f"{metrics['test_perplexity']:.2f}",
    ]
    # What the run's own folder says counts before what stands beside it.
    (tmp_path / "baselines.yaml").write_text("run: wikitext2_gpt2_6l\n")
    (run / "baseline.json").write_text('{"name": "bigram", "eval_perplexity": 300.125}')
    header, *rows = cells(section(make_card(load_record(run)), "Evaluation"))
    assert header[3:] == ["validation, `bigram`", "test, `bigram`"]
    assert {row[0]: row[3:] for row in rows} == {"loss": ["—", "—"], "perplexity": ["300.12", "—"]}


def test_a_run_without_baseline_or_evaluation_says_so(run):
    assert "No baseline was recorded" in section(make_card(load_record(run)), "Evaluation")
    metrics = {key: value for key, value in load_run(run).metrics.items() if not key.startswith(("eval", "test"))}
    (run / "metrics.json").write_text(json.dumps(metrics))
    card = make_card(load_record(run))
    assert "has not been evaluated" in section(card, "Evaluation")
    assert card.data.eval_results is None and "model-index" not in content(card)
    for name in ("metrics.json", "recipe.yaml", "log.jsonl"):
        (run / name).unlink()
    card = make_card(load_record(run))
    assert "Nothing was recorded" in section(card, "Training")
    assert "do not say" in section(card, "Model")


def test_an_undefined_metric_is_shown_and_kept_out_of_the_metadata(run):
    metrics = load_run(run).metrics | {"eval_perplexity": float("nan"), "test_perplexity": float("inf")}
    (run / "metrics.json").write_text(json.dumps(metrics))
    card = make_card(load_record(run))
    assert {row[0]: row[1:] for row in cells(section(card, "Evaluation"))}["perplexity"] == ["nan", "inf"]
    assert {result.metric_type for result in card.data.eval_results} == {"loss"}


def test_facts_of_the_run_are_in_the_card(run):
    card = make_card(load_record(run), license="mit")
    training = dict(cells(section(card, "Training")))
    assert training["hardware"] == "1 x NVIDIA H200"
    assert training["random seed"] == "0"
    assert training["parameters"] == "12,643,008"
    assert "torch 2.11.0+cu130" in training["versions"]
    assert (run / "recipe.yaml").read_text().strip() in section(card, "Training")
    assert card.data.license == "mit" and "The weights: mit" in section(card, "Licence")
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert "the 43 before it" in section(card, "Limits")


def test_files_of_this_machine_are_no_data_set_or_base_model_of_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "encoder").mkdir(parents=True)
    (run / "recipe.yaml").write_text("backbone_name_or_path: my/encoder\ntrain_file: /home/me/secret/pairs.csv\n")
    card = make_card(load_record(run), repo_id="user/name")
    assert card.data.base_model is None and card.data.datasets is None
    assert dict(cells(section(card, "Training")))["data"] == "`pairs.csv`"
    assert "/home/me" not in content(card)
    # Elsewhere, later, the folder is not there, and the run's own word counts.
    monkeypatch.chdir("/")
    assert make_card(load_record(run), repo_id="user/name").data.base_model is None
    metrics = json.loads((run / "metrics.json").read_text())
    for folders, expected in ((["backbone_name_or_path"], None), ([], "my/encoder")):
        (run / "metrics.json").write_text(json.dumps(metrics | {"folders": folders}))
        assert make_card(load_record(run), repo_id="user/name").data.base_model == expected
    (run / "recipe.yaml").write_text("dataset_name: my/data\n")
    for folders, expected in ((["dataset_name"], None), ([], ["my/data"])):
        (run / "metrics.json").write_text(json.dumps(metrics | {"folders": folders}))
        assert make_card(load_record(run), repo_id="user/name").data.datasets == expected


def test_names_of_classes_do_not_break_the_table(run):
    metrics = {"max_length": 9, "eval_accuracy": 0.5, "eval_accuracy_yes | no *x* <b>\n": 0.25}
    (run / "metrics.json").write_text(json.dumps(metrics))
    rows = cells(section(make_card(load_record(run)), "Evaluation"))
    assert rows[-1] == [r"accuracy on yes \| no \*x\* \<b\>", "25.00%"]


def test_what_was_not_recorded_or_measured_is_not_claimed(run):
    assert "the table above" in section(make_card(load_record(run)), "Limits")
    for name in ("metrics.json", "recipe.yaml"):
        (run / name).unlink()
    limits = section(make_card(load_record(run)), "Limits")
    assert "was not recorded" in limits and "above" not in limits


def test_the_epoch_of_the_weights_is_named_only_where_the_best_were_kept(run):
    assert "epoch of the weights, the best by validation" in section(make_card(load_record(run)), "Training")
    recipe = (run / "recipe.yaml").read_text().replace("load_best_model_at_end: true", "load_best_model_at_end: false")
    (run / "recipe.yaml").write_text(recipe)
    assert "epoch of the weights" not in section(make_card(load_record(run)), "Training")


def test_a_baseline_that_is_not_there_yet_counts_as_none(run, tmp_path):
    (tmp_path / "baselines.yaml").write_text("run: not_trained_yet\n")
    assert "No baseline was recorded" in section(make_card(load_record(run)), "Evaluation")


@pytest.mark.parametrize("content", ["- a\n- b\n", "{", "just text"])
def test_a_file_of_baselines_that_is_no_mapping_is_named(content, run, tmp_path):
    (tmp_path / "baselines.yaml").write_text(content)
    with pytest.raises(UserError, match=r"baselines\.yaml"):
        load_record(run)


def test_a_card_says_no_more_of_a_model_than_is_so():
    for name, words, others in [
        ("snli_distilbert_linear_seed0", ["linear head"], ["tags:", "attention-free", "2512.19428)", "alone"]),
        ("snli_distilbert_grassmann_seed0", ["Grassmann-Plücker head"], ["attention-free", "alone"]),
        ("snli_grassmann_scratch_causal_seed0", ["Causal Grassmann", "attention-free"], ["The context is local"]),
        ("snli_grassmann_scratch_seed0", ["bidirectional Grassmann"], ["The context is local"]),
        ("wikitext2_gpt2_6l", ["`gpt2` model", "alone"], ["tags:"]),
        (
            "recall_values/grassmann_memory_seed0",
            ["for recall of values by their keys", "`recall_data.py`, seed", "run_recall.py"],
            ["type: local files", "Perplexity is", "2_pairs", "2\\_pairs"],
        ),
    ]:
        card = (REPOSITORY / "model_cards" / name / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in words), name
        assert not [word for word in others if word in card], name


PAIRS = "pairs of tokens are encoded as planes"
PLANES = "the similarity of planes on a Grassmann manifold"


@pytest.mark.parametrize(
    ("overrides", "words", "others"),
    [
        ({}, [PAIRS, "Plücker coordinates"], ["memories", "kernel", "in some layers"]),
        ({"mixer_types": "memory"}, ["memories", PLANES, "`binet_cauchy`"], [PAIRS, "Plücker", "in some layers"]),
        ({"mixer_types": "memory", "memory_kernel": "projection"}, [PLANES, "`projection`"], [PAIRS]),
        ({"mixer_types": "memory", "memory_kernel": "inner"}, ["the inner product of vectors"], ["planes"]),
        ({"mixer_types": "memory", "memory_kernel": "inner_squared"}, ["the squared inner product"], ["planes"]),
        ({"mixer_types": [*["memory"] * 5, "plucker"]}, [PAIRS, "in some layers", "memories", PLANES], []),
    ],
)
def test_a_card_says_what_the_layers_mix_tokens_with(overrides, words, others, run):
    overrides = {"norm_placement": "pre", **overrides}
    (run / "recipe.yaml").write_text(json.dumps({"model_type": "grassmann", "config_overrides": overrides}))
    text = summary(load_record(run))
    assert all(word in text for word in ["Causal Grassmann", "no attention", "linear in length", *words]), text
    assert not [word for word in others if word in text], text


ENCODER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (AutoConfig.for_model("gpt2", n_positions=32), 32),
        (AutoConfig.for_model("grassmann", max_position_embeddings=32), 32),
        (AutoConfig.for_model("grassmann", max_position_embeddings=None), None),
        (AutoConfig.for_model("bert", max_position_embeddings=32, **ENCODER), 32),
        # They count positions from the one after that of padding.
        (AutoConfig.for_model("roberta", max_position_embeddings=34, pad_token_id=1, **ENCODER), 32),
        # Rotary positions and those of a recurrence have no table.
        *[
            (AutoConfig.for_model(name, max_position_embeddings=32, vocab_size=9, pad_token_id=0, **ENCODER), None)
            for name in ("gpt_neox", "llama", "stablelm", "modernbert")
        ],
        (AutoConfig.for_model("jamba", max_position_embeddings=32, vocab_size=9, **ENCODER), None),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_card_says_how_long_a_text_may_be_where_a_position_table_ends(config, limit, run):
    sentence = f"It takes no text of more than {limit} tokens."
    models = [config]
    if config.model_type in ("bert", "roberta"):
        models.append(AutoConfig.for_model("grassmann_plucker", backbone_config=config.to_dict()))
    for model in models:
        (run / "config.json").write_text(json.dumps(model.to_dict()))
        text = section(make_card(load_record(run)), "Limits")
        assert sentence in text if limit else "tokens." not in text, text


def test_a_card_claims_no_length_that_the_files_do_not_tell(run):
    # The tokenizer decides where its positions start.
    (run / "recipe.yaml").write_text("model_type: roberta\n")
    assert "takes no text" not in section(make_card(load_record(run)), "Limits")
    # A package that is not imported here knows its positions.
    (run / "config.json").write_text('{"model_type": "other", "max_position_embeddings": 32}')
    (run / "recipe.yaml").write_text("import_packages: [other]\n")
    assert "takes no text" not in section(make_card(load_record(run)), "Limits")


def test_a_card_of_a_grassmann_model_whose_recipe_imports_another_package_too(run):
    card = content(make_card(load_record(run)))
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(f"{recipe}import_packages: [other]\n")
    assert content(make_card(load_record(run))).splitlines()[:12] == card.splitlines()[:12]


def test_the_command_writes_the_cards_and_names_a_folder_that_is_no_run(run, tmp_path, capsys):
    main([str(run)])
    assert (run / "README.md").read_text(encoding="utf-8") == content(make_card(load_record(run)))
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path)])
    assert exit.value.code == 2
    assert f"{tmp_path} is not the folder of a run" in capsys.readouterr().err


def test_a_card_in_the_place_of_another_is_written_whole(run):
    write_card(run, load_record(run), repo_id="user/name")
    write_card(run, load_record(run))
    assert (run / "README.md").read_text(encoding="utf-8") == content(make_card(load_record(run)))
