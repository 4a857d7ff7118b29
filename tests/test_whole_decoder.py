"""All of a decoder in one call: what a token needs is looked at anew whenever it may have changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from test_fused import PADDED, PROMPT, answer, applied, same
from test_layer import PROMPTS, scores

import caprese
from caprese.efficient_methods import applied_ffns
from caprese.inference.fused.model import WholeDecoder
from caprese.inference.generate import generate
from caprese.kernels.quantized import native
from caprese.models import unwrap
from caprese.models.cache import RoomyLayer

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def _whole_ffns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprese.inference.fused.forms.whole_is_faster", lambda *shape: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of C is called."""
    found: list[str] = []
    plain = native.call
    monkeypatch.setattr(native, "call", lambda name, *rest: (found.append(name), plain(name, *rest))[1])
    return found


def is_whole(model: Any) -> bool:
    return isinstance(unwrap(model).get_decoder(), WholeDecoder)


@pytest.mark.parametrize("ids", [PROMPT, PADDED])
def test_generate_of_transformers_is_one_call_a_token(ids: torch.Tensor, calls: list[str]) -> None:
    """With the cache that it makes, and padding."""
    model = applied("llama", "griffin:0.5+q8")
    wanted = answer(model, ids)
    caprese.fuse(model)
    calls.clear()
    same(answer(model, ids), wanted)
    assert calls == ["caprese_layers"] * 7
    beams = {"num_beams": 3, "max_new_tokens": 6}
    got = model.generate(input_ids=ids[:1], pad_token_id=0, **beams)
    caprese.unfuse(model)
    assert torch.equal(got, model.generate(input_ids=ids[:1], pad_token_id=0, **beams))


def _ffn(model: Any, index: int) -> Any:
    return list(applied_ffns(model).values())[index]


def _layer(model: Any) -> Any:
    return unwrap(model).model.layers[1]


def _scaled(model: Any) -> None:
    for wrapper in applied_ffns(model).values():
        wrapper.recovery.set_scale("default", 3.0)


def _one_slot_off(model: Any) -> None:
    _ffn(model, 1).recovery.enable_adapters(False)


def _branch_in_place(model: Any) -> None:
    with torch.no_grad():
        _ffn(model, 1).recovery.lora_B["default"].weight.mul_(3)


def _another_branch(model: Any) -> None:
    linear = _ffn(model, 0).recovery.lora_B["default"]
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2, requires_grad=False)


def _another_linear(model: Any) -> None:
    twin = copy.deepcopy(_ffn(model, 0).recovery.lora_A["default"])
    twin.weight.data.neg_()
    _ffn(model, 0).recovery.lora_A["default"] = twin


def _no_slot(model: Any) -> None:
    wrapper = _ffn(model, 1)
    wrapper.recovery = wrapper.recovery.base_layer


def _second_adapter(model: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for wrapper in applied_ffns(model).values():
        wrapper.recovery.lora_B["second"].weight.data.fill_(0.1)
    model.set_adapter("second")


def _hook(model: Any) -> None:
    _layer(model).self_attn.o_proj.register_forward_hook(lambda module, given, y: 2 * y)


def _hook_on_the_decoder(model: Any) -> None:
    unwrap(model).model.norm.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def _another_projection(model: Any) -> None:
    twin = copy.deepcopy(_layer(model).self_attn.k_proj)
    twin.weight.data = twin.weight.data * 2
    _layer(model).self_attn.k_proj = twin


def _forward_of_its_own(model: Any) -> None:
    layer = _layer(model)
    plain = layer.forward
    layer.forward = lambda x, **how: plain(2 * x, **how)


CHANGES: list[Callable[[Any], None]] = [
    _scaled,
    _one_slot_off,
    _branch_in_place,
    _another_branch,
    _another_linear,
    _no_slot,
    _second_adapter,
    _hook,
    _hook_on_the_decoder,
    _another_projection,
    _forward_of_its_own,
    lambda model: model.train(),
    lambda model: caprese.efficient_methods.phases_of(model).reselect(2),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("spec", ["griffin:0.5", "static:0.3+q8:where=ffn"])
def test_what_changes_between_two_tokens_is_followed(spec: str, change: Callable[[Any], None]) -> None:
    found = []
    for fused in (False, True):
        model = applied("llama", spec)
        if fused:
            caprese.fuse(model)
            assert is_whole(model)
        seen: list[torch.Tensor] = []

        def sampler(
            logits: torch.Tensor, rows: torch.Tensor, to: list[torch.Tensor] = seen, model: Any = model
        ) -> torch.Tensor:
            to.append(logits.clone())
            if len(to) == 4:
                change(model)
            return logits.new_full((len(logits),), 7, dtype=torch.long)

        for _ in generate(model, PROMPTS, 8, sampler):
            pass
        found.append(torch.stack(seen))
    same(found[1], found[0])


def test_two_caches_take_turns() -> None:
    model = applied("llama", "griffin:0.5")
    wanted = [scores(model, PROMPTS[:1]), scores(model, PROMPTS[1:])]
    caprese.fuse(model)
    seen: list[list[torch.Tensor]] = [[], []]

    def sampler(at: int) -> Any:
        return lambda logits, rows: (seen[at].append(logits.clone()), logits.argmax(-1))[1]

    loops = [generate(model, PROMPTS[:1], 8, sampler(0)), generate(model, PROMPTS[1:], 8, sampler(1))]
    for _ in range(8):
        for loop in loops:
            next(loop)
    for got, expected in zip(seen, wanted, strict=True):
        same(torch.stack(got), expected)


def test_a_decoder_that_does_more_stays() -> None:
    """Around layers of the kind that C computes."""
    model = tiny_llama()
    kind = type(model.model)

    def forward(self: Any, input_ids: torch.Tensor, **how: Any) -> Any:
        how["inputs_embeds"] = 2 * self.embed_tokens(input_ids)
        return kind.forward(self, **how)

    model.model.__class__ = type("Scaled", (kind,), {"forward": forward})
    caprese.apply(model, caprese.Griffin(sparsity=0.5))
    wanted = scores(model)
    caprese.fuse(model)
    assert not is_whole(model)
    same(scores(model), wanted)


def test_an_embedding_that_does_more_is_called() -> None:
    model = tiny_llama()
    kind = type(model.model.embed_tokens)
    model.model.embed_tokens.__class__ = type("Twice", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    caprese.apply(model, caprese.Griffin(sparsity=0.5))
    wanted = scores(model)
    caprese.fuse(model)
    assert is_whole(model)
    same(scores(model), wanted)


def test_positions_of_a_kind_that_depends_on_the_length() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    found = []
    for fused in (False, True):
        model = tiny_llama(max_position_embeddings=12, rope_parameters=scaling)
        caprese.apply(model, caprese.Griffin(sparsity=0.5))
        if fused:
            caprese.fuse(model)
            assert is_whole(model)
        found.append(scores(model, tokens=16))
    same(found[1], found[0])


def test_a_layer_that_is_unfused_takes_the_whole_along() -> None:
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    wanted = scores(model)
    _ffn(model, 1).unfuse()
    assert not is_whole(model)
    same(scores(model), wanted)
    caprese.unfuse(model)
    assert not any(isinstance(module, WholeDecoder) for module in model.modules())


def test_a_cache_of_transformers_is_written_in_place() -> None:
    from transformers import DynamicCache

    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    cache = DynamicCache(config=unwrap(model).config)
    with torch.no_grad():
        for ids in ([[5, 6, 7]], [[8]], [[9]]):
            model(torch.tensor(ids), past_key_values=cache)
    assert all(type(layer) is RoomyLayer for layer in cache.layers)
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape[-2] == 5
