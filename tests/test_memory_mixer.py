# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""The layer around the Grassmann memory is the one that is written down, and a model of such layers sees its past."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from modeling_grassmann import GrassmannConfig, GrassmannForCausalLM, MemoryMixer, modeling_grassmann
from modeling_grassmann.configuration_grassmann import MEMORY_KERNELS
from modeling_grassmann.grassmann_memory import KERNELS, choose_memory_backend
from modeling_grassmann.modeling_grassmann import is_plain_prompt
from modeling_grassmann.plucker import NO_POSITION


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_mixer(kernel="binet_cauchy", hidden_size=12, num_heads=3, reduced_size=5, value_size=4, seed=0):
    torch.manual_seed(seed)
    mixer = MemoryMixer(hidden_size, num_heads, reduced_size, value_size, kernel).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def memory_model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "reduced_size": 4}
    memory = {"mixer_types": "memory", "norm_placement": "pre", "max_position_embeddings": None}
    return GrassmannForCausalLM(GrassmannConfig(**(sizes | memory | fields))).eval()


def similarity(kernel, q, k):
    """κ of two sets of vectors, by principal angles instead of Gram determinants."""
    if KERNELS[kernel].num_vectors == 1:
        return (q[0] @ k[0]) ** (2 if kernel == "inner_squared" else 1)
    q, k = (torch.linalg.qr(vectors.T).Q for vectors in (q, k))  # (r, 2): other frames of the same planes
    cosines = torch.linalg.svdvals(q.T @ k)
    return cosines.prod() ** 2 if kernel == "binet_cauchy" else cosines.square().sum()


def restated(mixer, hidden_states):
    """A [`MemoryMixer`] as its docstring has it, for one row `(T, d)`, with loops over everything."""
    states = dict(mixer.named_parameters())
    outputs = []
    for t, h in enumerate(hidden_states):
        heads = []
        for head in range(mixer.num_heads):

            def of_head(name, token, head=head):
                return (states[f"{name}.weight"] @ token).view(mixer.num_heads, -1)[head]

            def vectors(name, token):
                return of_head(name, token).view(mixer.num_vectors, mixer.reduced_size)

            total = torch.zeros(mixer.value_size, dtype=h.dtype)
            for s in range(t + 1):
                decay = torch.tensor(1.0, dtype=h.dtype)
                for u in range(s + 1, t + 1):
                    decay = decay * torch.exp(
                        -F.softplus(of_head("decay_proj", hidden_states[u])[0] + states["decay_bias"][head])
                    )
                key = sum(
                    states["key_conv"][j].view(mixer.num_heads, mixer.num_vectors, -1)[head]
                    * vectors("key_proj", hidden_states[s - j])
                    for j in range(min(s + 1, len(states["key_conv"])))
                )
                kappa = similarity(mixer.kernel, vectors("query_proj", h), key)
                total = total + decay * kappa * of_head("value_proj", hidden_states[s])
            floor = F.softplus(states["norm.floor"][head])
            normed = total / (total.square().mean() + floor**2 + mixer.norm.eps).sqrt() * states["norm.weight"]
            heads.append(normed * F.silu(of_head("gate_proj", h)))
        outputs.append(states["out_proj.weight"] @ torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("kernel", ["binet_cauchy", "projection", "inner", "inner_squared"])
def test_the_mixer_is_what_its_docstring_says(kernel):
    mixer = make_mixer(kernel)
    hidden_states = torch.randn(7, 12, dtype=torch.double)
    torch.testing.assert_close(mixer(hidden_states[None])[0], restated(mixer, hidden_states), atol=1e-10, rtol=1e-8)


def test_a_mixer_alone_takes_padding_and_boundaries():
    mixer = make_mixer()
    rows = [torch.randn(length, 12, dtype=torch.double) for length in (5, 3)]
    alone = [mixer(row[None])[0] for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left", padding_value=9.0)
    positions = torch.tensor([[0, 1, 2, 3, 4], [NO_POSITION, NO_POSITION, 0, 1, 2]])
    together = mixer(padded, positions)
    torch.testing.assert_close(together[0], alone[0])
    torch.testing.assert_close(together[1, 2:], alone[1])
    packed = mixer(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 5, 8]))[0]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_hooks_and_other_layers_take_part_where_one_product_makes_all_projections():
    hidden_states = torch.randn(2, 9, 12, device=DEVICE)
    for name in ("query_proj", "key_proj", "value_proj", "gate_proj", "decay_proj"):
        mixer, calls = MemoryMixer(12, 2, 4, 8, backend="triton").to(DEVICE), []
        expected = mixer(hidden_states)
        layer = getattr(mixer, name)
        handle = layer.register_forward_hook(lambda *arguments, calls=calls: calls.append(arguments))
        torch.testing.assert_close(mixer(hidden_states), expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1, name
        handle.remove()
        handle = layer.register_full_backward_pre_hook(lambda *arguments, calls=calls: calls.append(arguments))
        mixer(hidden_states).sum().backward()
        assert len(calls) == 2, name
        handle.remove()
        setattr(mixer, name, torch.nn.Sequential(layer, torch.nn.Tanh()))
        assert (mixer(hidden_states) - expected).abs().max() > 1e-4, name


@pytest.mark.parametrize("chunks", ["one", "many"])
def test_the_kernels_give_what_plain_torch_gives(chunks, monkeypatch):
    if chunks == "many":
        monkeypatch.setattr("modeling_grassmann.grassmann_memory.choose_chunk_size", lambda *_: 16)
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        mixer = MemoryMixer(12, 2, 4, 8, backend=backend).to(DEVICE)
        hidden_states = torch.randn(2, 40, 12).to(DEVICE).requires_grad_()
        positions = torch.cat([torch.full((2, 3), NO_POSITION), torch.arange(37).repeat(2, 1)], dim=1).to(DEVICE)
        output = mixer(hidden_states, positions)[:, 3:]
        results.append([output, *torch.autograd.grad(output.sin().sum(), [hidden_states, *mixer.parameters()])])
    for expected, actual in zip(*results):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_backend_that_was_asked_for_computes_with_a_state_too(backend, make_model, make_ids, monkeypatch):
    asked = []

    def choose(backend, *arguments):
        asked.append(backend)
        return choose_memory_backend(backend, *arguments)

    monkeypatch.setattr("modeling_grassmann.grassmann_memory.choose_memory_backend", choose)
    memory = {"mixer_types": "memory", "norm_placement": "pre", "num_memory_heads": 1, "memory_reduced_size": 3}
    model = make_model(mixer_backend=backend, num_hidden_layers=1, offsets=[1], **memory)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(make_ids(1, 5), past_key_values=cache)
        cache.activate_past_recording()
        model(make_ids(1, 3), past_key_values=cache)
        cache.crop(-1)
    # A prompt, more tokens, and those of them that are written again.
    assert asked == 3 * [backend]


def test_the_configuration_names_the_kernels_there_are():
    assert {name: kernel.num_vectors for name, kernel in KERNELS.items()} == MEMORY_KERNELS


def test_heads_begin_with_time_constants_from_2_to_512_tokens():
    model = memory_model(num_memory_heads=5)
    for layer in model.model.layers:
        constants = 1 / F.softplus(layer.mixer.decay_bias)
        torch.testing.assert_close(constants, torch.tensor([2.0, 8.0, 32.0, 128.0, 512.0]))


def test_a_memory_sees_its_first_token_and_no_later_one():
    model = memory_model()
    ids = torch.randint(50, (1, 300))
    changed = ids.clone()
    changed[0, 150] = (ids[0, 150] + 1) % 50
    difference = (model(changed).logits - model(ids).logits).abs().amax(-1)[0]
    assert difference[:150].max() == 0
    assert difference[150:].min() > 0


def test_a_models_size_and_state_do_not_depend_on_the_context():
    model = memory_model(memory_reduced_size=4, num_memory_heads=3, memory_value_size=7)
    sizes = set()
    for length in (1, 10, 500):
        cache = model(torch.randint(50, (2, length)), use_cache=True).past_key_values
        sizes.add(sum(layer.keys.numel() for layer in cache.layers))
    assert sizes == {2 * 2 * 3 * (4**2 * (4**2 - 1) // 12) * 7}


def test_layers_of_both_kinds_keep_states_of_both_kinds():
    model = memory_model(mixer_types=["memory", "plucker"])
    cache = model(torch.randint(50, (1, 9)), use_cache=True).past_key_values
    assert [type(layer).__name__ for layer in cache.layers] == ["MemoryCacheLayer", "PluckerCacheLayer"]


@pytest.mark.parametrize("record", [False, True])
def test_a_prompt_without_padding_leaves_what_it_leaves_with_positions(record, monkeypatch):
    model = memory_model(mixer_types=["memory", "plucker"]).double()
    ids = torch.randint(model.config.vocab_size, (2, 7))

    def read(**inputs):
        cache = DynamicCache(config=model.config)
        if record:
            cache.layers[0].activate_past_recording()
        with torch.no_grad():
            first = model(ids[:, :5], past_key_values=cache, **inputs).logits
            second = model(ids[:, 5:], past_key_values=cache).logits
        if record:
            cache.layers[0].crop(-3)
        return [first, second, *(getattr(cache.layers[0], name) for name in cache.layers[0].STATE)]

    plain = read(attention_mask=torch.ones(2, 5, dtype=torch.long))
    asked = []
    monkeypatch.setattr(modeling_grassmann, "is_plain_prompt", lambda *args: asked.append(args) or False)
    for actual, expected in zip(plain, read(), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(asked) == 2


def test_only_a_new_state_takes_rows_without_positions():
    model = memory_model()
    cache = DynamicCache(config=model.config)
    whole, rows = torch.arange(4).expand(2, 4), torch.tensor([[0, 1, 2, 3], [NO_POSITION, 0, 1, 2]])
    with torch.no_grad():
        assert is_plain_prompt(whole, cache)
        assert not is_plain_prompt(rows, cache)
        assert not is_plain_prompt(torch.tensor([[0, 1, 0, 1]]), cache)
        assert not is_plain_prompt(whole + 1, cache)
        model(torch.ones(2, 4, dtype=torch.long), past_key_values=cache)
        assert not is_plain_prompt(whole, cache)
        with pytest.raises(ValueError, match="`positions` are needed behind the tokens"):
            model.model.layers[0].mixer(torch.randn(2, 4, model.config.hidden_size), None, cache)
    # A gradient would have to wait for the device, too.
    assert not is_plain_prompt(whole, DynamicCache(config=model.config))


@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_feed_forward_network_multiplies_two_maps(gated):
    mlp = memory_model(gated_mlp=gated, hidden_act="silu").model.layers[0].mlp
    hidden_states = torch.randn(3, 32)
    inner = mlp.up_proj(hidden_states)
    inner = F.silu(mlp.gate_proj(hidden_states)) * inner if gated else F.silu(inner)
    torch.testing.assert_close(mlp(hidden_states), mlp.down_proj(inner))


def test_a_memory_learns_to_recall_what_offsets_cannot_reach():
    """Which of eight tokens was there, far back, has to be said at the end."""
    torch.manual_seed(0)

    def batch(size):
        ids = torch.randint(10, 50, (size, 40))
        ids[:, -2] = 1
        ids[:, -1] = ids[:, 5] = torch.randint(2, 10, (size,))
        return ids

    def accuracy(model):
        ids = batch(256)
        with torch.no_grad():
            return (model(ids).logits[:, -2].argmax(-1) == ids[:, -1]).float().mean().item()

    model = memory_model(hidden_dropout=0.0, embedding_dropout=0.0, initializer_range=0.2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(200):
        ids = batch(32)
        loss = F.cross_entropy(model(ids, use_cache=False).logits[:, -2], ids[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert accuracy(model) > 0.9
    # One in eight by chance.
    assert accuracy(memory_model()) < 0.3
