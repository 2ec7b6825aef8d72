"""What only a GPU can show: kernels in low precision, compiled training, decoding with CUDA graphs."""

import pytest
import torch

from modeling_grassmann import plucker_features, plucker_window_features
from modeling_grassmann.plucker import window_pair_weights


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_features_and_gradients_on_the_gpu_equal_the_float64_reference(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = {"source": (3, 129, 2, 32), "weight": (64, 2 * 496), "bias": (64,)}
    low = {name: torch.randn(shape, generator=generator).to("cuda", dtype) for name, shape in shapes.items()}
    cotangent = torch.randn(3, 129, 64, generator=generator)
    results = []
    for backend, target in [("torch", low), ("naive", {name: t.cpu().double() for name, t in low.items()})]:
        leaves = {name: tensor.requires_grad_() for name, tensor in target.items()}
        output = plucker_features(
            leaves["source"], leaves["source"], leaves["weight"], leaves["bias"], [1, 2, 16, 130], backend=backend
        )
        gradients = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output))
        results.append([tensor.cpu().double() for tensor in (output, *gradients)])
    for actual, expected in zip(*results):
        assert (actual - expected).norm() <= tolerance * expected.norm()


def test_compiled_training_gives_the_eager_loss_and_gradients(make_model, make_ids, flavour):
    model = make_model(**flavour).cuda().train()
    ids = make_ids(2, 33).cuda()
    expected = model(ids, labels=ids).loss
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True)(ids, labels=ids).loss
    gradients = torch.autograd.grad(actual, list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, expected_gradients):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


def test_decoding_with_cuda_graphs_gives_the_uncached_tokens(make_model, make_ids, flavour):
    model = make_model(**flavour).cuda()
    ids = make_ids(3, 9).cuda()
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [7]])).long().cuda()
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options, use_cache=False)
    torch._dynamo.reset()
    # Transformers compiles the decoding step of a static cache on a GPU, in mode `reduce-overhead`.
    assert torch.equal(model.generate(ids, **options, cache_implementation="static"), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one_is_the_same(make_model, make_ids, flavour):
    """As `device_map="auto"` has it for the layers that do not fit on the first device."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        model, ids = make_model(**flavour).to(device), make_ids(2, 40).to(device)
        gradients = torch.autograd.grad(model(ids, labels=ids).loss, model.parameters())
        results.append([model.generate(ids, max_new_tokens=5, do_sample=False), *gradients])
    assert torch.cuda.current_device() == 0
    for first, second in zip(*results):
        assert torch.equal(first.cpu(), second.cpu())


@pytest.mark.parametrize("stride", [8, 4])
def test_window_features_and_gradients_on_the_gpu_equal_those_of_float64(stride):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in [(3, 65, 4, 16), (64, 4 * 120), (64,)]]
    real, cotangent = torch.rand(3, 65, generator=generator) < 0.8, torch.randn(3, 65, 64, generator=generator)
    pair_weights = window_pair_weights(8, 4, "distance")
    results = []
    for device, dtype in [("cuda", torch.float32), ("cpu", torch.float64)]:
        inputs = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        output = plucker_window_features(*inputs, pair_weights.to(device), real.to(device), stride)
        gradients = torch.autograd.grad(output, inputs, cotangent.to(output))
        results.append([tensor.cpu().double() for tensor in (output, *gradients)])
    for actual, expected in zip(*results):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_a_classifier_in_bfloat16_autocast_stays_near_float32(make_classifier, make_ids, head_type):
    model, ids = make_classifier("bert", head_type=head_type).cuda(), make_ids(8, 33).cuda()
    expected = model(ids).logits
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = model(ids).logits
    assert (actual.float() - expected).norm() <= 5e-2 * expected.norm()


def test_a_compiled_classifier_gives_the_eager_loss_and_gradients(make_classifier, make_ids, head_type):
    model, ids = make_classifier("bert", head_type=head_type).cuda().train(), make_ids(2, 33).cuda()
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(33) < torch.tensor([[33], [20]])).long().cuda(),
        "labels": torch.tensor([0, 2]).cuda(),
    }
    expected = model(**inputs).loss
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True)(**inputs).loss
    gradients = torch.autograd.grad(actual, list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients, expected_gradients):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_in_autocast_has_finite_gradients_and_changes_every_weight(dtype, make_classifier, make_ids):
    model, ids = make_classifier("bert").cuda().train(), make_ids(8, 33)
    ids[0] = ids[0, 0]  # tokens that differ by their positions alone
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.autocast("cuda", dtype=dtype):
        loss = model(ids.cuda(), labels=(torch.arange(8) % 3).cuda()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
