"""A matrix runs each of its cells once, whatever happens to the cells or to the matrix on the way."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import matrix
import pytest
import run_clm
import run_matrix
import run_nli
import torch
import yaml
from arguments import UserError, parse, resolve
from checkpoints import checkpoints
from conftest import REPOSITORY
from run_records import group_runs, load_run
from test_recipes import BertVocabulary, build, load_classifier


PUBLISHED = REPOSITORY / "configuration/matrix/published.yaml"
FACTORS = REPOSITORY / "configuration/matrix/factors.yaml"
STRONGER = {"learning_rate", "weight_decay", "adam_beta2"}
DROPOUT = {"hidden_dropout", "embedding_dropout"}
GPT2_DROPOUT = {"resid_pdrop", "embd_pdrop"}
# Model of that matrix -> what it changes of `grassmann`, or of `transformer`.
CHANGES = {
    "grassmann_pre_norm": {"norm_placement"},
    "grassmann_all_offsets": {"offsets"},
    "grassmann_pre_norm_all_offsets": {"norm_placement", "offsets"},
    "grassmann_output_projection": {"mixer_out_proj"},
    "grassmann_large_weights": {"initializer_range"},
    "grassmann_stronger": STRONGER,
    "grassmann_strongest": STRONGER,
    "grassmann_pre_norm_stronger": {"norm_placement", *STRONGER},
    "grassmann_pre_norm_strongest": {"norm_placement", *STRONGER},
    "transformer_stronger": STRONGER,
    "transformer_strongest": STRONGER,
    **{f"grassmann_pre_norm_dropout{rate}": {"norm_placement", *DROPOUT} for rate in (0.2, 0.3)},
    **{f"grassmann_pre_norm_stronger_dropout{rate}": {"norm_placement", *STRONGER, *DROPOUT} for rate in (0.2, 0.3)},
    **{f"transformer_dropout{rate}": GPT2_DROPOUT for rate in (0.2, 0.3)},
    **{f"transformer_stronger_dropout{rate}": {*STRONGER, *GPT2_DROPOUT} for rate in (0.2, 0.3)},
}

# Stands for a script: does what its run_name says, and leaves what a complete run leaves.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path

flags = dict(flag[2:].partition("=")[::2] for flag in sys.argv[2:])
folder, act = Path(flags["output_dir"]), flags["run_name"].partition("-")[0]


def stop(number, frame):
    time.sleep(0.5)
    (folder / "stopped").write_text(signal.Signals(number).name)
    sys.exit(130)


def note(name):
    with open(folder / "times.jsonl", "a") as file:
        entry = {"event": name, "time": time.time(), "argv": sys.argv}
        entry |= {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
        file.write(json.dumps(entry) + "\\n")


if act == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM if act == "stubborn" else signal.SIGINT, stop)
note("start")
if act == "raise":
    raise MemoryError("batches are too large\\nor the memory is too small")
if act == "refuse":
    sys.exit(print("error: no such data\\nMore output", file=sys.stderr) or 2)
if act == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if act in ("wait", "stubborn") and not (folder / "stopped").exists():
    time.sleep(20)
time.sleep(0.2)
note("end")
if act != "forget":
    (folder / "log.jsonl").write_text("")
    (folder / "config.json").write_text("{}")
    (folder / "metrics.json").write_text(json.dumps({"seed": int(flags["seed"])}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Function that writes a matrix of models that act as they are named, with a fake script, and returns its path."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "run_clm.py").write_text(FAKE)
    (tmp_path / "recipe.yaml").write_text("model_type: grassmann\noutput_dir: unused\n")
    launch = run_matrix.launch

    def launch_with_recipe(run, *options):
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe = resolve(run_clm.ARGUMENTS, run.argv)
        (run.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return launch(run, *options)

    monkeypatch.setattr(run_matrix, "launch", launch_with_recipe)
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: [])
    monkeypatch.setattr(matrix, "SCRIPTS", scripts)

    def write(*acts, **task):
        models = {act: {"recipe": str(tmp_path / "recipe.yaml"), "overrides": {"run_name": act}} for act in acts}
        content = {
            "output_dir": str(tmp_path / "out"),
            "tasks": {"lm": {"script": "run_clm", "models": models, **task}},
        }
        (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return str(tmp_path / "matrix.yaml")

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(*argv):
    """Exit code of the matrix."""
    try:
        run_matrix.main([str(argument) for argument in argv])
    except SystemExit as exit:
        return exit.code
    return 0


def error_of(capsys, *argv):
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def events(folder, name="start"):
    """What the fake script noted of its runs in the folder."""
    path = folder / "times.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["event"] == name]


def most_at_once(entries):
    """Of (start, end) intervals, the largest number that share a moment."""
    return max(sum(start <= moment < end for start, end in entries) for moment, _ in entries)


def content(folder):
    """Bytes of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def take_no_notice(number, frame):
    pass


def interrupt_when(ready, number, *argv, handler=take_no_notice):
    """Exit code of a matrix that gets a signal as soon as `ready()` holds.

    The handler, which the matrix finds and has to put back, keeps the signal from ending these tests.
    """

    def watch():
        deadline = time.monotonic() + 50
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    old = signal.signal(number, handler)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run(*argv)
    finally:
        watcher.join()
        assert signal.signal(number, old) is handler


# The published matrix


def published_cells():
    return matrix.make_cells(matrix.load_matrix(str(PUBLISHED)), str(PUBLISHED), Path("out"), [0])


def test_published_matrix_has_every_cell():
    names = [f"wikitext2_{m}_{d}l_L{b}" for m in ("grassmann", "transformer") for d in (6, 12) for b in (128, 256)]
    names += [f"snli_{task}_{m}" for task in ("distilbert", "scratch") for m in ("grassmann", "transformer")]
    assert sorted(cell.group for cell in published_cells()) == sorted(names)
    assert all(cell.name == f"{cell.group}_seed0" for cell in published_cells())


@pytest.mark.parametrize(
    "cell", [cell for cell in published_cells() if cell.script == "run_clm"], ids=lambda c: c.group
)
def test_published_language_model_is_that_of_its_name(cell, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    model_args, data_args, training_args, _ = parse(run_clm.ARGUMENTS, [*matrix.training(cell, ["--use_cpu"]).argv])
    config = run_clm.load_config(model_args, BertVocabulary())
    assert config.model_type == {"grassmann": "grassmann", "transformer": "gpt2"}[cell.model]
    assert (config.num_hidden_layers, config.max_position_embeddings) == (cell.depth, cell.block)
    model = build(config)
    assert run_clm.choose_block_size(data_args, model) == cell.block
    assert model.num_parameters() == pytest.approx({6: 12.6e6, 12: 17.4e6}[cell.depth], rel=0.01)
    if cell.model == "grassmann":
        assert config.norm_placement == "post"
        offsets = [offset for (offset,) in config.layer_offsets]
        assert offsets == [offset for offset in (1, 2, 4, 8, 12, 16) for _ in range(cell.depth // 6)]
    assert training_args.do_train and training_args.do_eval and training_args.do_predict
    assert training_args.resume_from_checkpoint == "true"


def facts(cell):
    """Arguments of a cell, with the fields of its model's configuration."""
    arguments = resolve(run_clm.ARGUMENTS, matrix.training(cell, []).argv)
    model_args = run_clm.ModelArguments(
        config_name=arguments.pop("config_name"), config_overrides=arguments.pop("config_overrides")
    )
    return arguments | run_clm.load_config(model_args, BertVocabulary()).to_dict()


def test_each_factor_changes_what_its_name_says_and_nothing_else(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    cells = matrix.make_cells(matrix.load_matrix(str(FACTORS)), str(FACTORS), Path("out"), [0])
    by_model = {(cell.model, cell.depth, cell.block): facts(cell) for cell in cells if cell.task == "wikitext2"}
    assert {model for model, *_ in by_model} == {"grassmann", "transformer", *CHANGES}
    for (model, depth, block), found in by_model.items():
        base = by_model[model.split("_")[0], depth, block]
        changed = {name for name in found | base if found.get(name) != base.get(name)} - {"output_dir"}
        assert changed == CHANGES.get(model, set()), (model, changed)


@pytest.mark.parametrize(
    "cell", [cell for cell in published_cells() if cell.script == "run_nli"], ids=lambda c: c.group
)
def test_published_classifier_builds(cell, monkeypatch):
    assert cell.flags == []
    _, model = load_classifier(cell.recipe, monkeypatch)
    assert hasattr(model, "head") == (cell.task == "snli_distilbert")
    if cell.task == "snli_distilbert":
        assert model.config.head_type == cell.model


def test_published_models_of_one_task_train_alike():
    recipes = {}
    for cell in published_cells():
        types = {"run_clm": run_clm, "run_nli": run_nli}[cell.script].ARGUMENTS
        recipe = resolve(types, matrix.training(cell, []).argv)
        for name in ("config_name", "model_type", "config_overrides", "output_dir"):
            recipe.pop(name, None)
        recipes.setdefault((cell.task, cell.depth, cell.block), []).append(recipe)
    assert len(recipes) == 6
    assert all(first == second for first, second in recipes.values())


# Scheduling


def test_cells_share_gpus(fake, out, monkeypatch, capsys):
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: ["0", "3"])
    path = fake("ok-a", "ok-b", "ok-c", "ok-d", "ok-e", "ok-f")
    assert run(path, "--jobs_per_gpu", 2) == 0
    spans = {"0": [], "3": []}
    for folder in out.iterdir():
        (start,), (end,) = events(folder), events(folder, "end")
        spans[start["gpu"]].append((start["time"], end["time"]))
    assert sum(map(len, spans.values())) == 6
    assert all(most_at_once(times) <= 2 for times in spans.values())
    assert most_at_once([*spans["0"], *spans["3"]]) in (3, 4)
    printed = capsys.readouterr().out
    assert "[6 done, 0 failed, 0 left]" in printed
    assert "[0 done, 0 failed, 4 running, 2 left]" in printed
    assert all(f"lm_ok-{letter}_seed0" in printed for letter in "abcdef")


def test_named_gpu_is_the_only_one(fake, out, monkeypatch):
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: ["0", "3"])
    assert run(fake("ok-a", "ok-b"), "--gpus", 3) == 0
    assert [events(folder)[0]["gpu"] for folder in out.iterdir()] == ["3", "3"]


def test_jobs_run_side_by_side_without_gpus(fake, out, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: ["0"])
    assert run(fake("ok-a", "ok-b", "ok-c"), "--jobs", 2) == 0
    ends = [(events(folder)[0]["time"], events(folder, "end")[0]["time"]) for folder in out.iterdir()]
    assert most_at_once(ends) == 2
    assert {events(folder)[0]["gpu"] for folder in out.iterdir()} == {""}
    # Together, they have no more threads than there are cores.
    assert {events(folder)[0]["threads"] for folder in out.iterdir()} == {str(max(1, os.cpu_count() // 2))}


@pytest.mark.parametrize(
    ("available", "argv", "words"),
    [
        (["0", "3"], ["--gpus", "1"], ["--gpus 1", "0, 3"]),
        (["0"], ["--jobs", "2", "--jobs_per_gpu", "2"], ["--jobs", "--jobs_per_gpu"]),
        ([], ["--gpus", "0"], ["no GPU", "--jobs"]),
        ([], ["--jobs_per_gpu", "2"], ["no GPU", "--jobs"]),
        ([], ["--jobs", "0"], ["--jobs", "0 must be an integer of at least 1"]),
    ],
)
def test_impossible_slots_are_refused(fake, out, monkeypatch, capsys, available, argv, words):
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: available)
    message = error_of(capsys, fake("ok"), *argv)
    assert all(word in message for word in words), message
    assert not out.exists()


def test_gpus_are_those_that_the_process_sees(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_matrix.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert run_matrix.visible_gpus() == ["3", "GPU-5"]


# Failures


def test_failed_cells_do_not_stop_the_others_and_are_listed(fake, out, capsys):
    path = fake("raise", "refuse", "die", "forget", "ok")
    assert run(path) == 1
    *_, counts, raised, refused, died, forgot = capsys.readouterr().out.splitlines()
    assert counts == "1 done, 4 failed, 0 left"
    assert raised.startswith("failed: lm_raise_seed0: MemoryError: batches are too large (log in ")
    assert refused.startswith("failed: lm_refuse_seed0: error: no such data (log in ")
    assert died.startswith("failed: lm_die_seed0: ended by SIGKILL (log in ")
    assert "lm_forget_seed0: run_clm.py ended without metrics.json" in forgot
    assert "Traceback" in (out / "lm_raise_seed0" / "train.log").read_text()
    assert (out / "lm_ok_seed0" / "metrics.json").exists()


def test_failed_cells_run_again_and_finished_ones_do_not(fake, out, capsys):
    path = fake("raise", "ok")
    assert run(path) == 1
    (matrix.SCRIPTS / "run_clm.py").write_text(FAKE.replace('act == "raise"', "False"))
    before = content(out / "lm_ok_seed0")
    assert run(path) == 0
    assert content(out / "lm_ok_seed0") == before
    assert len(events(out / "lm_raise_seed0")) == 2
    # The log of the failure is kept.
    log = (out / "lm_raise_seed0" / "train.log").read_text()
    assert "MemoryError" in log and log.count("$ ") == 2
    printed = capsys.readouterr().out
    assert "2 cells, 1 of them trained before" in printed
    assert "[1 done, 0 failed, 1 left] lm_ok_seed0, train: finished before" in printed
    # A message of the earlier run is none of a later one.
    (matrix.SCRIPTS / "run_clm.py").write_text("print('quiet')\nexit(3)")
    (out / "lm_raise_seed0" / "metrics.json").unlink()
    assert run(path) == 1
    assert "lm_raise_seed0: quiet (log in" in capsys.readouterr().out


def test_cell_that_failed_may_change(fake, out):
    path = fake("raise")
    assert run(path) == 1
    (matrix.SCRIPTS / "run_clm.py").write_text(FAKE.replace('act == "raise"', "False"))
    assert run(path, "--", "--max_steps", 5) == 0


def test_cell_that_another_process_runs_is_left_alone(fake, out, capsys):
    path = fake("wait", "ok")
    (cell, _) = matrix.make_cells(matrix.load_matrix(path), path, out, [0])
    child = run_matrix.launch(matrix.training(cell, []), "", None)
    try:
        assert run(path) == 1
        printed = capsys.readouterr().out
        assert "failed: lm_wait_seed0: another process is at it" in printed
        assert "[1 done, 1 failed, 0 left] lm_ok_seed0" in printed
        assert child.process.poll() is None
        assert len(events(out / "lm_wait_seed0")) == 1
    finally:
        child.process.kill()
        child.process.wait()


def test_cells_end_with_the_matrix_if_it_fails_itself(fake, out, monkeypatch):
    path = fake("wait")

    def broken(*arguments):
        while not events(out / "lm_wait_seed0"):
            time.sleep(0.01)
        raise BrokenPipeError

    monkeypatch.setattr(run_matrix.Scheduler, "_say", broken)
    children = []
    launch = run_matrix.launch
    monkeypatch.setattr(run_matrix, "launch", lambda *options: children.append(launch(*options)) or children[-1])
    with pytest.raises(BrokenPipeError):
        run(path)
    assert children[0].process.wait(timeout=10) == -signal.SIGTERM


# Records


def test_changed_cells_are_refused_by_name_and_left_as_they_are(fake, out, capsys):
    path = fake("ok-a", "ok-b", "raise")
    run(path)
    before = content(out)
    capsys.readouterr()
    message = error_of(capsys, path, "--", "--learning_rate=0.25")
    assert "lm_ok-a_seed0" in message and "lm_ok-b_seed0" in message and "lm_raise" not in message
    assert "learning_rate is not given there and would be 0.25" in message
    assert "--output_dir" in message
    assert content(out) == before
    # A recipe that changed is a change too.
    recipe = Path(path).with_name("recipe.yaml")
    recipe.write_text(recipe.read_text() + "max_steps: 3\n")
    assert "max_steps is not given there and would be 3" in error_of(capsys, path)
    # It is for the user to say that the old run may go, or where the new one may be.
    assert run(path, "--models", "ok-a", "--output_dir", out.with_name("other")) == 0
    shutil.rmtree(out / "lm_ok-a_seed0")
    assert run(path, "--models", "ok-a") == 0


def test_checkpoints_of_other_arguments_are_not_continued(fake, out, capsys):
    path = fake("ok")
    run(path)
    (out / "lm_ok_seed0" / "metrics.json").unlink()
    (out / "lm_ok_seed0" / "checkpoint-3").mkdir()
    assert "max_steps" in error_of(capsys, path, "--", "--max_steps=9")
    assert run(path) == 0
    assert "--resume_from_checkpoint=true" in events(out / "lm_ok_seed0")[-1]["argv"]


def test_record_without_a_recipe_or_with_a_broken_one_is_refused(fake, out, capsys):
    path = fake("ok")
    run(path)
    folder = out / "lm_ok_seed0"
    (folder / "metrics.json").write_text('{"seed":')
    assert "metrics.json is not JSON" in error_of(capsys, path)
    (folder / "recipe.yaml").unlink()
    assert "lm_ok_seed0" in error_of(capsys, path)
    assert len(events(folder)) == 1


def test_moved_output_folder_is_still_that_of_its_cells(fake, out):
    path, moved = fake("ok"), out.with_name("moved")
    assert run(path, "--mode", "both") == 0
    out.rename(moved)
    assert run(path, "--mode", "both", "--output_dir", moved) == 0
    assert len(events(moved / "lm_ok_seed0")) == 1
    assert len(events(moved / "lm_ok_seed0" / "lm_ok_at_saved_seed0")) == 1


def test_seeds_of_a_cell_are_one_group(fake, out):
    path = fake("ok", depths=[2, 4], overrides={"config_overrides": {"num_hidden_layers": "$depth"}})
    assert run(path, "--seeds", 0, 2, "--jobs", 4, "--mode", "both") == 0
    groups = group_runs([load_run(folder) for folder in out.iterdir()])
    assert {name: list(group.runs) for name, group in groups.items()} == {"lm_ok_2l": [0, 2], "lm_ok_4l": [0, 2]}
    groups = group_runs([load_run(folder) for folder in out.glob("*/*_at_*")])
    assert {name: list(group.runs) for name, group in groups.items()} == {
        "lm_ok_2l_at_saved": [0, 2],
        "lm_ok_4l_at_saved": [0, 2],
    }
    (start,) = events(out / "lm_ok_4l_seed2")
    assert '--config_overrides={"num_hidden_layers": 4}' in start["argv"]
    assert "--seed=2" in start["argv"]


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_matrix_stops_its_cells_and_goes_on_later(fake, out, capsys, number):
    path = fake("wait-a", "ok", "wait-b", "raise")
    running = [out / "lm_wait-a_seed0", out / "lm_wait-b_seed0"]
    assert interrupt_when(lambda: all(map(events, running)), number, path, "--jobs", 2) == 130
    # Each was asked as Ctrl-C asks, and had the time that it needed.
    assert [(folder / "stopped").read_text() for folder in running] == ["SIGINT", "SIGINT"]
    assert not (out / "lm_raise_seed0").exists()
    printed = capsys.readouterr()
    assert "1 done, 0 failed, 3 left" in printed.out
    assert "failed:" not in printed.out
    assert printed.err == "interrupted\n"
    before = content(out / "lm_ok_seed0")
    assert run(path, "--models", "wait-a", "wait-b", "ok", "--jobs", 2) == 0
    assert content(out / "lm_ok_seed0") == before
    assert [len(events(folder)) for folder in running] == [2, 2]


def test_signal_that_is_ignored_from_the_outset_stays_so(fake, out):
    ready = lambda: events(out / "lm_ok-a_seed0")  # noqa: E731
    assert interrupt_when(ready, signal.SIGHUP, fake("ok-a", "ok-b"), handler=signal.SIG_IGN) == 0
    assert events(out / "lm_ok-b_seed0", "end")


def test_cell_that_does_not_stop_gets_stronger_signals_one_grace_apart(fake, out, monkeypatch):
    monkeypatch.setattr(run_matrix, "GRACE", 1.0)
    path, folder = fake("stubborn"), out / "lm_stubborn_seed0"
    assert interrupt_when(lambda: events(folder), signal.SIGINT, path) == 130
    assert (folder / "stopped").read_text() == "SIGTERM"
    monkeypatch.setattr(run_matrix, "STOP", (signal.SIGINT, signal.SIGINT, signal.SIGKILL))
    (folder / "stopped").unlink()
    start = time.monotonic()
    assert interrupt_when(lambda: len(events(folder)) == 2, signal.SIGINT, path) == 130
    assert not (folder / "stopped").exists()
    assert time.monotonic() - start > 2.0


# Evaluation


def test_evaluation_leaves_the_training_as_it_is(fake, out, capsys):
    path, folder = fake("ok"), out / "lm_ok_seed0"
    assert run(path, "--mode", "eval") == 1
    assert "lm_ok_seed0 has no complete checkpoint: train the cell first" in capsys.readouterr().out
    run(path)
    (folder / "checkpoint-7").mkdir()
    before = content(folder)
    for checkpoint, name in (("saved", "saved"), ("checkpoint-7", "checkpoint-7")):
        assert run(path, "--mode", "eval", "--checkpoint", checkpoint) == 0
        (start,) = events(folder / f"lm_ok_at_{name}_seed0")
        model = folder if name == "saved" else folder / name
        assert f"--model_name_or_path={model}" in start["argv"]
        assert "--do_train=false" in start["argv"]
        assert not any(flag.startswith("--resume") for flag in start["argv"])
    # No second time.
    assert run(path, "--mode", "eval", "--checkpoint", "saved") == 0
    assert len(events(folder / "lm_ok_at_saved_seed0")) == 1
    assert {name: data for name, data in content(folder).items() if "_at_" not in name} == before
    assert run(path, "--mode", "eval", "--checkpoint", "checkpoint-8") == 1
    assert "no checkpoint-8 model: train the cell first; its checkpoints: checkpoint-7" in capsys.readouterr().out


def test_both_evaluates_what_it_has_trained_and_nothing_that_failed(fake, out):
    assert run(fake("ok", "raise"), "--mode", "both") == 1
    assert events(out / "lm_ok_seed0" / "lm_ok_at_saved_seed0")
    assert not (out / "lm_raise_seed0" / "lm_raise_at_saved_seed0").exists()


def test_model_of_an_evaluation_replaces_the_one_of_the_cell(fake, out, tmp_path):
    path = fake("ok", blocks=[8, 16], overrides={"block_size": "$block", "config_overrides": {"hidden_size": 8}})
    cell = matrix.make_cells(matrix.load_matrix(path), path, out, [0])[1]
    extra = ["--tokenizer_name", "here", "--max_eval_samples", "4", "--config-overrides", "{}"]
    argv = matrix.evaluation(cell, extra, "hub/model").argv
    recipe = resolve(run_clm.ARGUMENTS, argv)
    assert not {"model_type", "config_overrides", "tokenizer_name"} & set(recipe)
    assert (recipe["model_name_or_path"], recipe["block_size"], recipe["max_eval_samples"]) == ("hub/model", 16, 4)
    assert recipe["output_dir"] == str(out / "lm_ok_L16_seed0" / "lm_ok_L16_at_hub_model_seed0")
    # A model that comes without a tokenizer has that of the cell.
    (tmp_path / "converted").mkdir()
    argv = matrix.evaluation(cell, extra, str(tmp_path / "converted")).argv
    assert resolve(run_clm.ARGUMENTS, argv)["tokenizer_name"] == "here"


# The command line and the file


def test_dry_run_prints_commands_and_runs_nothing(fake, out, capsys):
    path = fake("ok-a", "ok-b")
    run(path, "--models", "ok-a")
    before = content(out)
    capsys.readouterr()
    assert run(path, "--dry_run", "--mode", "both", "--", "--run_name", "two words") == 2
    assert "run_name is ok-a there and would be two words" in capsys.readouterr().err
    assert run(path, "--dry_run", "--mode", "both") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# lm_")]
    assert lines[0] == "# finished before"
    assert f"--model_name_or_path={out / 'lm_ok-a_seed0'} " in lines[1]
    assert lines[2].endswith(f"--output_dir={out / 'lm_ok-b_seed0'} --do_train=true --resume_from_checkpoint=true")
    assert lines[3] == "# when it is trained"
    assert content(out) == before


def test_overrides_of_a_model_come_after_those_of_its_task(fake, out):
    path = fake("ok", overrides={"run_name": "of_the_task", "max_steps": 3})
    (cell,) = matrix.make_cells(matrix.load_matrix(path), path, out, [0])
    recipe = resolve(run_clm.ARGUMENTS, matrix.training(cell, ["--max_steps=4"]).argv)
    assert (recipe["run_name"], recipe["max_steps"]) == ("ok", 4)


def test_depths_do_not_narrow_tasks_without_depths():
    args = run_matrix.parse_arguments([str(PUBLISHED), "--depths", "12", "--blocks", "128", "--models", "transformer"])
    groups = [cell.group for cell in matrix.choose(published_cells(), args)]
    assert groups == ["wikitext2_transformer_12l_L128", "snli_distilbert_transformer", "snli_scratch_transformer"]


def test_selection_takes_what_it_names(fake, out):
    path = fake("a", "b", depths=[2, 4], blocks=[8, 16], overrides={"block_size": "$block", "max_steps": "$depth"})
    cells = matrix.make_cells(matrix.load_matrix(path), path, out, [0])

    def names(*argv):
        return [cell.group for cell in matrix.choose(cells, run_matrix.parse_arguments([path, *argv]))]

    assert names("--models", "b", "--depths", "4", "--blocks", "8", "16") == ["lm_b_4l_L8", "lm_b_4l_L16"]
    assert len(names()) == len(names("--tasks", "lm")) == 8


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--models", "transfomer"], ["--models transfomer", "did you mean transformer"]),
        (["--tasks", "wikitext"], ["--tasks wikitext", "did you mean wikitext2"]),
        (["--depths", "7"], ["--depths 7", "6"]),
        (["--tasks", "snli_scratch", "--blocks", "128"], ["--blocks 128", "have no blocks"]),
        (["--seeds", "1", "1"], ["--seeds", "1 is given twice"]),
        (["--seeds", "-1"], ["--seeds", "at least 0"]),
        (["--mode", "test"], ["--mode", "eval"]),
        (["--checkpoint", "newest"], ["--checkpoint", "--mode eval"]),
        (["--mode", "eval", "--checkpoint", "runs/x"], ["--checkpoint runs/x", "12 are chosen", "--models"]),
        (["--", "--block_siz", "4"], ["after --", "block_siz", "block_size"]),
        (["--", "--block_size", "4"], ["run_nli.py has no argument block_size"]),
        (["--tasks", "wikitext2", "--", "--max_steps", "many"], ["--max_steps", "many"]),
        (["--", "--seed", "4"], ["seed", "--seeds"]),
        (["--", "--output-dir=x"], ["output_dir", "--output_dir"]),
        (["--", "--model_name_or_path=x"], ["model_name_or_path", "--checkpoint"]),
        (["--", "4"], ["4 does not belong to a flag"]),
    ],
)
def test_impossible_command_line_is_refused(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: [])
    message = error_of(capsys, PUBLISHED, "--output_dir", tmp_path / "out", *argv)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_matrix_is_not_launched_as_several_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in error_of(capsys, PUBLISHED)


def matrix_of(**tasks):
    return {"output_dir": "out", "tasks": tasks}


TASK = {"script": "run_clm", "models": {"ok": {"recipe": "configuration/wikitext2/gpt2_6l.yaml"}}}
MODEL = TASK["models"]["ok"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tasks: [", ["not valid YAML"]),
        ("[1]", ["must be a mapping"]),
        ("tasks: {}\ntasks: {}", ["tasks is given twice"]),
        ({"tasks": {"lm": TASK}}, ["output_dir is missing"]),
        ({"output_dir": "x", "tasks": {}}, ["tasks is missing"]),
        ({"output_dir": "x", "task": {"lm": TASK}}, ["unknown key task", "did you mean tasks"]),
        ({"output_dir": 3, "tasks": {"lm": TASK}}, ["output_dir must be text, not 3"]),
        ({"output_dir": "x", "tasks": {"lm": TASK}, "seeds": []}, ["seeds is empty"]),
        ({"output_dir": "x", "tasks": {"lm": TASK}, "seeds": [True]}, ["seeds: True"]),
        (matrix_of(lm=None), ["tasks: lm must be a mapping"]),
        (matrix_of(**{"l/m": TASK}), ["l/m", "folder's name"]),
        (matrix_of(lm={**TASK, "depth": [6]}), ["tasks: lm: unknown key depth", "did you mean depths"]),
        (matrix_of(lm={**TASK, "depths": 6}), ["depths must be a list, not 6"]),
        (matrix_of(lm={**TASK, "blocks": [0]}), ["blocks: 0", "at least 1"]),
        (matrix_of(lm={**TASK, "script": "run_cml"}), ["script run_cml", "did you mean run_clm"]),
        (matrix_of(lm={"script": "run_clm", "models": {"ok": {}}}), ["models: ok: recipe is missing"]),
        (matrix_of(lm={"script": "run_clm", "models": {"ok": {"recipe": "no.yaml"}}}), ["there is no recipe no.yaml"]),
        (matrix_of(lm={**TASK, "overrides": {"block_siz": 4}}), ["no argument block_siz", "block_size"]),
        (matrix_of(lm={**TASK, "overrides": {"block_size": "$blok"}, "blocks": [4]}), ["$blok", "it can be $block"]),
        (matrix_of(lm={**TASK, "overrides": {"block_size": None}}), ["block_size has no value"]),
        (matrix_of(lm={**TASK, "overrides": {"seed": 4}}), ["seed", "--seeds"]),
        (matrix_of(lm={**TASK, "overrides": {"max_steps": "many"}}), ["--max_steps", "many"]),
        (
            matrix_of(lm={**TASK, "depths": [6, 12]}),
            ["lm_ok_6l_seed0 and lm_ok_12l_seed0 would be one and the same run"],
        ),
        (matrix_of(a={**TASK, "models": {"b_c": MODEL}}, a_b={**TASK, "models": {"c": MODEL}}), ["named a_b_c_seed0"]),
    ],
)
def test_impossible_matrix_is_refused(tmp_path, capsys, monkeypatch, given, words):
    monkeypatch.setattr(run_matrix, "visible_gpus", lambda: [])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "matrix.yaml"
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given, sort_keys=False))
    message = error_of(capsys, path)
    assert all(word in message for word in words), message
    assert str(path) in message or "lm_ok_seed0" in message
    assert list(tmp_path.iterdir()) == [path]


def test_missing_matrix_is_refused(capsys, tmp_path):
    assert "cannot read the matrix" in error_of(capsys, tmp_path / "none.yaml")


# The scripts themselves


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_run):
    """A matrix of one tiny language model, interrupted in its training and then continued, and its folder."""
    folder = tmp_path_factory.mktemp("matrix")
    flags = dict(flag[2:].partition("=")[::2] for flag in tiny_run if "=" in flag)
    flags |= {"save_steps": 2, "logging_steps": 1, "max_steps": 30, "save_total_limit": 2, "report_to": "none"}
    flags |= {"use_cpu": True, "do_eval": True, "config_overrides": json.loads(flags["config_overrides"])}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(flags))
    models = {"grassmann": {"recipe": str(folder / "recipe.yaml")}}
    tasks = {"tiny": {"script": "run_clm", "blocks": [16], "overrides": {"block_size": "$block"}, "models": models}}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), "tasks": tasks}))
    cell = folder / "out" / "tiny_grassmann_L16_seed0"
    state = cell / "checkpoint-4" / "trainer_state.json"
    assert interrupt_when(state.exists, signal.SIGINT, path, "--jobs", 1) == 130
    assert not (cell / "metrics.json").exists()
    assert run(path, "--jobs", 1) == 0
    return path, cell


def test_interrupted_training_continues_from_its_newest_checkpoint(trained):
    path, cell = trained
    log = (cell / "train.log").read_text()
    assert "training starts from the beginning" in log
    assert f"Resuming from {cell / 'checkpoint-'}" in log
    history = [json.loads(line) for line in (cell / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 31))
    # What it says was given is what it was given.
    before = content(cell)
    assert run(path, "--jobs", 1) == 0
    assert content(cell) == before


def evaluate(script, cell, checkpoint):
    """Metrics of an evaluation of a cell, by the script itself."""
    run = matrix.evaluation(cell, [], checkpoint)
    assert not matrix.is_finished(run)
    script.main(run.argv)
    assert matrix.is_finished(run)
    return json.loads((run.folder / "metrics.json").read_text())


def test_evaluation_is_that_of_the_newest_checkpoint_or_of_a_converted_model(trained, tmp_path):
    path, folder = trained
    (cell,) = matrix.make_cells(matrix.load_matrix(str(path)), str(path), folder.parent, [0])
    before = content(folder)
    metrics = evaluate(run_clm, cell, "newest")
    assert metrics["eval_loss"] == pytest.approx(json.loads(before["metrics.json"])["eval_loss"], rel=1e-4)
    assert load_run(folder / "tiny_grassmann_L16_at_checkpoint-30_seed0").metrics == metrics
    # Converted weights may come without a tokenizer.
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(checkpoints(folder)[1]) / name, tmp_path)
    assert evaluate(run_clm, cell, str(tmp_path))["eval_loss"] != metrics["eval_loss"]
    assert {name: data for name, data in content(folder).items() if "_at_" not in name} == before


def test_classifier_with_a_backbone_is_trained_and_evaluated(tmp_path, tiny_classifier):
    flags = dict(flag[2:].partition("=")[::2] for flag in tiny_classifier if "=" in flag)
    flags |= {"max_steps": 2, "use_cpu": True, "do_eval": True, "output_dir": "unused"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(flags))
    task = {"script": "run_nli", "models": {"head": {"recipe": str(tmp_path / "recipe.yaml")}}}
    path = tmp_path / "matrix.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "unused", "tasks": {"pairs": task}}))
    (cell,) = matrix.make_cells(matrix.load_matrix(str(path)), str(path), tmp_path, [3])
    training = matrix.training(cell, [])
    run_nli.main(training.argv)
    assert matrix.is_finished(training)
    metrics = evaluate(run_nli, cell, "newest")
    recorded = json.loads((cell.folder / "metrics.json").read_text())
    assert metrics["eval_accuracy"] == recorded["eval_accuracy"]
    assert metrics["head_parameters"] == recorded["head_parameters"] and metrics["seed"] == 3
    changed = matrix.training(cell, ["--max_steps=3"])
    with pytest.raises(UserError, match="max_steps is 2 there and would be 3"):
        matrix.is_finished(changed)
