# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer: packed and flattened batches have the loss and the gradients of each example alone."""

import pytest
import torch
from corpus import train_tokenizer
from datasets import Dataset

from modeling_grassmann import GrassmannForCausalLM


trl = pytest.importorskip("trl", reason="TRL is not installed")

TEXTS = [
    "a small dog follows the cat",
    "the cat sees a house, and the dog sees the cat that sees the house behind the other house",
    "no dog",
    "a house and a dog",
    "the small cat follows no dog",
    "dogs see cats; cats see houses; houses see nothing at all, and that is all there is to see here",
]
# Shorter than some of the texts, so that packing has to cut them.
MAX_LENGTH = 24


def assert_close(actual, expected):
    """TRL computes the loss from the hidden states in float32, in an order of its own."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def chunks(ids):
    return [ids[start : start + MAX_LENGTH] for start in range(0, len(ids), MAX_LENGTH)]


# What each strategy makes of the examples, before it puts the pieces into rows.
PACKED = {
    "bfd": lambda examples: [ids[:MAX_LENGTH] for ids in examples],
    "bfd_split": lambda examples: [chunk for ids in examples for chunk in chunks(ids)],
    "wrapped": lambda examples: chunks([token for ids in examples for token in ids]),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Token ids of the texts, as SFTTrainer makes them: with an end."""
    return [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]


@pytest.fixture(scope="module")
def make_trainer(make_model, tokenizer, tmp_path_factory):
    def make(rows=None, model=None, trainer_arguments=None, **arguments):
        fields = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "max_length": MAX_LENGTH}
        fields |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        fields |= {"gradient_checkpointing": False}
        dataset = Dataset.from_list(rows or [{"text": text} for text in TEXTS])
        return trl.SFTTrainer(
            model or make_model(vocab_size=len(tokenizer)),
            trl.SFTConfig(str(tmp_path_factory.mktemp("sft")), **(fields | arguments)),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer,
            **(trainer_arguments or {}),
        )

    return make


def loss_alone(model, examples, prompt_lengths=None):
    """Mean loss over the predicted tokens of all examples, each of which the model sees by itself."""
    terms = []
    for ids, prompt_length in zip(examples, prompt_lengths or [1] * len(examples), strict=True):
        ids = torch.tensor(ids)
        logits = model(ids[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        terms.append(losses[prompt_length - 1 :])
    return torch.cat(terms).mean()


def assert_loss_is_that_of(trainer, examples, prompt_lengths=None):
    """The trainer's loss of its one batch, in training and in evaluation, and every gradient."""
    # The trainer gives its own model another forward.
    model = GrassmannForCausalLM(trainer.model.config).eval()
    model.load_state_dict(trainer.model.state_dict())
    expected = loss_alone(model, examples, prompt_lengths)
    expected.backward()

    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert_close(loss, expected)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    # The model's own forward gives it too.
    assert_close(model(**batch).loss, expected)
    return batch


@pytest.mark.parametrize("positions", [256, None], ids=["position_table", "no_positions"])
@pytest.mark.parametrize("strategy", PACKED)
def test_packed_examples_have_the_loss_and_gradients_of_each_alone(
    strategy, positions, make_trainer, make_model, tokenizer, examples
):
    pieces = PACKED[strategy](examples)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=positions)
    trainer = make_trainer(model=model, packing=True, packing_strategy=strategy)
    batch = assert_loss_is_that_of(trainer, pieces)
    if strategy == "wrapped":
        # It joins texts on purpose: a row is one sequence.
        assert batch["input_ids"].shape == (len(pieces), MAX_LENGTH)
        return
    assert "attention_mask" not in batch
    assert len(trainer.train_dataset) < len(pieces)
    assert batch["input_ids"].shape == (1, sum(map(len, pieces)))
    assert (batch["position_ids"] == 0).sum() == len(pieces)
    # Without positions that start anew, the pieces would be one text, and the loss another.
    joined = torch.arange(batch["input_ids"].shape[1])[None]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        one_sequence = {**batch, "position_ids": joined, "cu_seq_lens_q": None}
        assert abs(trainer.compute_loss(trainer.model, one_sequence) - loss) > 1e-3


@pytest.mark.parametrize("pad_to_multiple_of", [None, 8])
def test_a_batch_without_padding_has_the_loss_and_gradients_of_each_example_alone(
    pad_to_multiple_of, make_trainer, examples
):
    trainer = make_trainer(padding_free=True, max_length=None, pad_to_multiple_of=pad_to_multiple_of)
    length = sum(map(len, examples))
    multiple = pad_to_multiple_of or 1
    assert length % 8 != 0
    batch = assert_loss_is_that_of(trainer, examples)
    assert batch["input_ids"].shape == (1, -(-length // multiple) * multiple)


def test_a_padded_batch_has_the_loss_and_gradients_of_each_example_alone(make_trainer, examples):
    trainer = make_trainer(max_length=None)
    batch = assert_loss_is_that_of(trainer, examples)
    assert batch["input_ids"].shape == (len(examples), max(map(len, examples)))


@pytest.mark.parametrize("layout", ["padded", "flattened", "packed"])
def test_only_completions_count_where_there_are_prompts(layout, make_trainer, tokenizer):
    # At a space: both halves have the tokens that they have in the whole.
    cuts = [text.index(" ", len(text) // 4) for text in TEXTS]
    rows = [{"prompt": text[:cut], "completion": text[cut:]} for text, cut in zip(TEXTS, cuts, strict=True)]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    completions = [[*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id] for row in rows]
    examples = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    arguments = {
        "padded": {"max_length": None},
        "flattened": {"max_length": None, "padding_free": True},
        "packed": {"max_length": 64, "packing": True},
    }
    trainer = make_trainer(rows, **arguments[layout])
    batch = assert_loss_is_that_of(trainer, examples, [len(prompt) for prompt in prompts])
    assert (batch["labels"] != -100).sum() == sum(map(len, completions))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_training_lowers_the_loss(adapter, packing, make_trainer):
    arguments = {}
    if adapter:
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        arguments["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = make_trainer(
        packing=packing,
        trainer_arguments=arguments,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=12,
        gradient_checkpointing=True,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
