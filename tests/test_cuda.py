"""What only a GPU can show: kernels in low precision, compiled training, decoding with CUDA graphs."""

import pytest
import torch

from modeling_grassmann import plucker_features


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
