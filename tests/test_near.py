"""One token's attention over a window, in C: against its words, in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama

import caprese
from caprese.kernels import native
from caprese.kernels.near import Sight, attend

SIGHTS = [Sight(), Sight(5), Sight(5, 2), Sight(1, 0), Sight(70, 4), Sight(None, 0, 9), Sight(12, 3, 20)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def written(q, keys, values, places, own, scaling, sight):
    y = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            g, here = h * keys.shape[1] // q.shape[1], int(own[b, 0])
            seen = []
            for t, place in enumerate(places[b].tolist()):
                near = sight.window is None or here - place < sight.window or place < sight.sinks
                if 0 <= place <= here and near and (sight.reach is None or here - place < sight.reach):
                    seen.append(t)
            if seen:
                shares = (scaling * keys[b, g, seen].double() @ q[b, h, 0].double()).softmax(0)
                y[b, h, 0] = shares @ values[b, g, seen].double()
    return y


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 4, 2, 7, 5), (2, 6, 2, 200, 32), (64, 4, 4, 70, 16)])
@torch.no_grad()
def test_what_is_near_is_attended_to(shape, sight):
    """In rooms with more behind, with holes and pads, the places of two windows not in their order."""
    batch, heads, groups, held, size = shape
    q = drawn(batch, 1, heads, size).transpose(1, 2)
    keys, values = (drawn(batch, groups, held + 3, size, seed=i)[:, :, :held] for i in (1, 2))
    places = torch.arange(held) - torch.arange(batch)[:, None]
    places = places.where((places >= 0) & (drawn(batch, held) < 1), -1)
    places[:, held // 2 :] = places[:, held // 2 :].flip(-1)
    own = places.amax(1, keepdim=True)
    y = attend(10 * q, keys, values, places, own, 0.3, sight)
    if native.library() is None:
        assert y is None
        return
    assert torch.allclose(y.double(), written(10 * q, keys, values, places, own, 0.3, sight), atol=1e-5)


@torch.no_grad()
def test_what_c_does_not_read_is_left_to_torch(monkeypatch):
    q, keys, values = drawn(2, 4, 1, 8), drawn(2, 2, 9, 8), drawn(2, 2, 9, 8, seed=1)
    places, own = torch.arange(9).expand(2, -1), torch.full((2, 1), 8)

    def taken(q=q, keys=keys, values=values):
        return attend(q, keys, values, places, own, 1.0, Sight(4)) is not None

    assert taken() == (native.library() is not None)
    assert not taken(q.bfloat16(), keys.bfloat16(), values.bfloat16())
    assert not taken(q.repeat(1, 1, 2, 1))  # two tokens
    assert not taken(keys=drawn(2, 9, 2, 8).transpose(1, 2))
    assert not taken(values=drawn(2, 2, 12, 8)[:, :, :9])  # in a room of another size than that of its keys
    with torch.enable_grad():
        assert not taken()
    monkeypatch.setattr(native, "library", lambda: None)
    assert not taken()


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@torch.no_grad()
def test_a_students_next_token_takes_it(monkeypatch):
    """Behind pads too, of which one text has some; torch gives the same."""
    model = caprese.apply(tiny_llama(), caprese.Mamba(keep_attention=0, window=4, sinks=1))
    ids, mask = torch.arange(24).view(2, 12) % 50, torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    real, called = native.call, []
    monkeypatch.setattr(native, "call", lambda name, *more: (called.append(name), real(name, *more))[1])

    def last():
        called.clear()
        cache = model(input_ids=ids[:, :11], attention_mask=mask[:, :11], use_cache=True).past_key_values
        return model(input_ids=ids[:, 11:], attention_mask=mask, past_key_values=cache).logits

    found = last()
    assert called.count("caprese_attend") == model.config.num_hidden_layers
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.allclose(last(), found, atol=1e-5) and not called
