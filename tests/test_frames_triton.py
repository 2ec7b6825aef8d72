"""The kernels of orthonormal frames, against plain torch in float64."""

import math

import pytest
import torch

from modeling_grassmann import MemoryMixer
from modeling_grassmann.grassmann_memory import orthonormalise


pytest.importorskip("triton", reason="needs Triton")
from modeling_grassmann.frames_triton import by_token, frames_kernel, launch, orthonormalise_triton


ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def make_vectors(*shape, r, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2, r, generator=generator).to(DEVICE, dtype)


def with_gradient(function, vectors, eps):
    """Frames, and the gradient of vectors for some gradient of frames."""
    vectors = vectors.detach().requires_grad_()
    frames = function(vectors, eps)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(frames.shape, generator=generator, dtype=torch.float64)
    return frames, *torch.autograd.grad(frames, vectors, grad.to(frames))


def assert_close(actual, expected, vectors, tolerance):
    """Up to rounding, which is the larger the smaller the angle between two vectors."""
    first, second = vectors.double().unbind(-2)
    cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    sine_squared = (1 - cosine**2)[..., None, None]
    for a, b in zip(actual, expected, strict=True):
        assert ((a.double() - b) * sine_squared).abs().max() <= tolerance * (b * sine_squared).abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [2, 3, 8, 16, 20])
def test_frames_are_those_of_plain_torch_in_float64_with_gradients(r, dtype):
    # More planes than a program takes, the last one's not filled.
    vectors = make_vectors(3, 211, 2, r=r, dtype=dtype)
    frames, gradient = with_gradient(orthonormalise_triton, vectors, 1e-3)
    assert frames.dtype == torch.float32 and gradient.dtype == dtype
    expected = with_gradient(orthonormalise, vectors.double(), 1e-3)
    assert_close([frames], expected[:1], vectors, 1e-5)
    assert_close([gradient], expected[1:], vectors, 1e-5 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["transposed", "tokens apart", "one plane"])
def test_vectors_may_have_any_strides(kind):
    vectors = make_vectors(5, 7, 3, r=4).transpose(0, 1)
    if kind == "tokens apart":
        vectors = make_vectors(5, 7, 5, r=4)[:, :, 1:4]
        assert by_token(vectors).data_ptr() == vectors.data_ptr(), "not copied"
    if kind == "one plane":
        vectors = vectors[2, 3, 1]
    expected = with_gradient(orthonormalise, vectors.double(), 1e-3)
    assert_close(with_gradient(orthonormalise_triton, vectors, 1e-3), expected, vectors, 1e-5)


def test_no_vectors_have_no_frames():
    vectors = make_vectors(0, 5, r=4).requires_grad_()
    frames = orthonormalise_triton(vectors, 1e-3)
    assert frames.shape == torch.autograd.grad(frames.sum(), vectors)[0].shape == (0, 5, 2, 4)


def test_vectors_that_span_no_plane_have_zero_frames_and_zero_gradients():
    vectors = make_vectors(6, r=5)
    vectors[0, 0] = 0
    vectors[1, 1] = 0
    vectors[2, 1] = -3 * vectors[2, 0]
    angle = torch.tensor([0.99e-3, 1.01e-3]).asin()
    vectors[3:5, 0] = torch.tensor([2.0, 0, 0, 0, 0])
    vectors[3:5, 1] = 0
    vectors[3:5, 1, 0], vectors[3:5, 1, 3] = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    frames, gradient = with_gradient(orthonormalise_triton, vectors, 1e-3)
    spans = [False, False, False, False, True, True]
    assert frames.any((-1, -2)).tolist() == gradient.any((-1, -2)).tolist() == spans
    assert gradient.isfinite().all()


def test_nearly_parallel_vectors_keep_orthonormal_frames():
    first = make_vectors(100, r=8)[:, 0]
    second = 3 * first + 0.02 * make_vectors(100, r=8, seed=1)[:, 0]
    frames = orthonormalise_triton(torch.stack([first, second], dim=1), 1e-3)
    identity = torch.eye(2, device=DEVICE).expand(100, 2, 2)
    torch.testing.assert_close(frames @ frames.mT, identity, rtol=0, atol=1e-3 / math.sqrt(8))


def test_the_mixer_makes_its_frames_with_them(monkeypatch):
    """Of rows; a token alone, as in decoding, is left to plain torch."""
    asked = []

    def frames(vectors, eps):
        asked.append(vectors.shape)
        return orthonormalise_triton(vectors, eps)

    monkeypatch.setattr("modeling_grassmann.grassmann_memory.orthonormalise_triton", frames)
    mixer = MemoryMixer(16, num_heads=2, reduced_size=4, value_size=8, backend="triton").to(DEVICE)
    mixer(torch.randn(2, 9, 16, device=DEVICE))
    assert asked == [(2, 9, 2, 2, 4)] * 2
    mixer.backend = "auto"
    mixer(torch.randn(2, 1, 16, device=DEVICE))
    assert len(asked) == 2


def test_a_launch_with_an_option_that_the_kernel_does_not_have_is_refused():
    """On a GPU by Triton; in its interpreter, which would drop the option, by these tests' own rule."""
    vectors = make_vectors(1, 3, r=4).contiguous()  # (N, H, 2, r)
    grid, sizes, options = launch(vectors)
    frames = torch.empty_like(vectors)
    frames_kernel[grid](vectors, frames, *sizes, 1e-3, **options, num_warps=4)
    torch.testing.assert_close(frames, orthonormalise(vectors))
    with pytest.raises(KeyError, match="BLOCK_SIZE"):
        frames_kernel[grid](vectors, frames, *sizes, 1e-3, **options, BLOCK_SIZE=64)
