"""All of a decoder in one call: what a token needs is looked at anew whenever it may have changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from test_fused import PADDED, PROMPT, answer, applied, same
from test_layer import PROMPTS, scores
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import caprese
from caprese.efficient_methods import applied_ffns
from caprese.inference.fused.model import WholeDecoder
from caprese.inference.generate import generate
from caprese.kernels.quantized import native
from caprese.models import unwrap
from caprese.models.cache import RoomyLayer, roomy_cache

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def _whole_ffns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caprese.inference.fused.forms.whole_is_faster", lambda *shape: True)
    monkeypatch.setattr("caprese.inference.fused.faster_form", lambda wrapper: "packed")  # what is timed is luck here


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


def _hook_on_the_norm(model: Any) -> None:
    unwrap(model).model.norm.register_forward_pre_hook(lambda module, given: (given[0] + 1,))


def _another_projection(model: Any) -> None:
    twin = copy.deepcopy(_layer(model).self_attn.k_proj)
    twin.weight.data = twin.weight.data * 2
    _layer(model).self_attn.k_proj = twin


def _forward_of_its_own(model: Any) -> None:
    layer = _layer(model)
    plain = layer.forward
    layer.forward = lambda x, **how: plain(2 * x, **how)


def _forward_for_another_attribute(model: Any) -> None:
    del _layer(model).mark
    _forward_of_its_own(model)


def _hook_on_the_decoder(model: Any) -> None:
    unwrap(model).model.register_forward_hook(lambda module, given, y: setattr(y, "last_hidden_state", 2 * y[0]))


def _same_storage(model: Any) -> None:
    linear = _ffn(model, 0).recovery.lora_B["default"]
    linear.weight = torch.nn.Parameter(linear.weight.data, requires_grad=False)
    with torch.no_grad():
        linear.weight.mul_(3)


def _rotation(model: Any) -> None:
    unwrap(model).model.rotary_emb.inv_freq.mul_(0.5)


def _fewer_layers(model: Any) -> None:
    unwrap(model).config.num_hidden_layers = 1


STAYS: list[Callable[[Any], None]] = [
    _scaled,
    _one_slot_off,
    _branch_in_place,
    _another_branch,
    _another_linear,
    _same_storage,
    _no_slot,
    _second_adapter,
    _hook_on_the_decoder,
    _rotation,
    lambda model: caprese.efficient_methods.phases_of(model).reselect(2),
]
ENDS: list[Callable[[Any], None]] = [
    _hook,
    _hook_on_the_norm,
    _another_projection,
    _forward_of_its_own,
    _forward_for_another_attribute,
    _fewer_layers,
    lambda model: model.train(),
]


@pytest.mark.parametrize("change", STAYS + ENDS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("spec", ["griffin:0.5", "static:0.3+q8:where=ffn"])
def test_what_changes_between_two_tokens_is_followed(
    spec: str, change: Callable[[Any], None], calls: list[str]
) -> None:
    found = []
    for fused in (False, True):
        model = applied("llama", spec)
        _layer(model).mark = True
        if fused:
            caprese.fuse(model)
            assert is_whole(model)
        calls.clear()
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
    assert calls.count("caprese_layers") == (7 if change in STAYS else 3)


def test_two_caches_take_turns(calls: list[str]) -> None:
    model = applied("llama", "griffin:0.5")
    wanted = [scores(model, PROMPTS[:1]), scores(model, PROMPTS[1:])]
    caprese.fuse(model)
    calls.clear()
    seen: list[list[torch.Tensor]] = [[], []]

    def sampler(at: int) -> Any:
        return lambda logits, rows: (seen[at].append(logits.clone()), logits.argmax(-1))[1]

    loops = [generate(model, PROMPTS[:1], 8, sampler(0)), generate(model, PROMPTS[1:], 8, sampler(1))]
    for _ in range(8):
        for loop in loops:
            next(loop)
    for got, expected in zip(seen, wanted, strict=True):
        same(torch.stack(got), expected)
    assert calls == ["caprese_layers"] * 14


@pytest.mark.parametrize("way", ["inputs_embeds", "output_hidden_states", "many"])
def test_a_cache_beside_it_that_is_not_for_one_call(way: str) -> None:
    """It fills the same steps."""
    model = applied("llama", "griffin:0.5")
    base, found = unwrap(model), []
    for fused in (False, True):
        if fused:
            caprese.fuse(model)
        caches = [roomy_cache(model), roomy_cache(model)]
        others = PROMPTS[1:] * (100 if way == "many" else 1)
        with torch.no_grad():
            base(torch.tensor(PROMPTS[:1]), past_key_values=caches[0])
            base(torch.tensor(others), past_key_values=caches[1])
            out = []
            for token in (7, 8, 9):
                out.append(base(torch.tensor([[token]]), past_key_values=caches[0]).logits)
                ids = torch.full((len(others), 1), token)
                how: Any = {"input_ids": ids}
                if way == "inputs_embeds":
                    how = {"inputs_embeds": base.model.embed_tokens(ids)}
                elif way == "output_hidden_states":
                    how["output_hidden_states"] = True
                out.append(base(**how, past_key_values=caches[1]).logits[:1])
        found.append(torch.stack(out))
    same(found[1], found[0])


def test_a_window_is_not_for_one_call() -> None:
    """Also where the cache does not know of it."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        config = MistralConfig(
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=258,
            sliding_window=8,
            initializer_range=0.3,
        )
        model = MistralForCausalLM(config).eval()
        caprese.apply(model, caprese.Griffin(sparsity=0.5))
        if fused:
            caprese.fuse(model)
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.tensor(PROMPTS[1:]), past_key_values=cache)
            found.append(torch.stack([model(torch.tensor([[t]]), past_key_values=cache).logits for t in range(5, 11)]))
    same(found[1], found[0])


@pytest.mark.parametrize("mask", ["spread", "turned", "float"])
def test_masks_as_they_lie(mask: str) -> None:
    model = applied("llama", "griffin:0.5:shared_choice=true")
    base, found = unwrap(model), []
    for fused in (False, True):
        if fused:
            caprese.fuse(model)
        cache = roomy_cache(model)
        given = torch.ones(2, 9, dtype=torch.bool)
        if mask == "spread":
            given = torch.ones(2, 1, dtype=torch.bool).expand(2, 9)
        elif mask == "turned":
            given[0, :3] = False
            given = given.T.contiguous().T
        elif mask == "float":
            given = given.float()
        with torch.no_grad():
            base(torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]] * 2), past_key_values=cache)
            found.append(base(torch.tensor([[7], [8]]), attention_mask=given, past_key_values=cache).logits)
    same(found[1], found[0])


def test_a_cache_of_another_s_is_its_own() -> None:
    """What was kept of it stays, and it may be used in and out of inference mode, and with gradients."""
    found = []
    for fused in (False, True):
        model = applied("llama", "griffin:0.5")
        base = unwrap(model)
        if fused:
            caprese.fuse(model)
        cache: Any = DynamicCache(config=base.config)
        with torch.inference_mode():
            base(torch.tensor(PROMPTS[:1]), past_key_values=cache)
            base(torch.tensor([[7]]), past_key_values=cache)
        with torch.no_grad():
            out = [base(torch.tensor([[8]]), past_key_values=cache).logits]
            kept = cache.layers[0].keys
            before = kept.clone()
            cache.crop(-2)
            out += [base(torch.tensor([[t]]), past_key_values=cache).logits for t in (9, 10)]
        assert torch.equal(kept, before)
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            base(torch.tensor(PROMPTS[:1]), past_key_values=cache)
            base(torch.tensor([[7]]), past_key_values=cache)
        x = base.model.embed_tokens(torch.tensor([[11]])).requires_grad_()
        y = base(inputs_embeds=x, past_key_values=cache).logits.sum()
        y = y + base(inputs_embeds=2 * x, past_key_values=cache).logits.sum()
        (gradient,) = torch.autograd.grad(y, x)
        found.append([*out, gradient])
    for got, wanted in zip(found[1], found[0], strict=True):
        same(got, wanted)


def test_a_cache_is_let_go() -> None:
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    cache: Any = roomy_cache(model)
    with torch.no_grad():
        for ids in (PROMPTS[0], [7], [8]):
            unwrap(model)(torch.tensor([ids]), past_key_values=cache)
    rooms = [weakref.ref(room) for layer in cache.layers for room in layer.rooms.values()]
    del cache
    gc.collect()
    assert not any(ref() is not None for ref in rooms)


def test_without_memory_the_cache_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    cache: Any = roomy_cache(model)
    plain = native.call

    def short(name: str, *rest: Any) -> None:
        raise MemoryError

    with torch.no_grad():
        unwrap(model)(torch.tensor(PROMPTS[:1]), past_key_values=cache)
        wanted = unwrap(model)(torch.tensor([[7]]), past_key_values=copy.deepcopy(cache)).logits
        monkeypatch.setattr(native, "call", short)
        with pytest.raises(MemoryError):
            unwrap(model)(torch.tensor([[7]]), past_key_values=cache)
        monkeypatch.setattr(native, "call", plain)
        assert cache.get_seq_length() == 5
        same(unwrap(model)(torch.tensor([[7]]), past_key_values=cache).logits, wanted)


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
    model = applied("llama", "griffin:0.5")
    caprese.fuse(model)
    cache = DynamicCache(config=unwrap(model).config)
    with torch.no_grad():
        for ids in ([[5, 6, 7]], [[8]], [[9]]):
            model(torch.tensor(ids), past_key_values=cache)
    assert all(type(layer) is RoomyLayer for layer in cache.layers)
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape[-2] == 5
