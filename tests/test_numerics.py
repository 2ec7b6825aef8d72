# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The page of rounding errors: what it shows is what was recorded, and what is recorded is true."""

import json
import math
from pathlib import Path

import numerics
import pytest
import torch


PAGE = Path(numerics.__file__).parents[1] / "docs" / "numerics.md"
SMALL = ["--device=cpu", "--length=40", "--hidden_size=16", "--reduced_size=4", "--vocab_size=50", "--num_pairs=8"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a small run without compilation."""
    output = tmp_path_factory.mktemp("numerics") / "numerics.json"
    numerics.main([*SMALL, "--no_compile", f"--output={output}"])
    return json.loads(output.read_text())


def test_the_page_is_what_the_records_say():
    assert PAGE.read_text(encoding="utf-8") == numerics.render(numerics.read_records())


def test_the_page_shows_a_record_of_a_gpu_as_soon_as_there_is_one(record, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "RECORDS", tmp_path)
    for name, device in [("numerics_cpu", "some processor"), ("numerics_h200", "some accelerator")]:
        (tmp_path / f"{name}.json").write_text(json.dumps(record | {"device_name": device}))
        numerics.main([f"--page={tmp_path / 'page.md'}"])
        page = (tmp_path / "page.md").read_text()
        assert device in page
    assert page.index("## GPU: some accelerator") < page.index("## CPU: some processor")


def test_every_figure_of_a_record_is_in_its_tables(record):
    text = "\n".join(table for _, table in numerics.tables(record))
    for row in record["model"]:
        assert all(numerics.number(error["relative"]) in text for error in row["errors"].values())
    for row in record["degenerate"]:
        assert numerics.number(row["error"]) in text and numerics.number(row["largest_gradient"]) in text


# The unit roundoff, times what six layers may make of it.
@pytest.mark.parametrize("name, largest", [("float64", 1e-12), ("float32", 1e-3), ("bfloat16", 1), ("float16", 0.3)])
def test_errors_are_of_the_size_of_rounding_and_never_nothing(name, largest, record):
    rows = [row for section in ("mixer", "model") for row in record[section] if row["type"] == name]
    assert {row["path"] for row in rows} == {"torch"} | ({"naive"} if name != "float64" else set())
    for row in rows:
        values = [error["relative"] for tensor, error in row["errors"].items() if tensor != "loss"]
        assert all(value < largest for value in values) and max(values) > 0, (row["path"], values)


def test_degenerate_pairs_have_exact_zeros_where_the_published_form_has_noise(record):
    rows = {(row["type"], row["path"], row["pairs"]): row for row in record["degenerate"]}
    for path in ("naive", "torch"):
        for pairs in ("sine 5e-04", "sine 1e-07", "equal", "zero neighbour"):
            row = rows["float32", path, pairs]
            assert row["error"] == row["largest_gradient"] == 0, (path, pairs)
        assert 0 < rows["float32", path, "sine 2e-03"]["error"] < 1e-3
    assert rows["float32", "published", "sine 1e-07"]["error"] > 1e-2
    assert rows["float32", "published", "equal"]["largest_gradient"] > 1e6


def test_errors_are_relative_to_the_reference():
    reference = {"x": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    found = numerics.errors({"x": torch.tensor([3.0, 4.5])}, reference)
    assert found == {"x": {"relative": pytest.approx(0.1), "largest": pytest.approx(0.125)}}
    assert math.isnan(numerics.errors({"x": torch.tensor([math.nan, 4.0])}, reference)["x"]["relative"])


def test_the_compiled_path_is_measured_too():
    (args,) = numerics.HfArgumentParser(numerics.NumericsArguments).parse_args_into_dataclasses(SMALL)
    mixer = numerics.on_path(numerics.make_mixer(args), "torch, compiled")
    assert mixer._compiled_call_impl is not None and mixer.backend == "torch"
    assert ("float32", "torch, compiled") in numerics.variants(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_pairs", "0"], "num_pairs must be at least 1, got 0"),
        (["--reduced_size", "1"], "`reduced_size` must be at least 2"),
        (["--page", "/dev/null/page.md"], "/dev/null/page.md"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit:
        numerics.main([*SMALL, *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_rows_of_the_kernels_and_of_tf32():
    (args,) = numerics.HfArgumentParser(numerics.NumericsArguments).parse_args_into_dataclasses(["--device=cuda"])
    assert {("float32", "triton"), ("bfloat16", "triton"), ("float32, TF32 products", "torch")} <= set(
        numerics.variants(args)
    )
