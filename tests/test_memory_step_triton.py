# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""A decoding step in fused kernels reads, and leaves in the state, what the same layer in plain float64 does."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Cache, StaticCache

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM, MemoryMixer, cache_grassmann
from modeling_grassmann.cache_grassmann import MemoryCacheLayer
from modeling_grassmann.plucker import NO_POSITION


pytest.importorskip("triton", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def steps(monkeypatch):
    """A list that grows with every fused step."""
    calls, step = [], cache_grassmann.memory_step
    monkeypatch.setattr(cache_grassmann, "memory_step", lambda *args: calls.append(1) or step(*args))
    return calls


def make_mixer(kernel="binet_cauchy", num_heads=3, reduced_size=5, value_size=4, conv_size=4, seed=0):
    torch.manual_seed(seed)
    mixer = MemoryMixer(12, num_heads, reduced_size, value_size, kernel, conv_size, layer_idx=0, backend="triton")
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer.to(DEVICE)


def random_tokens(*shape):
    """The same on all devices: of what is hardly read, the norm makes more than rounding."""
    return torch.randn(*shape).to(DEVICE)


def in_float64(mixer):
    exact = copy.deepcopy(mixer).double()
    exact.backend = "torch"
    return exact


@torch.no_grad()
def decode(mixer, tokens, positions, prompt):
    """The first tokens at once, then one by one: outputs, and the state."""
    cache = Cache(layers=[MemoryCacheLayer()])
    parts = [(tokens[:, :prompt], positions[:, :prompt])]
    parts += [(tokens[:, t : t + 1], positions[:, t : t + 1]) for t in range(prompt, tokens.shape[1])]
    outputs = [mixer(part, where, cache) for part, where in parts]
    assert cache.get_seq_length() == tokens.shape[1]
    return torch.cat(outputs, dim=1), cache.layers[0].state_tensors()


def assert_same(mixer, tokens, positions, prompt=1, tolerance=1e-4):
    actual, state = decode(mixer, tokens, positions, prompt)
    expected, expected_state = decode(in_float64(mixer), tokens.double(), positions, prompt)
    real = (positions != NO_POSITION)[..., None]
    for a, b in [(actual * real, expected * real), *zip(state, expected_state, strict=True)]:
        scale = tolerance * b.abs().max().clamp(min=1) if b.is_floating_point() and b.numel() else 0
        torch.testing.assert_close(a.to(b.dtype), b, rtol=0, atol=float(scale))


# A row that goes on, one that starts two new sequences, one that is padded on the left, in the middle and at its end.
POSITIONS = [
    [0, 1, 2, 3, 4, 5, 6, 7],
    [0, 1, 2, 0, 1, 5, 6, 7],
    [NO_POSITION, 0, 1, NO_POSITION, 2, 3, 4, NO_POSITION],
]


@pytest.mark.parametrize(
    "kernel, r, value_size, conv_size",
    [(*sizes, n) for sizes in (("binet_cauchy", 2, 3), ("inner_squared", 6, 16)) for n in (1, 2, 4)]
    # More channels than a program holds.
    + [("binet_cauchy", 8, 24, 4), ("inner_squared", 17, 33, 2)],
)
def test_steps_are_those_of_the_layer_in_float64(kernel, r, value_size, conv_size, steps):
    mixer = make_mixer(kernel, reduced_size=r, value_size=value_size, conv_size=conv_size)
    tokens = random_tokens(3, 8, 12)
    assert_same(mixer, tokens, torch.tensor(POSITIONS, device=DEVICE))
    assert len(steps) == 7


@pytest.mark.parametrize("features, channels", [(64, 16), (256, 32), (512, 4)])
def test_a_state_may_be_read_in_blocks_of_any_size(features, channels, steps, monkeypatch):
    options = {"BLOCK": features, "BLOCK_V": channels, "num_warps": 4}
    monkeypatch.setattr("modeling_grassmann.memory_step_triton.state_options", lambda *_: options)
    mixer = make_mixer(reduced_size=8, value_size=24)
    assert_same(mixer, random_tokens(3, 8, 12), torch.tensor(POSITIONS, device=DEVICE))
    assert len(steps) == 7


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    padding=st.lists(st.booleans(), min_size=9, max_size=9),
    conv_size=st.integers(1, 5),
    prompt=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=10, deadline=None)
def test_steps_are_those_of_the_layer_wherever_sequences_begin_and_padding_lies(
    lengths, padding, conv_size, prompt, seed
):
    real = iter([position for length in lengths for position in range(length)] + list(range(9)))
    row = [NO_POSITION if is_padding else next(real) for is_padding in padding]
    mixer = make_mixer(num_heads=1, conv_size=conv_size, seed=seed)
    tokens = random_tokens(2, 9, 12)
    assert_same(mixer, tokens, torch.tensor([row, list(range(9))], device=DEVICE), prompt)


def test_a_plane_that_two_parallel_vectors_span_is_similar_to_nothing():
    mixer = make_mixer(conv_size=1)
    with torch.no_grad():
        mixer.key_proj.weight.unflatten(0, (3, 2, 5))[1, 1] = 2 * mixer.key_proj.weight.unflatten(0, (3, 2, 5))[1, 0]
    tokens = random_tokens(1, 5, 12)
    assert_same(mixer, tokens, torch.arange(5, device=DEVICE)[None])
    _, (memory, *_) = decode(mixer, tokens, torch.arange(5, device=DEVICE)[None], 1)
    assert not memory[:, 1].any() and memory[:, 0].any()


def test_one_row_of_positions_is_that_of_all_rows():
    mixer, tokens, positions = make_mixer(), random_tokens(3, 6, 12), torch.arange(6, device=DEVICE)[None]
    expected, expected_state = decode(mixer, tokens, positions.expand(3, 6), 3)
    actual, state = decode(mixer, tokens, positions, 3)
    assert torch.equal(actual, expected)
    assert all(map(torch.equal, state, expected_state))


class ColumnMajor(torch.nn.Linear):
    """A linear layer whose output lies channel by channel in memory."""

    def forward(self, tokens):
        return (self.weight @ tokens.flatten(0, 1).T).T.unflatten(0, tokens.shape[:2])


@pytest.mark.parametrize("name", ["query_proj", "key_proj", "value_proj", "decay_proj", "key_conv"])
def test_projections_and_weights_may_lie_in_memory_in_any_way(name, steps):
    mixer, tokens = make_mixer(), random_tokens(3, 6, 12)
    positions = torch.arange(6, device=DEVICE).expand(3, 6)
    expected, _ = decode(mixer, tokens, positions, 3)
    if name == "key_conv":
        mixer.key_conv = torch.nn.Parameter(mixer.key_conv.T.contiguous().T)
    else:
        layer = getattr(mixer, name)
        setattr(mixer, name, ColumnMajor(*layer.weight.T.shape, bias=False, device=DEVICE))
        getattr(mixer, name).weight = layer.weight
    actual, _ = decode(mixer, tokens, positions, 3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert len(steps) == 6


def test_a_batch_without_rows_and_a_key_without_a_convolution():
    mixer, cache = make_mixer(conv_size=1), Cache(layers=[MemoryCacheLayer()])
    for t in range(2):
        with torch.no_grad():
            output = mixer(torch.empty(0, 1, 12, device=DEVICE), torch.full((0, 1), t, device=DEVICE), cache)
    assert output.shape == (0, 1, 12)


def test_a_state_after_tokens_were_taken_back_is_the_one_before_them():
    """`record_past` ends with the tokens that are taken back, where Transformers ends assisted decoding."""
    mixer, tokens = make_mixer(), random_tokens(3, 7, 12)
    positions = torch.arange(7, device=DEVICE).expand(3, 7)
    expected, _ = decode(mixer, tokens, positions, 3)
    cache = Cache(layers=[MemoryCacheLayer()])
    with torch.no_grad():
        mixer(tokens[:, :3], positions[:, :3], cache)
        cache.activate_past_recording()
        mixer(tokens[:, 3:5], positions[:, 3:5], cache)
        cache.crop(-1)
        cache.layers[0].record_past = False
        actual = [mixer(tokens[:, t : t + 1], positions[:, t : t + 1], cache) for t in range(4, 7)]
    torch.testing.assert_close(torch.cat(actual, dim=1), expected[:, 4:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"num_heads": 2}, {"reduced_size": 4}, {"value_size": 3}, {"conv_size": 2}, {"kernel": "inner_squared"}, "batch"],
    ids=str,
)
def test_a_state_of_another_layer_or_batch_is_refused_and_stays_what_it_is(change):
    tokens, positions = random_tokens(3, 2, 12), torch.arange(2, device=DEVICE).expand(3, 2)
    cache = Cache(layers=[MemoryCacheLayer()])
    with torch.no_grad():
        make_mixer()(tokens[:, :1], positions[:, :1], cache)
        before = [tensor.clone() for tensor in cache.layers[0].state_tensors()]
        rows = 2 if change == "batch" else 3
        mixer = make_mixer(**({} if change == "batch" else change))
        with pytest.raises(ValueError, match="a cache of its own"):
            mixer(tokens[:rows, 1:], positions[:rows, 1:], cache)
    assert all(map(torch.equal, cache.layers[0].state_tensors(), before))


def test_a_padding_token_leaves_the_state_alone_whatever_it_holds():
    mixer = make_mixer()
    tokens = random_tokens(1, 4, 12)
    positions = torch.tensor([[0, 1, NO_POSITION, 2]], device=DEVICE)
    expected, state = decode(mixer, tokens, positions, 1)
    tokens[:, 2] = torch.inf
    actual, (memory, *_) = decode(mixer, tokens, positions, 1)
    assert torch.equal(memory, state[0])
    assert torch.equal(actual[:, [0, 1, 3]], expected[:, [0, 1, 3]])


def test_without_its_conditions_a_step_is_left_to_plain_torch(steps):
    tokens, positions = random_tokens(2, 3, 12), torch.arange(3, device=DEVICE).expand(2, 3)
    decode(in_float64(make_mixer()), tokens.double(), positions, 1)
    # No square.
    decode(make_mixer("projection"), tokens, positions, 1)
    # More numbers than a warp holds.
    for mixer in (
        make_mixer("inner_squared", num_heads=8, reduced_size=130),
        make_mixer(num_heads=17, reduced_size=16),
    ):
        cache = Cache(layers=[MemoryCacheLayer()])
        with torch.no_grad():
            # In a new state, pairs of tokens are read, which takes the interpreter long.
            for mixer.backend, token in (("torch", slice(0, 1)), ("triton", slice(1, 2))):
                mixer(tokens[:, token], positions[:, token], cache)
    mixer, cache = make_mixer(), Cache(layers=[MemoryCacheLayer()])
    # Gradients.
    for t in range(3):
        output = mixer(tokens[:, t : t + 1], positions[:, t : t + 1], cache)
    assert torch.autograd.grad(output.sum(), mixer.key_conv)[0].any()
    # Tokens that may be taken back.
    cache.layers[0].activate_past_recording()
    with torch.no_grad():
        mixer(tokens[:, :1], positions[:, 2:] + 1, cache)
    assert steps == []


def memory_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "reduced_size": 3}
    memory = {"num_memory_heads": 1, "memory_value_size": 8, "max_position_embeddings": None}
    model = GrassmannForCausalLM(GrassmannConfig(mixer_types="memory", norm_placement="pre", **sizes, **memory)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(DEVICE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_what_is_generated_is_what_plain_torch_generates(options, steps, monkeypatch):
    model = memory_model()
    ids = torch.randint(1, 50, (2, 6), device=DEVICE)
    mask = (torch.arange(6, device=DEVICE) >= torch.tensor([[0], [4]], device=DEVICE)).long()
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, "pad_token_id": 0} | options
    generated = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("GRASSMANN_BACKEND", backend)
        generated[backend] = model.generate(ids, attention_mask=mask, **options)
        assert bool(steps) == (backend == "triton")
    assert torch.equal(generated["torch"], generated["triton"])


def test_a_compiled_step_updates_the_state_in_place_and_compiles_once(monkeypatch):
    model = memory_model()
    ids = torch.randint(1, 50, (2, 10), device=DEVICE)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=10)
    monkeypatch.setenv("GRASSMANN_BACKEND", "torch")
    with torch.no_grad():
        expected = model(ids).logits[:, 4:]
        monkeypatch.setenv("GRASSMANN_BACKEND", "triton")
        model(ids[:, :4], past_key_values=cache)
        addresses = [tensor.data_ptr() for tensor in cache.layers[0].state_tensors()]
        logits = []
        for t in range(4, 10):
            with torch.compiler.set_stance("default" if t < 6 else "fail_on_recompile"):
                logits.append(step(ids[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert [tensor.data_ptr() for tensor in cache.layers[0].state_tensors()] == addresses
