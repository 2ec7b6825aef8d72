"""The README is a promise: what it says can be pasted, and its figures are those of the recorded runs."""

import json
import re

import heads
import mixer
import processes
import pytest
import report_by_position
import report_recall
from conftest import REPOSITORY
from report_clm import find_baseline, load_step_times, results_table
from report_nli import compare, comparison_table
from report_nli import results_table as classifier_table
from run_records import group_runs, load_run


STEP_TIMES = REPOSITORY / "benchmarks" / "results" / "training_steps_h200.json"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = ["gpt2_6l", "gpt_neox_6l", "stablelm_6l", "grassmann_6l_pre", "grassmann_6l_post"]
RESULTS += ["grassmann_6l_pre_all_offsets"]
WITH_MEMORY = ["paper_mixer", "gpt2", "gpt_neox", "stablelm", "llama_dropout", "gla", "mamba2", "inner_r16"]
WITH_MEMORY += ["inner_squared_r16", "inner_squared_r24", "inner_squared_r32", "inner_r20_3heads"]
WITH_MEMORY += ["inner_squared_r20_3heads", "inner_squared_r40_3heads", "projection_r8", "projection_r16"]
WITH_MEMORY += ["memory_r8", "memory_r10", "memory_r10_3heads", "memory_r12", "memory_r16"]
DISTILBERT = ["grassmann", "transformer", "linear", "grassmann_frozen", "transformer_frozen", "linear_frozen"]
DISTILBERT += ["grassmann_tuned_frozen", "grassmann_without_features_frozen"]
CLASSIFIERS = [f"snli_distilbert_{name}" for name in DISTILBERT]
CLASSIFIERS += ["snli_grassmann_scratch", "snli_grassmann_scratch_causal", "snli_bert_scratch"]
COMPARISONS = [
    ("snli_distilbert_grassmann", "snli_distilbert_transformer"),
    ("snli_distilbert_grassmann_frozen", "snli_distilbert_transformer_frozen"),
    ("snli_distilbert_grassmann_tuned_frozen", "snli_distilbert_transformer_frozen"),
    ("snli_distilbert_grassmann_frozen", "snli_distilbert_grassmann_without_features_frozen"),
    ("snli_grassmann_scratch", "snli_bert_scratch"),
]


@pytest.fixture(scope="module")
def quickstarts(tmp_path_factory, run_python):
    """Folder with what both quickstarts leave behind, from a few steps instead of minutes."""
    folder = tmp_path_factory.mktemp("quickstarts")
    for script, recipe, name in (
        ("run_clm.py", "stdlib_docs", "quickstart"),
        ("run_nli.py", "entailment_pairs", "quickstart_nli"),
    ):
        options = ["--max_train_samples=16", "--max_eval_samples=4", "--num_train_epochs=1", "--report_to=none"]
        recipe = f"configuration/quickstart/{recipe}.yaml"
        output = f"--output_dir={folder / 'runs' / name}"
        training = run_python(f"trainer_scripts/{script}", recipe, *options, output)
        assert training.returncode == 0, training.stderr
    return folder


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def paste(blocks, folder, run_python):
    tour = run_python("-c", f"import os; os.chdir({str(folder)!r})\n" + "\n".join(blocks))
    assert tour.returncode == 0, tour.stderr
    return tour.stdout


def test_the_tour_works_when_pasted(quickstarts, run_python):
    blocks = python_blocks(README)
    assert len(blocks) >= 6
    printed = paste(blocks, quickstarts, run_python)
    assert "12,639,936 parameters" in printed
    assert "torch.Size([2, 10, 64])" in printed
    assert "'label': 'contradiction'" in printed


def test_the_page_about_tools_works_when_pasted(quickstarts, run_python):
    for package in ("peft", "trl", "onnxscript", "onnxruntime", "torchao"):
        pytest.importorskip(package, reason=f"{package} is missing: an extra of this package")
    blocks = python_blocks((REPOSITORY / "docs" / "tools.md").read_text(encoding="utf-8"))
    # The task of that example comes from the Hub.
    local = [block for block in blocks if "lambada_openai" not in block]
    assert len(local) == len(blocks) - 1 >= 8
    assert paste([*local, "print(logits.shape)"], quickstarts, run_python).endswith("(2, 16, 2048)\n")


def test_the_two_set_up_commands_come_first_and_exist():
    assert re.search(r"```bash\n(.*?)```", README, flags=re.DOTALL).group(1) == "make quickstart\nmake test\n"
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)


def test_files_that_the_documents_name_exist():
    text = README + (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text += "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))
    names = re.findall(
        r"(?:configuration|trainer_scripts|benchmarks|model_cards|docs|modeling_grassmann)/[\w./-]*", text
    )
    missing = {name for name in names if not (REPOSITORY / name.rstrip(".")).exists()}
    assert len(names) > 10
    # Forms that stand for many files, such as run_<task>.py.
    assert missing <= {"trainer_scripts/run_"}


def language_models(folders, baseline, parent):
    groups = group_runs([load_run(folder) for folder in folders])
    return results_table(list(groups.values()), find_baseline(groups, baseline), REPOSITORY / parent)


@pytest.mark.parametrize(("document", "parent"), [("README.md", "."), ("docs/wikitext2.md", "docs")])
def test_the_results_are_those_of_the_recorded_runs(document, parent):
    folders = [REPOSITORY / "model_cards" / f"wikitext2_{name}" for name in RESULTS]
    table = language_models(folders, "wikitext2_gpt2_6l", parent)
    assert table in (REPOSITORY / document).read_text(encoding="utf-8")


def test_the_results_of_models_with_a_memory_are_those_of_the_recorded_runs():
    records = REPOSITORY / "model_cards" / "wikitext2_memory"
    folders = [folder for name in WITH_MEMORY for folder in sorted(records.glob(f"{name}_seed?"))]
    assert language_models(folders, "gpt_neox", ".") in README


PAGES = [
    ("wikitext2_memory", "*", "gpt_neox"),
    ("wikitext2_memory_12l", "*", "gpt_neox_12l"),
    ("wikitext2_memory_tuning", "*", None),
    ("wikitext2_factors", "*_6l_L128", "wikitext2_transformer_6l_L128"),
    ("wikitext2_factors", "*_12l_L256", "wikitext2_transformer_12l_L256"),
    ("wikitext2_factors_6l_L256", "*_6l_L256", "wikitext2_transformer_stronger_6l_L256"),
    ("wikitext2_gpt2_vocabulary", "*", "wikitext2_gpt2_vocabulary_transformer_6l_L256"),
]


@pytest.mark.parametrize(("name", "models", "baseline"), PAGES)
def test_pages_of_runs_hold_the_recorded_results(name, models, baseline):
    records = REPOSITORY / "model_cards" / name.removesuffix("_6l_L256")
    groups = group_runs([load_run(folder) for folder in sorted(records.glob(f"{models}_seed?"))])
    times = load_step_times(STEP_TIMES) if name == "wikitext2_memory" else None
    table = results_table(list(groups.values()), find_baseline(groups, baseline), REPOSITORY / "docs", times)
    assert table in (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["values", "copying"])
def test_pages_of_recall_hold_the_recorded_results(task, tmp_path):
    records = sorted((REPOSITORY / "model_cards" / f"recall_{task}").glob("*_seed?"))
    report_recall.main([*map(str, records), "--output", str(tmp_path / f"recall_{task}")])
    found = (tmp_path / f"recall_{task}.md").read_text(encoding="utf-8")
    page = (REPOSITORY / "docs" / f"recall_{task}.md").read_text(encoding="utf-8")
    assert re.sub(r"\]\([^)]*/model_cards", "](../model_cards", found) == page


def test_the_page_about_length_holds_the_recorded_results(tmp_path):
    records = sorted((REPOSITORY / "model_cards" / "wikitext2_memory_length").glob("*/by_position.json"))
    report_by_position.main([*map(str, records), "--output", str(tmp_path / "wikitext2_memory_length")])
    page = (REPOSITORY / "docs" / "wikitext2_memory_length.md").read_text(encoding="utf-8")
    assert (tmp_path / "wikitext2_memory_length.md").read_text(encoding="utf-8") == page


def test_the_search_quotes_the_recorded_results():
    """Every perplexity in the table of the page, and in its line on 12 layers."""
    text = (REPOSITORY / "docs" / "search.md").read_text(encoding="utf-8")
    pages = [(REPOSITORY / "docs" / f"wikitext2_memory{suffix}.md").read_text() for suffix in ("", "_12l")]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:5] for page in pages for line in page.splitlines()}
    quoted = re.findall(r"^\| (?:\*\*)?(\w+)[:* ].*? \| ([\d.± ]+) \| ([\d.± ]+) \|", text, flags=re.MULTILINE)
    assert len(quoted) == 26
    for name, *figures in quoted:
        assert figures == rows[name], name
    deep = " ".join(
        re.search(r"12 layers, 17.3.*?\n\n", text, flags=re.DOTALL).group(0).replace("(test ", "(").split()
    )
    deep_rows = {name: figures for name, figures in rows.items() if figures and "_12l" in name}
    assert len(deep_rows) == 11
    for name, (validation, test) in deep_rows.items():
        assert f" {name.removesuffix('_12l')} {validation} ({test.strip(' |')})" in deep, name


def test_the_page_about_published_gaps_quotes_the_recorded_results():
    text = (REPOSITORY / "docs" / "published.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w.]+) \| ([\d.]+(?: ± [\d.]+)?) \| (\S+) \|$", text, flags=re.MULTILINE)
    page = (REPOSITORY / "docs" / "wikitext2_factors.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines()]
    recorded = {cells[0]: [cells[3], cells[5]] for cells in lines if len(cells) == 6}
    assert len(rows) == 24
    for name, *figures in rows:
        assert figures == recorded[name], name


def test_the_results_of_classifiers_are_those_of_the_recorded_runs():
    folders = [sorted((REPOSITORY / "model_cards").glob(f"{name}_seed?")) for name in CLASSIFIERS]
    groups = group_runs([load_run(folder) for group in folders for folder in group])
    assert list(groups) == CLASSIFIERS
    assert classifier_table(list(groups.values()), "test", REPOSITORY) in README
    comparisons = [compare(groups[first], groups[second], "test") for first, second in COMPARISONS]
    assert comparison_table(comparisons, "test") in README


def test_the_speed_of_the_heads_is_the_recorded_one():
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "heads_h200.json").read_text(encoding="utf-8"))
    assert heads.table(record["results"], record["head_parameters"]) in README


def test_the_comparison_of_processes_is_the_recorded_one():
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "processes_h200.json").read_text(encoding="utf-8"))
    assert processes.table(record) in (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_speed_of_the_mixer_is_the_recorded_one():
    record = json.loads((REPOSITORY / "benchmarks" / "results" / "mixer_cpu.json").read_text(encoding="utf-8"))
    assert mixer.table(record["results"]) in README
