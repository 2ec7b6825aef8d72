"""The mathematics: the naive reference against a brute-force restatement, the exact collapse against the reference."""

import math
import shutil
import subprocess
import sys
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_grassmann import PluckerMixer, plucker, plucker_features, wedge
from modeling_grassmann.plucker import NO_POSITION, is_pair, num_plucker_coordinates


BACKENDS = ["naive", "torch"]


def make_inputs(batch=2, length=9, past=0, heads=1, r=5, hidden=7, offsets=(1, 3), dtype=torch.float64, seed=0):
    """Leaves of [`plucker_features`], in its order, with offset weights last."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    source = draw(batch, past + length, heads, r)
    query = source[:, past:].detach().clone().requires_grad_()
    weight, bias = draw(hidden, heads * num_plucker_coordinates(r)), draw(hidden)
    return query, source, weight, bias, draw(heads, len(offsets))


def outputs_and_gradients(inputs, offsets, positions=None, eps=1e-6, backend="torch", seed=1):
    query, source, weight, bias, offset_weights = inputs
    output = plucker_features(query, source, weight, bias, list(offsets), positions, offset_weights, eps, backend)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leaves = [leaf for leaf in inputs if leaf is not None]
    return [output, *torch.autograd.grad(output, leaves, cotangent.to(output.dtype), materialize_grads=True)]


def smallest_sine(query, source, offsets, positions):
    """Smallest sine of the angle between the vectors of any pair; 1 if there is none."""
    smallest, length = 1.0, query.shape[1]
    for delta in offsets:
        past = plucker.shift(source, delta, length)
        sine = wedge(query, past).norm(dim=-1) / (query.norm(dim=-1) * past.norm(dim=-1))
        pair = is_pair(positions, delta, length)[..., None].expand_as(sine)
        smallest = min(smallest, sine[pair].min().item() if pair.any() else 1.0)
    return smallest


def brute_force(query, source, weight, bias, offset_weights, offsets, positions):
    """The paper's sums, one token, offset, head and coordinate at a time."""
    batch, length, heads, r = query.shape
    past_length = source.shape[1] - length
    output = torch.zeros(batch, length, weight.shape[0], dtype=query.dtype)
    for b, t in ((b, t) for b in range(batch) for t in range(length)):
        terms = []
        for index, delta in enumerate(offsets):
            s = past_length + t - delta
            row = positions[b].tolist()
            if not 0 <= s < source.shape[1] or NO_POSITION in (row[s], row[past_length + t]):
                continue
            if row[past_length + t] - row[s] != delta:
                continue
            planes = []
            for head in range(heads):
                z, y = query[b, t, head], source[b, s, head]
                plane = torch.stack([z[i] * y[j] - z[j] * y[i] for i, j in combinations(range(r), 2)])
                planes.append(offset_weights[head, index] * plane / plane.norm())
            terms.append(weight @ torch.cat(planes) + bias)
        if terms:
            output[b, t] = torch.stack(terms).mean(0)
    return output


@st.composite
def problems(draw):
    batch, length, past = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 5))
    magnitudes = draw(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    offsets = [draw(st.sampled_from([1, -1])) * magnitude for magnitude in magnitudes]
    inputs = make_inputs(
        batch,
        length,
        past,
        draw(st.integers(1, 3)),
        draw(st.integers(2, 8)),
        offsets=offsets,
        seed=draw(st.integers(0, 2**32)),
    )
    # Any integers make valid positions: padding, several packed sequences, gaps, repetitions.
    total = past + length
    rows = []
    for _ in range(batch):
        starts = draw(st.lists(st.integers(0, total), max_size=3))
        row = [i - max((s for s in starts if s <= i), default=0) for i in range(total)]
        padding = draw(st.sets(st.integers(0, total - 1), max_size=3))
        rows.append([NO_POSITION if i in padding else p for i, p in enumerate(row)])
    return inputs, offsets, torch.tensor(rows)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_collapse_equals_reference_in_outputs_and_every_gradient(problem):
    inputs, offsets, positions = problem
    sine = smallest_sine(inputs[0], inputs[1], offsets, positions)
    tolerance = 1e-10 * max(1.0, 0.1 / sine) ** 2
    expected = outputs_and_gradients(inputs, offsets, positions, backend="naive")
    actual = outputs_and_gradients(inputs, offsets, positions, backend="torch")
    for name, a, b in zip(["output", "query", "source", "weight", "bias", "offset_weights"], actual, expected):
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 1.0), name


@settings(max_examples=25, deadline=None)
@given(problems(), st.sampled_from(BACKENDS))
def test_both_backends_equal_the_papers_sums_written_out(problem, backend):
    inputs, offsets, positions = problem
    query, source, weight, bias, offset_weights = inputs
    with torch.no_grad():
        expected = brute_force(query, source, weight, bias, offset_weights, offsets, positions)
        actual = plucker_features(
            query, source, weight, bias, offsets, positions, offset_weights, eps=0.0, backend=backend
        )
    sine = smallest_sine(query, source, offsets, positions)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * max(1.0, 0.1 / sine) ** 2)


def test_an_offset_beyond_the_row_finds_no_neighbour_and_takes_no_memory():
    inputs = make_inputs(length=9, past=3, offsets=(1, 2**40, -(2**40)))
    # Padding for such a neighbour would not fit in any memory.
    actual, expected = (
        outputs_and_gradients(inputs, (1, 2**40, -(2**40)), backend=backend) for backend in ("torch", "naive")
    )
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend):
    inputs = make_inputs(batch=1, length=4, past=2, heads=2, r=3, hidden=2)
    positions = torch.tensor([[0, 1, NO_POSITION, 3, 0, 1]])

    def function(query, source, weight, bias, offset_weights):
        return plucker_features(query, source, weight, bias, [1, 2], positions, offset_weights, 1e-6, backend)

    assert torch.autograd.gradcheck(function, inputs)


# The unit roundoff of each type, times what a sum over P coordinates of size one may lose.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_equals_the_float64_reference_to_rounding(backend, dtype, tolerance):
    offsets = (1, 2, 4, 8, 12, 16)
    inputs = make_inputs(batch=3, length=33, r=16, hidden=24, heads=2, offsets=offsets, dtype=dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    positions = torch.arange(33).repeat(3, 1)
    positions[1, :5] = NO_POSITION
    positions[2, 20:] -= 20
    expected = outputs_and_gradients(exact, offsets, positions, eps=1e-3, backend="naive")
    actual = outputs_and_gradients(inputs, offsets, positions, eps=1e-3, backend=backend)
    for name, a, b in zip(["output", "query", "source", "weight", "bias", "offset_weights"], actual, expected):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= tolerance * b.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_geometry_in_float32(backend):
    mixer = PluckerMixer(32, 8, [1, 2])
    mixer.backend = backend
    hidden_states = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    expected = mixer(hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mixer(hidden_states)
    assert (actual - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["identical", "opposite", "zero query", "zero neighbour", "nearly parallel"])
def test_degenerate_pair_gives_zero_wedge_and_zero_gradient_and_still_counts(backend, kind):
    _, source, weight, bias, _ = make_inputs(batch=1, length=2, r=4, offsets=(1, 2))
    z, other = source[0, 0, 0].detach(), torch.tensor([0.3, -1.0, 0.2, 0.7], dtype=torch.float64)
    last = {
        "identical": z,
        "opposite": -2 * z,
        "zero query": 0 * z,
        "zero neighbour": z,
        "nearly parallel": z + 5e-4 * z.norm() / other.norm() * other,
    }[kind]
    first = 0 * z if kind == "zero neighbour" else z
    source = torch.stack([first, last])[None, :, None].clone().requires_grad_()
    output = plucker_features(source, source, weight, bias, [1], eps=1e-3, backend=backend)
    assert torch.equal(output[0, 0], torch.zeros_like(bias)), "no neighbour: no bias either"
    assert torch.equal(output[0, 1], bias)
    gradients = torch.autograd.grad(output.sum(), [source, weight])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_counts_as_a_plane_from_the_sine_eps_on(backend):
    weight, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for factor, expected in [(0.99, 0.0), (1.01, -1.0)]:
        angle = math.asin(1e-3 * factor)
        pair = torch.tensor([[1.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]], dtype=torch.float64)
        output = plucker_features(pair[None, :, None], pair[None, :, None], weight, bias, [1], backend=backend)
        assert output[0, 1].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_repeated_tokens_give_finite_features_and_bounded_gradients(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(1, 1, 1, 32, generator=generator)
    # Equal up to rounding: what a clamped norm turns into features of unit size and gradients of 1e9.
    noise = torch.finfo(dtype).eps * torch.randn(1, 40, 1, 32, generator=generator)
    source = (token + (noise if dtype == torch.float32 else 0)).expand(1, 40, 1, 32).to(dtype).requires_grad_()
    weight = torch.randn(8, num_plucker_coordinates(32), generator=generator).to(dtype)
    output = plucker_features(source, source, weight, None, [1, 2, 4], backend=backend)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), source)
    assert output.isfinite().all() and gradient.isfinite().all()
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_sequence_shorter_than_every_offset_gives_exact_zeros(backend, length):
    query, source, weight, bias, _ = make_inputs(length=length)
    output = plucker_features(query, source, weight, bias, [4, 9, -5], backend=backend)
    assert torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padding_holds_reaches_no_real_token(backend):
    query, source, weight, bias, _ = make_inputs(batch=1, length=8)
    positions = torch.tensor([[NO_POSITION, NO_POSITION, 0, 1, 2, 3, 4, NO_POSITION]])
    clean = plucker_features(query, source, weight, bias, [1, 3], positions, backend=backend)
    dirty_source = source.detach().clone()
    dirty_source[:, [0, 1, 7]] = float("nan")
    dirty_source.requires_grad_()
    dirty = plucker_features(query, dirty_source, weight, bias, [1, 3], positions, backend=backend)
    assert torch.equal(clean[:, 2:7], dirty[:, 2:7])
    alone = plucker_features(query[:, 2:7], source[:, 2:7], weight, bias, [1, 3], backend=backend)
    torch.testing.assert_close(clean[:, 2:7], alone)


def test_pairs_need_two_real_tokens_at_exactly_the_offset():
    # Two packed sequences of three tokens behind two padding tokens.
    positions = torch.tensor([[NO_POSITION, NO_POSITION, 0, 1, 2, 0, 1, 2]])
    assert is_pair(positions, 1, 8).int().tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]
    assert is_pair(positions, 2, 8).int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 1]]
    assert is_pair(positions, -1, 8).int().tolist() == [[0, 0, 1, 1, 0, 1, 1, 0]]
    # The neighbour must exist: positions that happen to fit must not pair the last token with the first.
    assert not is_pair(torch.tensor([[3, 1, 2]]), 2, 3)[0, 0] and not is_pair(torch.tensor([[0, 5, 2]]), 5, 3).any()


@pytest.mark.parametrize("r", range(2, 18))
def test_the_order_of_halves_holds_each_plucker_coordinate_once(r):
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 2, r, 7, dtype=torch.float64, generator=generator)  # (H, r, n)
    weight = torch.randn(3, 2 * num_plucker_coordinates(r), dtype=torch.float64, generator=generator)
    coordinates = plucker.wedge_of_halves(z, y).flatten(0, 1).t()
    columns = plucker.columns_of_halves(weight, 2, r)
    assert (coordinates != 0).sum() == 7 * 2 * num_plucker_coordinates(r)
    expected = wedge(*(vectors.permute(2, 0, 1) for vectors in (z, y))).flatten(1)
    torch.testing.assert_close(coordinates @ columns.t(), expected @ weight.t())
    if r & (r - 1) == 0:
        assert columns.shape == weight.shape


@pytest.mark.parametrize("r, heads", [(8, 1), (5, 2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_no_scatter_runs_over_tokens(compiled, r, heads):
    scatters = []

    def record(name, tensors):
        if any(word in name for word in ("scatter", "index_put", "index_add", "index_copy", "unfold_backward")):
            scatters.append([size for tensor in tensors if isinstance(tensor, torch.Tensor) for size in tensor.shape])

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            record(str(function), tree_leaves((args, kwargs)))
            return function(*args, **(kwargs or {}))

    def compiler(graph, inputs):
        for node in graph.graph.nodes:
            record(str(node.target), [argument.meta.get("val") for argument in node.all_input_nodes])
        return make_boxed_func(graph.forward)

    mixer = PluckerMixer(16, r, [1, 2, 4], num_heads=heads, backend="torch")
    torch._dynamo.reset()
    function = torch.compile(mixer, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)) if compiled else mixer
    # No other dimension has the length or the number of these tokens.
    hidden_states = torch.randn(3, 37, 16, requires_grad=True)
    with nullcontext() if compiled else Record():
        function(hidden_states).square().sum().backward()
    # The columns of the weight come in another order, which is undone by a scatter: the record is not empty.
    assert scatters
    assert not any(size in (37, 3 * 37) for sizes in scatters for size in sizes)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("r, heads", [(8, 1), (5, 2)])
def test_compiled_mixer_gives_the_eager_output_and_gradients(r, heads):
    """It compiles C++ for half a minute."""
    mixer = PluckerMixer(16, r, [1, 2, 4], num_heads=heads, backend="torch").double()
    hidden_states = torch.randn(3, 37, 16, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(37).repeat(3, 1)
    positions[0, :5] = NO_POSITION
    positions[1, 20:] -= 20
    torch._dynamo.reset()
    results = []
    for function in (mixer, torch.compile(mixer, fullgraph=True)):
        output = function(hidden_states, positions)
        results.append([output, *torch.autograd.grad(output.sin().sum(), [hidden_states, *mixer.parameters()])])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_wedge_is_alternating_and_depends_on_the_plane_alone():
    z, y = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(wedge(z, y), -wedge(y, z))
    assert torch.equal(wedge(z, z), torch.zeros(15, dtype=torch.float64))
    a, b, c, d = 2.0, -1.0, 0.5, 3.0
    torch.testing.assert_close(wedge(a * z + b * y, c * z + d * y), (a * d - b * c) * wedge(z, y))
    # The Plücker relation p12 p34 - p13 p24 + p14 p23 = 0 holds for every plane.
    p = wedge(z[:4], y[:4])
    torch.testing.assert_close(p[0] * p[5] - p[1] * p[4] + p[2] * p[3], torch.zeros((), dtype=torch.float64))


def test_mixer_is_the_papers_layer():
    torch.manual_seed(0)
    mixer = PluckerMixer(16, 4, [1, 2], layer_norm_eps=1e-5).double()
    h = torch.randn(2, 7, 16, dtype=torch.float64)
    z = (h @ mixer.reduce.weight.T + mixer.reduce.bias)[:, :, None]
    projection, ones, positions = mixer.plucker_proj, torch.ones(1, 2), torch.arange(7).expand(2, 7)
    g = brute_force(z, z, projection.weight, projection.bias, ones, [1, 2], positions)
    gate = torch.sigmoid(torch.cat([h, g], dim=-1) @ mixer.gate_proj.weight.T + mixer.gate_proj.bias)
    mixed = gate * h + (1 - gate) * g
    centred = mixed - mixed.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mixer(h), expected)


def test_mixer_files_work_without_transformers(tmp_path):
    # With the kernels beside it, as a package of two files.
    for name in ("plucker.py", "plucker_triton.py"):
        shutil.copy(Path(plucker.__file__).with_name(name), tmp_path)
    program = f"""
import sys
sys.modules["transformers"] = None
sys.path.insert(0, {str(tmp_path.parent)!r})
import torch
from {tmp_path.name}.plucker import PluckerMixer
print(PluckerMixer(16, 4, [1, 2])(torch.randn(2, 5, 16)).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 5, 16])" in done.stdout


def test_impossible_arguments_are_refused_by_name():
    query, source, weight, bias, _ = make_inputs()
    with pytest.raises(ValueError, match=r"must be one of \['auto', 'naive', 'torch', 'triton'\], got 'cuda"):
        plucker_features(query, source, weight, bias, [1], backend="cuda")
    with pytest.raises(ValueError, match="`weight` must have 1 x 10 columns"):
        plucker_features(query, source, weight[:, :-1], bias, [1])
    with pytest.raises(ValueError, match="`source` must be"):
        plucker_features(query, source[:, 1:], weight, bias, [1])
    with pytest.raises(ValueError, match=r"`reduced_size` must be at least 2.*got 1"):
        PluckerMixer(16, 1, [1])
    with pytest.raises(ValueError, match=r"`offsets` must be a non-empty list of integers from 1, got \[0\]"):
        PluckerMixer(16, 4, [0])
