# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The loss without logits is the loss with them, and so are its gradients."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from corpus import train_tokenizer
from datasets import Dataset
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_grassmann import loss_grassmann


# More tokens than one chunk holds on a CPU, and no multiple of it.
LENGTH = 150
needs_torch_loss = pytest.mark.skipif(
    loss_grassmann.LinearCrossEntropyOptions is None, reason="PyTorch has no chunked loss before 2.13"
)


@pytest.fixture
def model(make_model):
    return make_model(max_position_embeddings=LENGTH, use_cache=False).train()


@pytest.fixture
def batch(make_ids):
    """Three rows, of which the first words have no loss and the last one is padded."""
    ids = make_ids(3, LENGTH)
    mask = torch.ones_like(ids)
    mask[2, 40:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :7] = -100
    assert ids.numel() > loss_grassmann.CPU_CHUNK_SIZE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, **kwargs):
    model = copy.deepcopy(model)
    output = model(**kwargs)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def check_equal(model, batch, **tolerances):
    expected, expected_gradients = loss_and_gradients(model, skip_logits=False, **batch)
    output, gradients = loss_and_gradients(model, skip_logits=True, **batch)
    assert output.logits is None
    assert expected.logits is not None
    assert output.loss.dtype == expected.loss.dtype
    torch.testing.assert_close(output.loss, expected.loss, **tolerances)
    assert all(gradient is not None for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **tolerances)


@needs_torch_loss
@pytest.mark.parametrize("num_items", [None, 77, torch.tensor(77)], ids=["mean", "integer", "tensor"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_without_logits_are_those_with_them(tied, num_items, make_model, batch):
    model = make_model(max_position_embeddings=LENGTH, tie_word_embeddings=tied).train()
    check_equal(model, {**batch, "num_items_in_batch": num_items}, atol=1e-6, rtol=1e-5)


@needs_torch_loss
@pytest.mark.parametrize("with_labels", [True, False])
def test_labels_that_are_shifted_already_come_first(with_labels, model, batch):
    # Not what the labels would give: each token's neighbour but one.
    shift_labels = F.pad(batch["labels"], (0, 2), value=-100)[:, 2:].contiguous()
    expected = model(**batch, shift_labels=shift_labels).loss
    if not with_labels:
        del batch["labels"]
    loss = model(**batch, shift_labels=shift_labels, skip_logits=True).loss
    torch.testing.assert_close(loss, expected)


@needs_torch_loss
def test_a_batch_without_labels_that_count_has_no_number_as_its_loss_with_logits_or_without(model, batch):
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model(**batch).loss.isnan() and model(**batch, skip_logits=True).loss.isnan()
    assert model(**batch, skip_logits=True, num_items_in_batch=5).loss == 0


@needs_torch_loss
def test_the_loss_of_a_model_in_bfloat16_has_the_digits_of_float32(model, batch):
    model = model.bfloat16()
    hidden_states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = F.linear(hidden_states.double(), model.lm_head.weight.double())
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss = model(**batch, skip_logits=True).loss
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) < 1e-5 * exact
    # bfloat16 itself has two or three.
    assert abs(loss.bfloat16().double() - exact) > 1e-4 * exact


@needs_torch_loss
def test_under_autocast_gradients_are_as_close_to_exact_ones_as_with_logits(model, batch):
    _, exact = loss_and_gradients(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_gradients = loss_and_gradients(model, skip_logits=False, **batch)
        output, gradients = loss_and_gradients(model, skip_logits=True, **batch)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-2, atol=0)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error, usual = ((found - exact[name]).norm() for found in (gradient, expected_gradients[name]))
        assert error < 1.5 * usual + 1e-6, name


@needs_torch_loss
def test_nothing_as_large_as_the_logits_is_allocated(make_model, make_ids):
    model = make_model(max_position_embeddings=None, vocab_size=2000, use_cache=False).train()
    ids = make_ids(4, 512)

    def largest(skip_logits):
        with torch.profiler.profile(profile_memory=True) as profile:
            model(ids, labels=ids, skip_logits=skip_logits).loss.backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    logits = ids.numel() * 2000 * 4
    assert largest(False) >= logits
    assert largest(True) <= 1.1 * loss_grassmann.CPU_CHUNK_SIZE * 2000 * 4 < logits / 4


# When


@needs_torch_loss
def test_logits_are_left_out_in_training_with_labels_alone_and_come_when_asked_for(model, batch):
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**batch).logits is not None
    model.fused_loss = True
    assert model(**batch).logits is None
    assert model(**batch, skip_logits=False).logits is not None
    assert model(**batch, logits_to_keep=LENGTH).logits is not None
    assert model(**unlabelled).logits is not None
    assert model.eval()(**batch).logits is not None
    assert model(**batch, skip_logits=True).logits is None


def test_the_choice_is_no_part_of_a_checkpoint(model, tmp_path):
    model.fused_loss = True
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).fused_loss is False


@pytest.mark.parametrize("kwargs", [{"labels": None}, {"logits_to_keep": 1}, {"logits_to_keep": torch.tensor([3])}])
def test_without_labels_or_with_chosen_logits_there_is_nothing_to_skip(kwargs, model, batch):
    with pytest.raises(ValueError, match=r"`skip_logits=True` .* needs `labels`, and no `logits_to_keep`"):
        model(**(batch | kwargs), skip_logits=True)


def test_a_loss_function_of_the_users_own_is_not_replaced(model, batch):
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    model(**batch)
    model.fused_loss = True
    with pytest.raises(ValueError, match="`loss_function` of this model is another one"):
        model(**batch)


def test_an_adapter_on_the_output_layer_is_not_passed_over(model, batch):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model.fused_loss = True
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="`lm_head`, which must be a plain linear layer"):
        adapted(**batch)
    model.fused_loss = False
    assert adapted(**batch).loss.isfinite()


def test_a_missing_library_is_named(model, batch, monkeypatch):
    monkeypatch.setattr(loss_grassmann, "LinearCrossEntropyOptions", None)
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.13 or later .* `pip install -U torch`"):
        model(**batch, skip_logits=True)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ImportError, match="needs liger-kernel on a GPU: `pip install liger-kernel`"):
        loss_grassmann.liger_loss(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.long), -100)


# Accumulation, beside a model of Transformers


@pytest.fixture(params=["llama", "grassmann", pytest.param("fused", marks=needs_torch_loss)])
def any_model(request, make_model):
    if request.param != "llama":
        model = make_model(max_position_embeddings=LENGTH).train()
        model.fused_loss = request.param == "fused"
        return model
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, max_position_embeddings=LENGTH, **sizes)).train()


def test_losses_of_unequal_parts_of_a_batch_add_up_to_that_of_the_whole(any_model, batch):
    num_items = (batch["labels"][:, 1:] != -100).sum()
    expected, expected_gradients = loss_and_gradients(any_model, **batch)
    losses = []
    for rows in (slice(2), slice(2, 3)):
        part = {name: value[rows] for name, value in batch.items()}
        losses.append(any_model(**part, num_items_in_batch=num_items).loss)
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), expected.loss)
    for name, parameter in any_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-6, rtol=1e-5)


def make_trainer(model, make_ids, folder, **options):
    # As many labels that count in each row as in no other one.
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in make_ids(8, 20)]
    for index, row in enumerate(rows):
        row["labels"][: 2 * index] = -100
    arguments = {"output_dir": str(folder), "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    arguments |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    arguments |= {"use_cpu": not next(model.parameters()).is_cuda, "learning_rate": 1e-2, "prediction_loss_only": True}
    arguments = TrainingArguments(**(arguments | options))
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def losses_of(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, trainer.evaluate()["eval_loss"]]


@needs_torch_loss
def test_trainer_has_the_same_losses_without_logits(make_model, make_ids, tmp_path):
    expected = losses_of(make_trainer(make_model(), make_ids, tmp_path))
    model = make_model()
    model.fused_loss = True
    # Training would fail with it.
    model.lm_head.forward = lambda hidden_states: hidden_states[:0] if model.training else None
    trainer = make_trainer(model, make_ids, tmp_path)
    trainer.train()
    del model.lm_head.forward
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [*losses, trainer.evaluate()["eval_loss"]] == pytest.approx(expected, rel=1e-5)


# Liger


@pytest.fixture
def liger():
    pytest.importorskip("triton", reason="Triton is not installed")
    return pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")


@needs_torch_loss
def test_trainers_own_flag_leaves_logits_out_in_training_and_evaluation(liger, make_model, make_ids, tmp_path):
    expected = losses_of(make_trainer(make_model(), make_ids, tmp_path))
    model = make_model()
    trainer = make_trainer(model, make_ids, tmp_path, use_liger_kernel=True)
    model.lm_head.register_forward_hook(lambda *args: pytest.fail("There are logits."))
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-5)
    assert model.fused_loss


def test_ligers_configuration_can_leave_the_fused_loss_off(liger, make_model, make_ids, tmp_path):
    model = make_model()
    config = {"fused_linear_cross_entropy": False, "rope": True}
    make_trainer(model, make_ids, tmp_path, use_liger_kernel=True, liger_kernel_config=config).train()
    assert not model.fused_loss


def test_ligers_flag_changes_no_loss_in_trl_which_has_a_fused_head_of_its_own(liger, make_model, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    texts = ["a small dog follows the cat", "the cat sees a house, and the dog", "no dog"]
    tokenizer = train_tokenizer(texts, 280)
    data = Dataset.from_list([{"text": text} for text in texts])

    def losses(**options):
        options |= {"output_dir": str(tmp_path), "max_steps": 2, "logging_steps": 1, "max_length": 24, "use_cpu": True}
        options |= {"bf16": False, "report_to": "none", "disable_tqdm": True, "prediction_loss_only": True}
        model, arguments = make_model(vocab_size=len(tokenizer)), trl.SFTConfig(**options)
        datasets = {"train_dataset": data, "eval_dataset": data}
        return losses_of(trl.SFTTrainer(model, arguments, processing_class=tokenizer, **datasets))

    assert losses(use_liger_kernel=True) == pytest.approx(losses(), rel=1e-6)


# Liger's kernels need a GPU, or Triton's interpreter, which is chosen before anything is imported.
INTERPRETED = """
import torch
from modeling_grassmann import loss_grassmann

torch.manual_seed(0)
loss_grassmann.GPU_CHUNK_SIZE = 64
hidden_states, weight = torch.randn(300, 16, requires_grad=True), torch.randn(130, 16, requires_grad=True)
labels = torch.randint(130, (300,))
labels[::5] = -100
# Both learn, or the output layer alone.
for inputs in ((hidden_states, weight), (hidden_states.detach(), weight)):
    learned = [tensor for tensor in inputs if tensor.requires_grad]
    loss, expected = (f(*inputs, labels, -100) for f in (loss_grassmann.liger_loss, loss_grassmann.torch_loss))
    torch.testing.assert_close(loss, expected)
    gradients, others = (torch.autograd.grad(total / 77, learned) for total in (loss, expected))
    torch.testing.assert_close(gradients, others)
"""


@needs_torch_loss
def test_ligers_kernels_give_pytorchs_loss_and_gradients_in_the_interpreter(liger):
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_importing_the_package_does_not_import_liger(liger):
    code = "import sys, modeling_grassmann; sys.exit(any(name.startswith('liger') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


# Compilers


@needs_torch_loss
def test_one_graph_holds_the_loss_of_every_length(model, make_ids):
    torch._dynamo.reset()
    model.fused_loss = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for step, length in enumerate((140, 90, 33)):
        ids = make_ids(3, length, seed=length)
        expected, expected_gradients = loss_and_gradients(model, input_ids=ids, labels=ids)
        model.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
        torch.testing.assert_close(loss, expected.loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()


# GPUs


@pytest.fixture
def gpu(liger):
    if not torch.cuda.is_available():
        pytest.skip("There is no GPU.")


@pytest.fixture
def make_inputs():
    def make(length, vocab_size, dtype, hidden_size=64):
        generator = torch.Generator("cuda").manual_seed(0)
        hidden_states = torch.randn(length, hidden_size, device="cuda", generator=generator)
        weight = 0.3 * torch.randn(vocab_size, hidden_size, device="cuda", generator=generator)
        labels = torch.randint(vocab_size, (length,), device="cuda", generator=generator)
        labels[::5] = -100
        return hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels

    return make


def exact_loss(hidden_states, weight, labels):
    hidden_states, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight))
    loss = F.cross_entropy(F.linear(hidden_states, weight), labels, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))


def usual_loss(hidden_states, weight, labels):
    return F.cross_entropy(F.linear(hidden_states, weight).float(), labels, reduction="sum")


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 63, 2047, 2 * loss_grassmann.GPU_CHUNK_SIZE + 17])
def test_ligers_loss_and_gradients_are_as_close_to_exact_ones_as_the_usual_ones(
    length, dtype, autocast, gpu, make_inputs
):
    if autocast and dtype != torch.float32:
        pytest.skip("autocast is for models in float32")
    inputs = make_inputs(length, 5003, dtype)
    if length == 1:
        inputs[2].fill_(7)
    exact = exact_loss(*inputs)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        usual = usual_loss(*inputs)
        loss = loss_grassmann.summed_loss(*inputs, -100)
    assert loss.dtype == torch.float32
    # The mean is what comes before the optimizer, in every type of numbers.
    scale = 1 / (inputs[2] != -100).sum()
    usual_gradients = torch.autograd.grad(usual * scale, inputs[:2])
    gradients = torch.autograd.grad(loss * scale, inputs[:2])
    assert error(loss.detach(), exact[0]) <= 2 * error(usual.detach(), exact[0]) + 1e-6
    for gradient, other, expected, tensor in zip(gradients, usual_gradients, exact[1:], inputs):
        assert gradient.dtype == tensor.dtype
        assert error(gradient, expected * scale) <= 2 * error(other, expected * scale) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("num_items", [None, 77])
def test_ligers_loss_of_a_model_is_that_with_logits(num_items, gpu, model, batch):
    batch = {name: value.cuda() for name, value in batch.items()}
    check_equal(model.cuda(), {**batch, "num_items_in_batch": num_items}, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_ligers_loss_of_a_batch_without_labels_that_count_is_no_number(gpu, model, batch):
    batch = {name: value.cuda() for name, value in batch.items()} | {"skip_logits": True}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert model.cuda()(**batch).loss.isnan()


@pytest.mark.gpu
def test_an_output_layer_that_learns_alone_gets_its_gradient_from_liger(gpu, make_model, batch):
    model = make_model(max_position_embeddings=LENGTH, tie_word_embeddings=False).train().cuda()
    model.model.requires_grad_(False)
    batch = {name: value.cuda() for name, value in batch.items()}
    model(**batch).loss.backward()
    expected, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    model(**batch, skip_logits=True).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
def test_ligers_loss_takes_less_memory_than_the_logits(gpu, make_inputs):
    inputs = make_inputs(8 * loss_grassmann.GPU_CHUNK_SIZE, 20000, torch.bfloat16)

    def peak(loss):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(loss(), inputs[:2])
        return torch.cuda.max_memory_allocated() - before

    logits = inputs[2].numel() * 20000 * 2
    peak(lambda: loss_grassmann.summed_loss(*inputs, -100))
    assert peak(lambda: usual_loss(*inputs)) > 2 * logits
    assert peak(lambda: loss_grassmann.summed_loss(*inputs, -100)) < logits / 2


@pytest.mark.gpu
def test_a_compiled_model_trains_with_ligers_loss(gpu, model, make_ids):
    model = model.cuda()
    model.fused_loss = True
    ids = make_ids(3, LENGTH).cuda()
    expected, expected_gradients = loss_and_gradients(model, input_ids=ids, labels=ids)
    loss = torch.compile(model)(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
def test_trainer_on_a_gpu_has_the_same_losses_with_liger(gpu, make_model, make_ids, tmp_path):
    expected = losses_of(make_trainer(make_model().cuda(), make_ids, tmp_path))
    model = make_model().cuda()
    losses = losses_of(make_trainer(model, make_ids, tmp_path, use_liger_kernel=True))
    assert model.fused_loss
    assert losses == pytest.approx(expected, rel=1e-4)
