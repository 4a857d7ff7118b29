"""Replay is stepping: what a recurrent state becomes does not depend on how its tokens came, nor on those let go."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lossless import PROMPTS, alone, batch_of
from transformers import DynamicCache

import caprese
from caprese.efficient_methods.mamba import Mixer, MixerState, replacements
from caprese.kernels.replay import Tokens, replay, verify
from caprese.kernels.scan import recurrence


def tokens(
    batch: int, length: int, heads: int, size: int, width: int, seed: int = 0
) -> tuple[Tokens, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, dt and B; A, C and a state, in float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    made = Tokens(
        normal(batch, length, heads, size), normal(batch, length, heads).exp(), normal(batch, length, heads, width)
    )
    return made, -normal(heads).exp(), normal(batch, length, heads, width), normal(batch, heads, size, width)


@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 9), st.data())
def test_replay_is_stepping(batch, known, new, data):
    heads, size, width = data.draw(st.sampled_from([(1, 4, 4), (3, 8, 4), (2, 5, 7)]))
    old, A, _, state = tokens(batch, known, heads, size, width)
    fresh, _, C, _ = tokens(batch, new, heads, size, width, seed=1)
    taken = torch.tensor([data.draw(st.integers(0, known)) for _ in range(batch)])
    masked = Tokens(old.x, old.dt * (torch.arange(known) < taken[:, None])[..., None], old.B)
    y, kept = verify(state, masked if known else None, fresh, A, C)
    for b in range(batch):
        n, one = int(taken[b]), slice(b, b + 1)
        right = state[one]
        if n:
            _, right = recurrence(old.x[one, :n], old.dt[one, :n], A, old.B[one, :n], old.B[one, :n], right)
        outputs, behind = recurrence(fresh.x[one], fresh.dt[one], A, fresh.B[one], C[one], right)
        assert torch.allclose(kept[one], right, rtol=1e-10) and torch.allclose(y[one], outputs, rtol=1e-9, atol=1e-9)
        assert torch.allclose(replay(kept[one], Tokens(*(t[one] for t in fresh)), A), behind, rtol=1e-10)


KINDS = ["llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "phi3"]


def mixers() -> list[Mixer]:
    """One of every shape that is mapped to: heads shared and not, biases, sizes of heads that are no part of D."""
    made = []
    for kind in KINDS:
        model = caprese.apply(tiny(kind), caprese.Mamba(keep_attention=0))
        made.append(replacements(model)[0].mixer)
    return made


MIXERS = mixers()


@settings(max_examples=40)
@given(st.sampled_from(range(len(MIXERS))), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.data())
def test_a_mixer_goes_on_as_if_it_had_never_read_what_was_let_go(which, rounds, data):
    """Blocks of several tokens and of one, of which each sequence keeps its own number; some forgotten whole."""
    mixer, batch = MIXERS[which], 2
    draw = torch.Generator().manual_seed(7)
    hidden = mixer.in_proj.in_features

    def some(length: int) -> torch.Tensor:
        return torch.randn(batch, length, hidden, generator=draw)

    cache = MixerState()
    first = some(3)
    mixer(first, cache=cache)
    texts = [first[b] for b in range(batch)]
    for extra in rounds:
        before = copy.copy(cache)
        cache.mark()
        block = some(extra + 1)
        parts = data.draw(st.sampled_from(["at once", "one by one", "both"]))
        begin = {"at once": 0, "one by one": extra + 1, "both": (extra + 1) // 2}[parts]
        given_ = [mixer(block[:, i : i + 1], cache=cache) for i in range(begin)]
        if begin <= extra:
            given_.append(mixer(block[:, begin:], cache=cache))
        outputs = torch.cat(given_, 1)
        for b in range(batch):
            whole = mixer(torch.cat([texts[b], block[b]])[None])[0]
            assert torch.allclose(outputs[b], whole[len(texts[b]) :], rtol=1e-4, atol=1e-5)
        if data.draw(st.booleans()):
            cache.put_back(before)
            continue
        taken = [data.draw(st.integers(0, extra + 1)) for _ in range(batch)]
        cache.keep(torch.tensor(taken))
        texts = [torch.cat([text, block[b, : taken[b]]]) for b, text in enumerate(texts)]
    last = some(1)
    y = mixer(last, cache=cache)
    for b in range(batch):
        assert torch.allclose(y[b], mixer(torch.cat([texts[b], last[b]])[None])[0, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["tokens", "length"])
def test_a_block_is_cropped_as_transformers_does(by):
    """Newer ones say by how many tokens, transformers 5.4 says how long it is to be."""
    mixer, draw = MIXERS[0], torch.Generator().manual_seed(7)
    x = torch.randn(2, 9, mixer.in_proj.in_features, generator=draw)
    cache = MixerState()

    def take_back(tokens: int) -> None:
        cache.crop(-tokens if by == "tokens" else cache.get_seq_length() - tokens)

    cache.activate_past_recording()
    mixer(x[:, :6], cache=cache)
    take_back(2)
    assert cache.get_seq_length() == 4
    mixer(x[:, 4:8], cache=cache)
    with pytest.raises(caprese.CapreseError, match="4 here, and not by 5"):
        take_back(5)
    take_back(3)
    assert cache.get_seq_length() == 5
    twin = copy.copy(cache)
    y = mixer(x[:, 5:6], cache=cache)
    assert torch.allclose(y, mixer(x[:, :6])[:, -1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(mixer(x[:, 5:6], cache=twin), y)
    twin.reorder_cache(torch.tensor([1, 0]))
    take_back(0)
    twin.crop(0)
    mirrored = mixer(x[:, 6:7].flip(0), cache=twin).flip(0)
    assert torch.allclose(mixer(x[:, 6:7], cache=cache), mirrored, rtol=1e-4, atol=1e-5)


def hybrid(*more: object, keep: object = (1,), stays: dict[str, Any] | None = None, **how: Any) -> torch.nn.Module:
    kept = list(keep) if isinstance(keep, tuple) else keep
    method = caprese.Mamba(keep_attention=kept, **(stays or {}))
    return caprese.apply(tiny_llama(eos_token_id=None), [method, *more], **how)


@pytest.mark.parametrize("stays", [{}, {"window": 5, "sinks": 1}, {"keep_heads": ["0/1"]}])
@pytest.mark.parametrize("keep", [(1,), 0.0])
def test_transformers_assisted_decoding_of_hybrids(keep, stays):
    plain = hybrid(keep=keep, stays=stays)
    model = hybrid(caprese.Griffin(sparsity=0.4), keep=keep, stays=stays)
    for assistant in (tiny_llama(eos_token_id=None), tiny_llama(seed=9, eos_token_id=None)):
        assistant.generation_config.num_assistant_tokens = 4
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = model.generate(ids, assistant_model=assistant, max_new_tokens=24, do_sample=False, pad_token_id=0)
            assert out[0, len(prompt) :].tolist() == alone(plain, prompt)


@pytest.mark.parametrize("every", [1, 5])
def test_hybrids_reselect(every):
    """Where nothing is dropped, reading generated tokens again changes nothing; where something is, the state is that
    of dense FFNs up to the last time."""
    plain = hybrid()
    right = [alone(plain, prompt) for prompt in PROMPTS]
    whole = hybrid(caprese.Griffin(sparsity=0.004), reselect_every=every)
    batch = batch_of(PROMPTS)
    out = whole.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert [row.tolist() for row in out[:, -24:]] == right
    sparse = hybrid(caprese.Griffin(sparsity=0.6), reselect_every=every)
    cache = DynamicCache(config=sparse.config)
    ids = torch.tensor([PROMPTS[0]])
    text = sparse.generate(ids, past_key_values=cache, max_new_tokens=2 * every + 2, do_sample=False)
    dense = DynamicCache(config=plain.config)
    plain(text[:, : cache.caprese_memory.pending.passes[0].offset], past_key_values=dense)
    before = next(iter(cache.caprese_memory.pending.layers.values()))
    assert torch.allclose(before.state, dense.layers[0].state, rtol=1e-3, atol=1e-5)
