# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The mathematics of windows: the exact collapse against sums over windows and pairs, written out."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_grassmann import PluckerWindowMixer, plucker_features, plucker_window_features
from modeling_grassmann.plucker import num_plucker_coordinates, window_pair_weights


SHARINGS = ["distance", "enumeration"]


def make_inputs(batch=3, length=9, heads=1, r=5, hidden=7, dtype=torch.float64, seed=0):
    """The leaves of [`plucker_window_features`], in its order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, r), (hidden, heads * num_plucker_coordinates(r)), (hidden,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [leaf.to(dtype).requires_grad_() for leaf in leaves]


def ragged_mask(length, seed=0):
    """Three rows: one without padding, one padded on the right, one with holes anywhere."""
    holes = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.7
    return torch.stack([torch.ones(length, dtype=torch.bool), torch.arange(length) < (length + 1) // 2, holes])


def pair_occurrences(length, window_size, stride, heads, sharing):
    """`(i, j, head)` of each pair of tokens, `i < j`, once for each window that holds both."""
    for start in range(stride - window_size, length, stride):
        for index, (a, b) in enumerate(combinations(range(window_size), 2)):
            head = (index if sharing == "enumeration" else b - a - 1) % heads
            if start + a >= 0 and start + b < length:
                yield start + a, start + b, head


def naive(reduced, weight, bias, real, window_size, stride, sharing):
    """Each pair's normalised plane, projected by its head, given to both tokens, averaged over all that it gets."""
    batch, length, heads, r = reduced.shape
    weight = weight.unflatten(-1, (heads, -1))
    rows = []
    for b in range(batch):
        terms = [[] for _ in range(length)]
        for i, j, head in pair_occurrences(length, window_size, stride, heads, sharing):
            if real[b, i] and real[b, j]:
                terms[i].append((i, j, head))
                terms[j].append((i, j, head))
        for occurrences in terms:
            if not occurrences:
                rows.append(0 * bias)
                continue
            i, j, head = torch.tensor(occurrences).T
            z, y = reduced[b, i, head], reduced[b, j, head]
            planes = torch.stack([z[:, k] * y[:, m] - z[:, m] * y[:, k] for k, m in combinations(range(r), 2)], -1)
            planes = planes / planes.norm(dim=-1, keepdim=True)
            rows.append((torch.einsum("dnp,np->nd", weight[:, head], planes) + bias).mean(0))
    return torch.stack(rows).unflatten(0, (batch, length))


def collapsed(reduced, weight, bias, real, window_size, stride, sharing, eps=1e-9):
    pair_weights = window_pair_weights(window_size, reduced.shape[2], sharing)
    return plucker_window_features(reduced, weight, bias, pair_weights, real, stride, eps)


def outputs_and_gradients(function, inputs, *args, **kwargs):
    output = function(*inputs, *args, **kwargs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, inputs, cotangent.to(output), materialize_grads=True)]


def assert_equals_naive(inputs, real, window_size, stride, sharing):
    expected = outputs_and_gradients(naive, inputs, real, window_size, stride, sharing)
    actual = outputs_and_gradients(collapsed, inputs, real, window_size, stride, sharing)
    for name, a, b in zip(["output", "reduced", "weight", "bias"], actual, expected, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm().item(), 1.0), name


# Which head takes which pair


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("window_size", [2, 5, 8])
def test_each_pair_of_a_window_belongs_to_one_head_with_opposite_signs_for_its_tokens(window_size, heads, sharing):
    weights = window_pair_weights(window_size, heads, sharing)
    assert weights.shape == (heads, window_size, window_size)
    assert torch.equal(weights, -weights.mT)
    assert torch.equal(weights.abs().sum(0), 1 - torch.eye(window_size))
    # Seen from the earlier token, the plane is as it is.
    assert torch.equal(weights.sum(0).triu(), torch.ones(window_size, window_size).triu(1))


def test_heads_share_out_the_pairs_as_documented():
    def pairs(sharing):
        weights = window_pair_weights(4, 3, sharing)
        return [[tuple(pair) for pair in (head > 0).nonzero().tolist()] for head in weights]

    assert pairs("distance") == [[(0, 1), (1, 2), (2, 3)], [(0, 2), (1, 3)], [(0, 3)]]
    assert pairs("enumeration") == [[(0, 1), (1, 2)], [(0, 2), (1, 3)], [(0, 3), (2, 3)]]


# The collapse


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("stride", [8, 4, 1])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 17])
def test_collapse_equals_the_sums_in_outputs_and_every_gradient(length, stride, heads, sharing):
    assert_equals_naive(make_inputs(length=length, heads=heads), ragged_mask(length), 8, stride, sharing)


def test_a_window_costs_no_more_than_the_text_in_it():
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is not torch.ops.aten.slice.Tensor:  # a view
                sizes.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    inputs, largest = make_inputs(length=9, heads=2), []
    for window_size in (9, 300):
        pair_weights, sizes = window_pair_weights(window_size, 2, "distance"), []
        with Record():
            plucker_window_features(*inputs, pair_weights, ragged_mask(9), window_size).sum().backward()
        # Without the weights of all pairs themselves.
        largest.append(max(size for size in sizes if size != pair_weights.numel()))
    assert largest[0] == largest[1]


@pytest.mark.parametrize(("stride", "heads", "sharing"), [(8, 4, "distance"), (4, 3, "enumeration")])
def test_collapse_equals_the_sums_over_many_windows(stride, heads, sharing):
    assert_equals_naive(make_inputs(length=63, heads=heads), ragged_mask(63), 8, stride, sharing)


@st.composite
def problems(draw):
    batch, length, heads = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 4))
    window_size = draw(st.integers(2, 9))
    stride = draw(st.sampled_from([s for s in range(1, window_size + 1) if window_size % s == 0]))
    inputs = make_inputs(batch, length, heads, draw(st.integers(4, 8)), seed=draw(st.integers(0, 2**32)))
    mask = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    return inputs, torch.tensor(mask).view(batch, length), window_size, stride, draw(st.sampled_from(SHARINGS))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_collapse_equals_the_sums_for_any_window_and_any_mask(problem):
    assert_equals_naive(*problem)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(batch=2, length=5, heads=2, r=3, hidden=2)
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *leaves: collapsed(*leaves, real, 4, 2, "distance"), inputs)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [2, 7])
def test_one_window_over_a_row_is_every_offset_on_both_sides(length, heads):
    reduced, weight, bias = make_inputs(length=length, heads=heads)
    offsets = [offset for offset in range(1 - length, length) if offset != 0]
    # A neighbour ahead gives z_i ∧ z_j; one behind gives z_j ∧ z_i, the opposite of what the window has.
    signs = [[(-1.0 if d > 0 else 1.0) * ((abs(d) - 1) % heads == head) for d in offsets] for head in range(heads)]
    expected = plucker_features(reduced, reduced, weight, bias, offsets, offset_weights=torch.tensor(signs))
    actual = collapsed(
        reduced, weight, bias, torch.ones(3, length, dtype=torch.bool), length, length, "distance", 1e-3
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_windows_that_do_not_overlap_share_nothing():
    reduced, weight, bias = make_inputs(length=17, heads=2)
    real = torch.ones(3, 17, dtype=torch.bool)
    whole = collapsed(reduced, weight, bias, real, 8, 8, "distance")
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        alone = collapsed(reduced[:, part], weight, bias, real[:, part], 8, 8, "distance")
        torch.testing.assert_close(whole[:, part], alone)
    assert torch.equal(whole[:, 16], torch.zeros_like(whole[:, 16])), "a token alone in its window: no bias either"


# Precision


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_low_precision_equals_the_float64_sums_to_rounding(dtype, tolerance, sharing):
    inputs = make_inputs(length=21, heads=2, r=8, hidden=24, dtype=dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    expected = outputs_and_gradients(naive, exact, ragged_mask(21), 8, 4, sharing)
    actual = outputs_and_gradients(collapsed, inputs, ragged_mask(21), 8, 4, sharing, eps=1e-3)
    for name, a, b in zip(["output", "reduced", "weight", "bias"], actual, expected, strict=True):
        assert a.dtype == dtype, name
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


def test_autocast_keeps_the_geometry_in_float32():
    torch.manual_seed(0)
    mixer = PluckerWindowMixer(32, 16, 8, 4, num_heads=2)
    hidden_states, real = torch.randn(3, 12, 32), ragged_mask(12)
    expected = mixer(hidden_states, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mixer(hidden_states, real)
    assert (actual - expected).norm() <= 2e-2 * expected.norm()


# Pairs that span no plane


@pytest.mark.parametrize(
    "kind", ["identical", "opposite", "zero first", "zero second", "both zero", "nearly parallel"]
)
def test_degenerate_pair_gives_zero_wedge_and_zero_gradient_and_still_counts(kind):
    reduced, weight, bias = make_inputs(batch=1, length=2, r=4)
    z, other = reduced[0, 0, 0].detach(), torch.tensor([0.3, -1.0, 0.2, 0.7], dtype=torch.float64)
    first, second = {
        "identical": (z, z),
        "opposite": (z, -2 * z),
        "zero first": (0 * z, z),
        "zero second": (z, 0 * z),
        "both zero": (0 * z, 0 * z),
        "nearly parallel": (z, z + 5e-4 * z.norm() / other.norm() * other),
    }[kind]
    reduced = torch.stack([first, second])[None, :, None].clone().requires_grad_()
    real = torch.ones(1, 2, dtype=torch.bool)
    output = collapsed(reduced, weight, bias, real, 8, 4, "distance", eps=1e-3)
    assert torch.equal(output, bias.expand_as(output))
    for gradient in torch.autograd.grad(output.sum(), [reduced, weight]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_degenerate_pairs_among_others_count_as_zeros():
    reduced, weight, bias = make_inputs(batch=1, length=3, r=4)
    z, y = reduced[0, :2, 0].detach()
    reduced = torch.stack([z, 3 * z, y])[None, :, None].requires_grad_()
    output = collapsed(reduced, weight, bias, torch.ones(1, 3, dtype=torch.bool), 3, 3, "distance", eps=1e-3)
    without_bias = collapsed(
        torch.stack([z, y])[None, :, None], weight, None, torch.ones(1, 2, dtype=torch.bool), 2, 2, "distance"
    )
    # The first two tokens have half of a pair's mean left; the last one has the same plane twice.
    expected = torch.stack([without_bias[0, 0] / 2, without_bias[0, 0] / 2, without_bias[0, 1]]) + bias
    torch.testing.assert_close(output[0], expected)
    (gradient,) = torch.autograd.grad(output.sum(), reduced)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_repeated_and_zero_tokens_give_the_bias_and_no_gradient(dtype):
    token = torch.randn(8, generator=torch.Generator().manual_seed(0))
    rows = torch.stack([token.expand(19, 8), torch.zeros(19, 8)])[:, :, None]
    reduced = rows.to(dtype).requires_grad_()
    _, weight, bias = make_inputs(r=8, dtype=dtype)
    output = collapsed(reduced, weight, bias, torch.ones(2, 19, dtype=torch.bool), 8, 4, "distance", eps=1e-3)
    assert torch.equal(output, bias.expand_as(output))
    (gradient,) = torch.autograd.grad(output.float().square().sum(), reduced)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_tokens_equal_up_to_rounding_give_bounded_gradients():
    generator = torch.Generator().manual_seed(0)
    noise = torch.finfo(torch.float32).eps * torch.randn(1, 40, 2, 16, generator=generator)
    reduced = (torch.randn(1, 1, 2, 16, generator=generator) + noise).requires_grad_()
    _, weight, bias = make_inputs(heads=2, r=16, dtype=torch.float32)
    output = collapsed(reduced, weight, bias, torch.ones(1, 40, dtype=torch.bool), 8, 4, "distance", eps=1e-3)
    (gradient,) = torch.autograd.grad(output.square().sum(), reduced)
    assert output.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() < 10


# Padding


@pytest.mark.parametrize("stride", [8, 2])
def test_what_padding_holds_reaches_no_real_token_and_no_gradient(stride):
    reduced, weight, bias = make_inputs(length=17, heads=2)
    real = ragged_mask(17)

    def run(garbage):
        dirty = reduced.detach().masked_fill(~real[..., None, None], garbage).requires_grad_()
        output = collapsed(dirty, weight, bias, real, 8, stride, "distance", eps=1e-3)[real]
        return [output, *torch.autograd.grad(output.square().sum(), [dirty, weight, bias])]

    clean = run(0.0)
    for garbage in (-3.0, 1e30):
        for a, b in zip(run(garbage), clean, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(clean[1][~real], torch.zeros_like(clean[1][~real]))


@pytest.mark.parametrize("stride", [8, 4, 1])
def test_right_padding_of_any_length_changes_nothing(stride):
    reduced, weight, bias = make_inputs(batch=1, length=11, heads=2)
    alone = collapsed(reduced, weight, bias, torch.ones(1, 11, dtype=torch.bool), 8, stride, "distance")
    for extra in (1, 4, 5, 20):
        padded = torch.cat([reduced, torch.randn(1, extra, 2, 5, dtype=torch.float64)], dim=1)
        real = torch.arange(11 + extra)[None] < 11
        output = collapsed(padded, weight, bias, real, 8, stride, "distance")
        torch.testing.assert_close(output[:, :11], alone, rtol=0, atol=1e-14)
        assert torch.equal(output[:, 11:], torch.zeros_like(output[:, 11:]))


# The layer


@pytest.mark.parametrize("sharing", SHARINGS)
def test_mixer_is_the_papers_layer(sharing):
    torch.manual_seed(0)
    mixer = PluckerWindowMixer(16, 8, 4, 2, num_heads=2, pair_sharing=sharing, layer_norm_eps=1e-5).double()
    torch.nn.init.normal_(mixer.plucker_proj.bias)
    h, real = torch.randn(3, 7, 16, dtype=torch.float64), ragged_mask(7)
    z = (h @ mixer.reduce.weight.T + mixer.reduce.bias).unflatten(-1, (2, 4))
    g = naive(z, mixer.plucker_proj.weight, mixer.plucker_proj.bias, real, 4, 2, sharing)
    gate = torch.sigmoid(torch.cat([h, g], dim=-1) @ mixer.gate_proj.weight.T + mixer.gate_proj.bias)
    mixed = gate * h + (1 - gate) * g
    centred = mixed - mixed.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mixer(h, real), expected)


@pytest.fixture
def reduced_matmul_precision():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(precision)


def test_parallel_vectors_stay_exact_zeros_where_matrix_products_are_inexact(reduced_matmul_precision):
    torch.manual_seed(0)
    # All tokens are multiples of one vector.
    reduced = torch.randn(2, 20, 1, 1) * torch.randn(1, 1, 4, 16)
    reduced.requires_grad_(True)
    weights = window_pair_weights(8, 4, "distance")
    projection = torch.randn(5, 4 * 120)
    real = torch.ones(2, 20, dtype=torch.bool)
    features = plucker_window_features(reduced, projection, None, weights, real, 8)
    assert not features.any()
    features.sum().backward()
    assert not reduced.grad.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_stride": 3}, r"`window_size` must be .* a multiple of `window_stride` \(3\), got 8"),
        ({"window_size": 1, "window_stride": 1}, "`window_size` must be at least 2"),
        ({"reduced_size": 10}, r"`reduced_size` must be a multiple of `num_heads` \(4\), .* got 10"),
        ({"reduced_size": 4}, "at least 2 dimensions a head, got 4"),
    ],
)
def test_an_impossible_mixer_is_refused(fields, message):
    sizes = {"hidden_size": 16, "reduced_size": 16, "window_size": 8, "window_stride": 8, "num_heads": 4}
    with pytest.raises(ValueError, match=message):
        PluckerWindowMixer(**(sizes | fields))
