# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""serve.py answers with what the model itself generates, over the protocol of OpenAI's client."""

import os
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


openai, *_ = (
    pytest.importorskip(package, reason="serving needs `pip install transformers[serving]`")
    for package in ("openai", "fastapi", "uvicorn")
)

SCRIPT = Path(__file__).parents[2] / "trainer_scripts" / "serve.py"
# Seconds that anything here may take; a loaded machine imports Transformers in many of them.
PATIENCE = 240
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}
{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
MESSAGES = [{"role": "user", "content": "What spans a plane?"}]
NEW_TOKENS = 12


def make_tokenizer():
    """One token a character. Unlike bytes, any of them decode to a text on their own."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    """Model, tokenizer and the folder that holds both."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_tokenizer()
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, str(folder)


def is_open(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """OpenAI's client of a server in another process, on a free port of this machine."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, SCRIPT, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=home, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_open(port):
            assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def generate(model, tokenizer, ids):
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(set(text)) > 1
    return text


@pytest.fixture(scope="module")
def reply(checkpoint):
    model, tokenizer, _ = checkpoint
    inputs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return generate(model, tokenizer, inputs["input_ids"])


def test_a_served_chat_gives_the_greedy_reply(client, checkpoint, reply):
    response = client.chat.completions.create(
        model=checkpoint[2], messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0
    )
    [choice] = response.choices
    assert choice.message.content == reply
    assert choice.finish_reason == "length"
    assert response.usage.completion_tokens == NEW_TOKENS


def test_a_streamed_chat_arrives_in_pieces_of_the_greedy_reply(client, checkpoint, reply):
    chunks = client.chat.completions.create(
        model=checkpoint[2], messages=MESSAGES, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == reply
    assert len(pieces) > 1


def test_a_served_completion_continues_the_prompt(client, checkpoint):
    model, tokenizer, folder = checkpoint
    prompt = "Two vectors span a plane"
    expected = generate(model, tokenizer, torch.tensor([tokenizer(prompt)["input_ids"]]))
    response = client.completions.create(model=folder, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0)
    assert response.choices[0].text == expected
