import json
import re

import pytest
import quickstart
import run_clm
from conftest import REPOSITORY


RECIPE = "configuration/quickstart/stdlib_docs.yaml"


def test_a_model_that_does_not_beat_the_bigram_fails_and_still_writes(tmp_path, capsys):
    limits = ["--max_train_samples=16", "--max_eval_samples=4", "--num_train_epochs=1", "--report_to=none"]
    run_clm.main([str(REPOSITORY / RECIPE), *limits, "--use_cpu", f"--output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as exit:
        quickstart.main([str(tmp_path)])
    assert exit.value.code == 1
    output = capsys.readouterr().out
    assert "does not beat the bigram" in output
    assert "'This module provides' goes on:\nThis module provides" in output


@pytest.mark.slow
def test_the_quickstart_beats_the_bigram(tmp_path, run_python):
    training = run_python("trainer_scripts/run_clm.py", RECIPE, f"--output_dir={tmp_path}")
    assert training.returncode == 0, training.stderr
    check = run_python("trainer_scripts/quickstart.py", tmp_path)
    assert check.returncode == 0, check.stdout + check.stderr
    (bigram,) = re.findall(r"Kneser-Ney bigram\s+([\d.]+)", check.stdout)
    assert json.loads((tmp_path / "metrics.json").read_text())["eval_perplexity"] < float(bigram)
