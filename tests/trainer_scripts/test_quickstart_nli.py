import json
import re

import pytest
import quickstart_nli
import run_nli
import yaml
from conftest import REPOSITORY


RECIPE = "configuration/quickstart/entailment_pairs.yaml"


def test_an_untrained_model_fails_and_still_shows_what_it_says(tmp_path, run_python):
    limits = ["--max_train_samples=128", "--max_eval_samples=60", "--num_train_epochs=1", "--report_to=none"]
    run_nli.main([str(REPOSITORY / RECIPE), *limits, "--use_cpu", f"--output_dir={tmp_path}"])
    check = run_python("trainer_scripts/quickstart_nli.py", tmp_path)
    assert check.returncode == 1, check.stderr
    assert "less than 90%. Train it for longer." in check.stdout
    # Test rows and their answers are those of the run.
    (measured,) = re.findall(r"GrassmannPluckerForSequenceClassification +([\d.]+)%", check.stdout)
    (loaded,) = re.findall(r"loaded from disk.* ([\d.]+)%", check.stdout)
    assert measured == loaded == f"{100 * json.loads((tmp_path / 'metrics.json').read_text())['test_accuracy']:.1f}"
    assert check.stdout.count("premise:") == 6
    assert len(re.findall(r"(entailment|neutral|contradiction); said: ", check.stdout)) == 6


def test_a_folder_without_a_run_and_a_run_without_a_test_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        quickstart_nli.main([str(tmp_path)])
    assert "recipe.yaml: train a model there with run_nli.py first" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        quickstart_nli.main([str(tmp_path)])
    assert "train with do_predict" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_passes_and_is_worse_without_the_heads_plucker_features(tmp_path, run_python):
    with_features, without = tmp_path / "with", tmp_path / "without"
    training = run_python("trainer_scripts/run_nli.py", RECIPE, f"--output_dir={with_features}")
    assert training.returncode == 0, training.stderr
    check = run_python("trainer_scripts/quickstart_nli.py", with_features)
    assert check.returncode == 0, check.stdout + check.stderr
    accuracy = json.loads((with_features / "metrics.json").read_text())["test_accuracy"]
    assert accuracy >= 0.9

    overrides = yaml.safe_load((REPOSITORY / RECIPE).read_text())["config_overrides"] | {"use_plucker_features": False}
    options = [f"--config_overrides={json.dumps(overrides)}", f"--output_dir={without}"]
    training = run_python("trainer_scripts/run_nli.py", RECIPE, *options)
    assert training.returncode == 0, training.stderr
    assert json.loads((without / "metrics.json").read_text())["test_accuracy"] < accuracy - 0.03
