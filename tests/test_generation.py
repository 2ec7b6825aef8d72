# Copyright 2026 The modeling_grassmann authors.
# SPDX-License-Identifier: Apache-2.0
"""Every way to generate gives the tokens that generation without a decoding state gives."""

import copy
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from modeling_grassmann import GrassmannForCausalLM, GrassmannForSequenceClassification, GrassmannModel
from modeling_grassmann.cache_grassmann import CACHE_NAME


COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


@pytest.fixture(params=CACHES.values(), ids=CACHES.keys())
def make_cache(request):
    return request.param


def assert_equal(actual, expected):
    """Up to rounding; in float64 where that of float32 adds up, as a memory's squares and norms let it."""
    torch.testing.assert_close(actual, expected, atol=1e-5 if actual.dtype == torch.float32 else 1e-10, rtol=0)


def make_prompts(make_ids, lengths=(9, 2, 5)):
    """A ragged left-padded batch, and its rows without padding."""
    ids = make_ids(len(lengths), max(lengths))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, [row[-length:] for row, length in zip(ids, lengths)]


def generate(model, inputs, **options):
    """New tokens only."""
    inputs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    options = {"max_new_tokens": 20, "do_sample": False} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def make_gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=100, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def make_similar(model, noise):
    """An assistant that guesses right about half of the time, so that the rest has to be taken back."""
    torch.manual_seed(3)
    similar = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in similar.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return similar


# Ways to generate


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "constrained": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
}


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES.keys())
def test_cached_generation_of_a_ragged_batch_gives_the_uncached_tokens(options, cache, make_model, make_ids, flavour):
    model = make_model(**flavour)
    prompts, _ = make_prompts(make_ids)
    results = []
    for kwargs in ({"use_cache": False}, cache):
        torch.manual_seed(5)
        results.append(generate(model, prompts, **options, **kwargs))
    assert torch.equal(*results)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_each_row_of_a_ragged_batch_generates_what_it_generates_alone(options, cache, make_model, make_ids, flavour):
    model = make_model(**flavour)
    prompts, rows = make_prompts(make_ids)
    for together, row in zip(generate(model, prompts, **options, **cache), rows, strict=True):
        assert torch.equal(together, generate(model, row[None], **options)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_generation_gives_the_uncached_tokens(implementation, make_model, make_ids, flavour):
    # Transformers offloads with CUDA streams, so that this cannot run on a CPU alone.
    model = make_model(**flavour).cuda()
    prompts = {name: tensor.cuda() for name, tensor in make_prompts(make_ids)[0].items()}
    expected = generate(model, prompts, use_cache=False)
    # Compiled code around CUDA streams, with which Transformers offloads, ends in a crash of PyTorch 2.11.
    options = {"cache_implementation": implementation, "disable_compile": True}
    assert torch.equal(generate(model, prompts, **options), expected)


@pytest.mark.parametrize("assistant", ["itself", "similar", "gpt2"])
@pytest.mark.parametrize("padding", [0, 3])
def test_assisted_generation_gives_the_uncached_tokens(assistant, padding, make_model, make_ids, flavour):
    model = make_model(**flavour)
    mask = (torch.arange(9)[None] >= padding).long()
    inputs = {"input_ids": make_ids(1, 9) * mask, "attention_mask": mask}
    expected = generate(model, inputs, use_cache=False)
    assistant = {"itself": model, "similar": make_similar(model, 0.02), "gpt2": make_gpt2()}[assistant]
    assistant.generation_config.num_assistant_tokens = 6
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(generate(model, inputs, assistant_model=assistant), expected)


def test_a_model_assists_a_transformer(make_model, make_ids, flavour):
    target, ids = make_gpt2(), make_ids(1, 9)
    expected = generate(target, ids, use_cache=False)
    assistant = make_model(**flavour)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(generate(target, ids, assistant_model=assistant), expected)


def test_prompt_lookup_gives_the_uncached_tokens(make_model, make_ids, flavour):
    model = make_model(**flavour)
    # The prompt repeats itself, so that there is something to look up.
    ids = make_ids(1, 5).repeat(1, 3)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=4), expected)


# Transformers has no prompt lookup with a static cache.
@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, options) for kind in CACHES for options in ({}, {"prefill_chunk_size": 2})]
    + [("dynamic", {"prompt_lookup_num_tokens": 3})],
    ids=str,
)
def test_a_conversation_continues_from_the_returned_state(kind, options, make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(1, 6)
    cache = CACHES[kind](model.config)
    for turn in range(3):
        expected = model.generate(ids, max_new_tokens=7, do_sample=False, use_cache=False)
        ids = model.generate(ids, max_new_tokens=7, do_sample=False, past_key_values=cache, **options)
        assert torch.equal(ids, expected)
        ids = torch.cat([ids, make_ids(1, 4, seed=10 + turn)], dim=1)


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_prompt_in_chunks_gives_the_uncached_tokens(implementation, make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(2, 9)
    options = {"prefill_chunk_size": 4, "cache_implementation": implementation, "disable_compile": True}
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=str)
def test_assistance_leaves_a_state_of_constant_size(options, make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(1, 9)
    if "assistant_model" in options:
        options = {"assistant_model": make_similar(model, 0.02)}
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    generate(model, ids, past_key_values=plain)
    generated = generate(model, ids, past_key_values=cache, **options)
    assert state_bytes(cache) == state_bytes(plain)
    with pytest.raises(ValueError, match="since 0 were recorded"):
        cache.crop(-1)
    ids = torch.cat([ids, generated], dim=1)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    assert state_bytes(cache) == state_bytes(plain)


def test_the_state_of_a_prompt_serves_several_continuations(make_cache, make_model, make_ids, flavour):
    model, prompt = make_model(**flavour), make_ids(1, 9)
    cache = make_cache(model.config)
    with torch.no_grad():  # a state that carries gradients cannot be copied
        model(prompt, past_key_values=cache)
    for seed in range(2):
        ids = torch.cat([prompt, make_ids(1, 3, seed=seed)], dim=1)
        continued = generate(model, ids, past_key_values=copy.deepcopy(cache))
        assert torch.equal(continued, generate(model, ids, use_cache=False))


# The decoding state


def feed(model, inputs, sizes, cache):
    """Logits of `inputs` given in chunks of `sizes` tokens, each with all of the mask so far."""
    logits, start = [], 0
    for size in sizes:
        chunk = {name: tensor[:, start : start + size] for name, tensor in inputs.items()}
        if "attention_mask" in inputs:
            chunk["attention_mask"] = inputs["attention_mask"][:, : start + size]
        logits.append(model(**chunk, past_key_values=cache, use_cache=True).logits)
        start += size
    assert start == inputs["input_ids"].shape[1]
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("sizes", [[1] * 24, [24], [2, 7, 1, 1, 13], [23, 1], [3] * 8], ids=str)
@pytest.mark.parametrize("layout", ["plain", "left_padded", "packed"])
def test_cached_logits_are_the_uncached_ones(layout, sizes, make_cache, make_model, make_ids, flavour):
    model = make_model(**flavour).double()
    inputs = {"input_ids": make_ids(2, 24)}
    real = torch.ones(2, 24, dtype=torch.bool)
    if layout == "left_padded":
        real = torch.arange(24) >= torch.tensor([[0], [5]])
        inputs["attention_mask"] = real.long()
    if layout == "packed":
        boundaries = ([4, 11, 9], [10, 1, 13])
        inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in boundaries])
    logits = feed(model, inputs, sizes, make_cache(model.config))
    assert_equal(logits[real], model(**inputs).logits[real])


def test_a_mask_of_the_new_tokens_alone_counts_on_from_those_seen(make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour).double(), make_ids(2, 14)
    cache = make_cache(model.config)
    model(ids[:, :9], past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
    assert_equal(logits[mask.bool()], model(ids).logits[:, 9:][mask.bool()])


@pytest.mark.parametrize("mask", ["none", "new_tokens", "all_tokens", "room", "adapter"])
def test_decoding_by_hand_counts_positions_on_behind_padding(mask, make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour).double(), make_ids(2, 12)
    full = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    cache = make_cache(model.config)
    model(ids[:, :7], attention_mask=full[:, :7], past_key_values=cache)
    logits = []
    for t in range(7, 12):
        given = {"none": None, "new_tokens": full[:, t : t + 1], "all_tokens": full[:, : t + 1]}
        # As long as it will ever be, with zeros for what is to come.
        given["room"] = torch.nn.functional.pad(full[:, : t + 1], (0, 30 - t))
        # An adapter's columns, for tokens that the state holds, before that of the new one.
        given["adapter"] = torch.nn.functional.pad(full[:, t : t + 1], (3, 0), value=1)
        given = given[mask]
        logits.append(model(ids[:, t : t + 1], attention_mask=given, past_key_values=cache).logits)
    assert_equal(torch.cat(logits, dim=1), model(ids, attention_mask=full).logits[:, 7:])


def state_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_the_state_does_not_grow_with_the_context(make_cache, make_model, make_ids):
    model = make_model(max_position_embeddings=None, offsets=[[1], [4], [16]])
    cache = make_cache(model.config)
    model(make_ids(1, 10), past_key_values=cache)
    after_10 = state_bytes(cache)
    model(make_ids(1, 480), past_key_values=cache)
    for token in make_ids(10, 1, 1):
        model(token, past_key_values=cache)
    assert cache.get_seq_length() == 500
    # Per token that is remembered: six reduced values of 4 bytes and a position of 8.
    assert state_bytes(cache) == after_10 == (1 + 4 + 16) * (6 * 4 + 8)


def continued_logits(model, cache, ids, mask=None):
    return model(ids, past_key_values=cache, attention_mask=mask).logits


ROW_OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
}


@pytest.mark.parametrize(("operation", "rows"), ROW_OPERATIONS.values(), ids=ROW_OPERATIONS.keys())
def test_an_operation_on_rows_moves_their_whole_state(operation, rows, make_cache, make_model, make_ids, flavour):
    model = make_model(**flavour).double()
    # Rows differ in their padding too, which the state remembers.
    mask = (torch.arange(17) >= torch.tensor([[0], [8], [9]])).long()
    ids = make_ids(3, 17)
    cache = make_cache(model.config)
    model(ids[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
    operation(cache)
    assert cache.batch_size == len(rows)
    # An operation on an empty cache must do no harm either.
    operation(make_cache(model.config))
    ids, mask = ids[rows], mask[rows]
    assert_equal(continued_logits(model, cache, ids[:, 11:], mask), model(ids, attention_mask=mask).logits[:, 11:])


@pytest.mark.parametrize("removed", [0, 1, 5, 8])
def test_crop_takes_back_recorded_tokens(removed, make_cache, make_model, make_ids, flavour):
    model, ids, others = make_model(**flavour).double(), make_ids(2, 20), make_ids(2, 6, seed=9)
    cache = make_cache(model.config)
    model(ids[:, :12], past_key_values=cache)
    size = state_bytes(cache)
    cache.activate_past_recording()
    model(ids[:, 12:17], past_key_values=cache)
    model(ids[:, 17:], past_key_values=cache)
    cache.crop(-removed)
    assert state_bytes(cache) == size
    assert cache.get_seq_length() == 20 - removed
    # Twice, because the state must also be fit to be recorded again.
    for _ in range(2):
        kept = torch.cat([ids[:, : 20 - removed], others], dim=1)
        assert_equal(continued_logits(model, cache, others), model(kept).logits[:, -6:])
        cache.crop(-6)


def test_crop_refuses_what_it_cannot_take_back(make_cache, make_model, make_ids):
    model = make_model()
    cache = make_cache(model.config)
    model(make_ids(1, 9), past_key_values=cache)
    with pytest.raises(ValueError, match=r"Cannot take back 2 tokens, since 0 were recorded.*activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(ValueError, match=r"`tokens_to_remove` must be zero or negative, got 4"):
        cache.crop(4)
    cache.activate_past_recording()
    model(make_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"Cannot take back 4 tokens, since 3 were recorded"):
        cache.crop(-4)


def test_offloading_leaves_the_small_state_untouched(make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour).double(), make_ids(2, 12)
    cache = make_cache(model.config)
    model(ids[:, :7], past_key_values=cache)
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        layer.offload()
        layer.prefetch()
        assert layer.keys is keys and layer.values is values
    assert_equal(continued_logits(model, cache, ids[:, 7:]), model(ids).logits[:, 7:])


@pytest.mark.parametrize("recording", [False, True], ids=["plain", "recording"])
def test_a_reset_state_is_as_good_as_new(recording, make_cache, make_model, make_ids, flavour):
    model = make_model(**flavour)
    cache = make_cache(model.config)
    model(make_ids(2, 9), past_key_values=cache)
    if recording:
        cache.activate_past_recording()
        model(make_ids(2, 4), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    if recording:
        # What was before the reset is gone, and must not come back.
        with pytest.raises(ValueError, match="Cannot take back 1 tokens, since 0 were recorded"):
            cache.crop(-1)
    # From position 1, so that an old neighbour at position 0 would be noticed.
    inputs = {"input_ids": make_ids(2, 12, seed=4), "position_ids": torch.arange(1, 13)[None]}
    assert_equal(model(**inputs, past_key_values=cache).logits, model(**inputs).logits)


def test_a_reset_state_serves_another_batch_and_another_backward_pass(make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour).double(), make_ids(3, 9)
    cache = make_cache(model.config)
    for rows in (3, 3, 2):
        gradients = []
        for past_key_values in (cache, None):
            logits = model(ids[:rows], past_key_values=past_key_values).logits
            gradients.append(torch.autograd.grad(logits.square().sum(), model.get_input_embeddings().weight)[0])
        assert_equal(*gradients)
        cache.reset()


def test_a_reset_state_keeps_its_addresses(make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(2, 9)
    cache, addresses = make_cache(model.config), []
    with torch.no_grad():
        for _ in range(2):
            model(ids, past_key_values=cache)
            layers = [(layer, (*layer.STATE, "cumulative_length")) for layer in cache.layers]
            addresses.append([getattr(layer, name).data_ptr() for layer, names in layers for name in names])
            cache.reset()
    assert addresses[0] == addresses[1]


def test_a_state_of_inference_mode_goes_on_outside_of_it(make_cache, make_model, make_ids, flavour):
    model, ids = make_model(**flavour), make_ids(2, 12)
    cache = make_cache(model.config)
    with torch.inference_mode():
        model(ids[:, :7], past_key_values=cache)
    with torch.no_grad():
        assert_equal(continued_logits(model, cache, ids[:, 7:]), model(ids).logits[:, 7:])


def test_a_length_that_was_asked_for_does_not_change(make_cache, make_model, make_ids):
    model, ids = make_model(), make_ids(1, 9)
    cache = make_cache(model.config)
    model(ids[:, :5], past_key_values=cache)
    length = cache.get_seq_length()
    model(ids[:, 5:], past_key_values=cache)
    assert (length, cache.get_seq_length()) == (5, 9)


@pytest.mark.parametrize("model_class", [GrassmannModel, GrassmannForCausalLM, GrassmannForSequenceClassification])
def test_a_state_may_be_given_by_either_of_its_names(model_class, make_model, make_ids):
    model, ids = make_model(model_class), make_ids(2, 9)
    outputs = []
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :5], **{name: cache})
        output = model(ids[:, 5:], **{name: cache})
        assert cache.get_seq_length() == 9 and output[CACHE_NAME] is cache
        outputs.append(output[0])
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="`past_key_values` and `cache` are two names of the same argument"):
        model(ids, past_key_values=cache, cache=cache)


def test_a_state_of_another_batch_is_refused_by_message(make_cache, make_model, make_ids, flavour):
    model = make_model(**flavour)
    cache = make_cache(model.config)
    model(make_ids(2, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="holds a state of 2 rows, but the batch has 3"):
        model(make_ids(3, 1), past_key_values=cache)


def test_a_state_made_for_another_model_is_refused_by_message(make_model, make_ids):
    # Without a configuration, Transformers makes an attention cache.
    with pytest.raises(ValueError, match=rf"`{CACHE_NAME}`.*config"):
        make_model()(make_ids(2, 5), past_key_values=DynamicCache())


# Compiled decoding


@pytest.mark.parametrize("backend", ["eager", COMPILER])
def test_compiled_decoding_compiles_once_and_gives_the_eager_logits(backend, make_model, make_ids):
    model = make_model(num_hidden_layers=2, offsets=[[1, 2], [4]])
    prompts, _ = make_prompts(make_ids)
    ids, mask = prompts["input_ids"], torch.nn.functional.pad(prompts["attention_mask"], (0, 10), value=1)
    ids = torch.cat([ids, make_ids(3, 10, seed=8)], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=19)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, 9:]
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        logits = []
        for t in range(9, 19):
            # Two steps to warm up, then eight that must not compile anything.
            with torch.compiler.set_stance("default" if t < 11 else "fail_on_recompile"):
                output = step(
                    ids[:, t : t + 1],
                    attention_mask=mask[:, t : t + 1],
                    position_ids=position_ids[:, t : t + 1],
                    past_key_values=cache,
                )
            logits.append(output.logits)
    assert_equal(torch.cat(logits, dim=1), expected)


def test_a_decoding_step_waits_for_no_value_of_a_tensor(make_cache, make_model, make_ids, flavour):
    reads = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    model, ids = make_model(**flavour).double(), make_ids(2, 12)
    mask = (torch.arange(12) >= torch.tensor([[0], [4]])).long()
    cache = make_cache(model.config)
    model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    for t in range(9, 12):
        with Record():
            # As `generate` calls it.
            inputs = model.prepare_inputs_for_generation(
                ids[:, t : t + 1],
                next_sequence_length=1,
                past_key_values=cache,
                attention_mask=mask[:, : t + 1],
                position_ids=(mask[:, : t + 1].cumsum(1) - 1).clamp(min=0),
                is_first_iteration=False,
                use_cache=True,
            )
            model(**inputs)
    assert cache.get_seq_length() == 12 and reads == []
    with Record():
        cache.get_seq_length().item()
    assert len(reads) == 1


def test_generate_with_a_compiled_static_state_gives_the_eager_tokens(make_model, make_ids, flavour):
    model = make_model(**flavour)
    prompts, _ = make_prompts(make_ids)
    expected = generate(model, prompts, use_cache=False, max_new_tokens=8)
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
    # Transformers compiles on accelerators only, unless told otherwise.
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = generate(model, prompts, cache_implementation="static", compile_config=compile_config, max_new_tokens=8)
    assert torch.equal(compiled, expected)
    # The prefill runs eagerly, and one graph of static shapes must serve every step after it.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
