# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Whatever a checkpoint's files say, loading it ends in a model that works or in an ordinary exception."""

import json
import math
import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_grassmann import GrassmannForCausalLM, GrassmannForSequenceClassification


resource = pytest.importorskip("resource", reason="memory can only be limited on Unix")

KINDS = ("lm", "classifier", "plucker", "plucker_on_grassmann")
CONFIG = "config.json"
SECONDS = 30
MEMORY = 4 * 2**30  # on top of what the imports take
WEIGHTS = "model.safetensors"
# What no file may make the loader run out of. Any other exception is a clean end: Transformers raises AttributeError
# or KeyError itself on junk in the fields that are its own.
EXHAUSTED = (MemoryError, RecursionError, SystemError)


def load_and_use(kind, folder):
    """
    Load the checkpoint and let it work on a few tokens. Returns what came of it; what is wrong starts with "BAD".
    """
    auto_class = AutoModelForCausalLM if kind == "lm" else AutoModelForSequenceClassification
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    try:
        model = auto_class.from_pretrained(folder)
        with torch.no_grad():
            logits = model(ids, return_dict=True).logits
        shape = (1, 5, model.config.vocab_size) if kind == "lm" else (1, model.config.num_labels)
        if tuple(logits.shape) != shape or not logits.isfinite().all():
            return f"BAD logits: {logits}"
        if kind == "lm" and not 5 <= model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 9:
            return "BAD number of generated tokens"
        return "works"
    except EXHAUSTED as error:
        return f"BAD {error!a:.2000}"
    except Exception as error:
        # The weights are small, so a model that does not fit into the memory is not that of the weights.
        return f"{'BAD' if 'allocate memory' in str(error) else 'refused'} {error!a:.2000}"


def serve(connection):
    """Call the functions that arrive, and send back what they return."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    while True:
        function, *args = connection.recv()
        try:
            connection.send(function(*args))
        except BaseException as error:
            connection.send(f"BAD {error!a:.2000}")


class Child:
    """A process that loads checkpoints, so that a crash or an endless loop in there is a failure out here."""

    process = None

    def call(self, function, *args, seconds=SECONDS):
        if self.process is None:
            context = multiprocessing.get_context("forkserver")
            # What takes seconds is imported once, in the process of which every child is a copy.
            context.set_forkserver_preload(["modeling_grassmann", "hypothesis", "pytest"])
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
            # The first answer waits for the imports.
            self.call(abs, 1, seconds=300)
        self.connection.send((function, *args))
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
            outcome = f"BAD no end after {seconds} seconds"
        except (EOFError, ConnectionResetError):
            self.process.join()
            outcome = f"BAD exit code {self.process.exitcode}"
        self.stop()
        return outcome

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.stop()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_model, make_classifier):
    """Folders of sound checkpoints, by kind."""
    folder = tmp_path_factory.mktemp("saved")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "offsets": [[1], [2]], "intermediate_size": 24}
    models = {
        "lm": make_model(GrassmannForCausalLM, **small),
        "classifier": make_model(GrassmannForSequenceClassification, **small, num_labels=3),
        "plucker": make_classifier("bert"),
        "plucker_on_grassmann": make_classifier("grassmann"),
    }
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
        (folder / kind / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Model: pass\n")
    return folder


def check(child, saved, kind, **files):
    """Load the checkpoint with other contents in some of its files. Returns what came of it."""
    folder = saved / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / kind, folder)
    for name, content in files.items():
        path = folder / {"config": CONFIG, "generation_config": "generation_config.json", "weights": WEIGHTS}[name]
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    outcome = child.call(load_and_use, kind, str(folder))
    assert not outcome.startswith("BAD"), outcome
    assert not (saved / "ran").exists(), "code that came with the checkpoint was run"
    return outcome


def nest(depth, value=1):
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = [0, 1, -1, 2, 3, 7, 100, 2**20, 2**31, 2**31 - 1, 2**63, -(2**63), 10**18, 10**400]
FLOATS = [0.0, -0.0, 0.5, -1.5, 2.0, 1e308, 5e-324, math.nan, math.inf, -math.inf]
STRINGS = ["", "a", "\0", "é☃", "\ud800", "auto", "float16", "int8", "gelu", "bert", "grassmann", "evil.Model", "../a"]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *FLOATS, *STRINGS, nest(30), {}, []])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "a", "quant_method"]), inner)
    ),
    max_leaves=4,
)
# Fields of Transformers that steer how a model is made, and names that are something else in a configuration.
OTHER_FIELDS = [
    *(
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "auto_map",
        "quantization_config",
        "id2label",
        "label2id",
        "num_labels",
    ),
    *("architectures", "model_type", "transformers_version", "transformers_weights", "problem_type", "attention_type"),
    *("_attn_implementation", "attn_implementation", "rope_parameters", "rope_theta", "is_encoder_decoder"),
    *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "tokenizer_class"),
    *("layer_types", "layer_offsets", "validate", "to_dict", "__class__", "__dict__", "unknown", "é"),
]
CODE = {
    "AutoConfig": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSequenceClassification": "a--b.C",
}


def fuzz(max_examples, derandomize=True):
    # Each example has a time limit of its own.
    return settings(
        max_examples=max_examples, derandomize=derandomize, deadline=None, suppress_health_check=HealthCheck
    )


def read_config(saved, kind):
    return json.loads((saved / kind / CONFIG).read_text())


def changes(names):
    return st.dictionaries(names, VALUES, min_size=1, max_size=3)


def check_config(child, saved, data, kind):
    config = read_config(saved, kind)
    names = st.sampled_from(sorted(config)) | st.sampled_from(OTHER_FIELDS)
    check(child, saved, kind, config=config | data.draw(changes(names)))


def check_backbone_config(child, saved, data, kind):
    config = read_config(saved, kind)
    backbone = config["backbone_config"]
    sizes = [name for name, value in backbone.items() if type(value) is int]
    names = st.sampled_from(sizes) | st.sampled_from(sorted(backbone)) | st.sampled_from(OTHER_FIELDS)
    changed = data.draw(changes(names) | VALUES)
    check(
        child,
        saved,
        kind,
        config=config | {"backbone_config": backbone | changed if isinstance(changed, dict) else changed},
    )


def check_generation_config(child, saved, data):
    # Not those that say how many tokens or beams to make: as many as that are made.
    names = ["bos_token_id", "eos_token_id", "pad_token_id", "temperature", "top_k", "top_p", "do_sample", "use_cache"]
    names += ["cache_implementation", "repetition_penalty", "suppress_tokens", "_from_model_config", "unknown"]
    generation_config = data.draw(changes(st.sampled_from(names)) | VALUES)
    check(child, saved, "lm", generation_config=generation_config)


def check_bytes(child, saved, data, kind, part):
    """Replace some bytes of the configuration, or of the header of the weights."""
    content = bytearray((saved / kind / (CONFIG if part == "config" else WEIGHTS)).read_bytes())
    # A safetensors file is 8 bytes of header size, the header, and the data.
    end = len(content) if part == "config" else 8 + int.from_bytes(content[:8], "little")
    positions = st.integers(0, end - 1) if part == "config" else st.integers(0, 7) | st.integers(8, end - 1)
    for position, byte in data.draw(st.dictionaries(positions, st.integers(0, 255), min_size=1, max_size=4)).items():
        content[position] = byte
    check(child, saved, kind, **{part: bytes(content)})


@pytest.mark.parametrize(
    ("function", "args", "outcome"),
    [(os.abort, (), "BAD exit code -6"), (time.sleep, (60,), "BAD no end"), (bytearray, (2**40,), "BAD MemoryError")],
    ids=["crash", "hang", "memory"],
)
def test_the_child_reports_what_it_is_there_for(child, function, args, outcome):
    assert child.call(function, *args, seconds=1).startswith(outcome)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_load_and_work(child, saved, kind):
    assert check(child, saved, kind, config=read_config(saved, kind)) == "works"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2**16, 2**26, 2**31, 2**63, 10**18, 10**400])
def test_no_size_makes_the_loader_allocate_or_loop(child, saved, kind, size):
    config = read_config(saved, kind)
    names = [name for name, value in config.items() if type(value) is int] + ["num_labels"]
    for name in names:
        check(child, saved, kind, config=config | {name: size})
    backbone = config.get("backbone_config", {})
    for name in [name for name, value in backbone.items() if type(value) is int]:
        check(child, saved, kind, config=config | {"backbone_config": backbone | {name: size}})


@pytest.mark.parametrize("kind", KINDS)
@fuzz(60)
@given(st.data())
def test_any_configuration_loads_and_works_or_is_refused(child, saved, kind, data):
    check_config(child, saved, data, kind)


@pytest.mark.parametrize("kind", ["plucker", "plucker_on_grassmann"])
@fuzz(60)
@given(st.data())
def test_any_configuration_of_a_backbone_loads_and_works_or_is_refused(child, saved, kind, data):
    check_backbone_config(child, saved, data, kind)


@fuzz(60)
@given(st.data())
def test_any_generation_settings_load_and_work_or_are_refused(child, saved, data):
    check_generation_config(child, saved, data)


@pytest.mark.parametrize("part", ["config", "weights"])
@pytest.mark.parametrize("kind", ["lm", "plucker"])
@fuzz(60)
@given(st.data())
def test_replaced_bytes_load_and_work_or_are_refused(child, saved, kind, part, data):
    check_bytes(child, saved, data, kind, part)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@fuzz(1500, derandomize=False)
@given(st.data())
def test_many_files_load_and_work_or_are_refused(child, saved, kind, data):
    checks = [check_config, partial(check_bytes, part="config"), partial(check_bytes, part="weights")]
    checks += [check_backbone_config] if kind.startswith("plucker") else []
    data.draw(st.sampled_from(checks))(child, saved, data=data, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [None, "nope", "same"])
def test_code_that_a_checkpoint_names_is_not_run_unless_it_is_trusted(child, saved, kind, model_type):
    config = read_config(saved, kind) | {"auto_map": CODE}
    config |= {} if model_type == "same" else {"model_type": model_type}
    outcome = check(child, saved, kind, config=config)
    assert outcome == "works" if model_type == "same" else "trust_remote_code" in outcome


def test_the_code_would_leave_a_trace(saved):
    """What the test above looks for happens where the code is trusted."""
    folder = saved / "trusted"
    shutil.copytree(saved / "lm", folder)
    config = read_config(saved, "lm") | {"auto_map": CODE, "model_type": "nope"}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises((AttributeError, TypeError, ValueError)):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (saved / "ran").exists()
    (saved / "ran").unlink()
