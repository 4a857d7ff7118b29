"""Bases whose decoder layers are not in memory: streamed from the checkpoint; tests/test_recovery.py shards them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import byte_tokenizer
from families import FAMILIES, tiny
from safetensors.torch import load_file, save_file

import caprese
from caprese.adapters import fingerprint
from caprese.data_gen import Sample
from caprese.distill.batches import make_batches
from caprese.distill.layerwise import accumulate, new_moments
from caprese.distill.streamed import moments_by_layer
from caprese.models import check_keepable
from caprese.models.residency import resident

# transformers calls the head of its checkpoints otherwise than in the model
RENAMED = {"gpt_neox"}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - RENAMED))
def test_streamed_it_computes_what_it_does_whole(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole, _ = caprese.load_base(str(tmp_path))
    streamed, _ = caprese.load_base(str(tmp_path), residency="streamed")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, whole(ids).logits)
    assert fingerprint(streamed) == fingerprint(whole)
    assert caprese.models.count_parameters(streamed) == caprese.models.count_parameters(whole)
    layer = caprese.models.find_ffns(streamed)[0].layer
    assert all(parameter.isnan().all() for parameter in layer.parameters())
    with resident(layer):
        assert all(
            torch.equal(p, dict(whole.named_parameters())[n])
            for n, p in streamed.named_parameters()
            if not p.isnan().any()
        )
        assert not any(parameter.isnan().any() for parameter in layer.parameters())
    assert all(parameter.isnan().all() for parameter in layer.parameters())


@pytest.mark.parametrize("family", sorted(RENAMED))
def test_a_checkpoint_of_other_names_is_refused(family, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(caprese.CapreseError, match=r"holds no lm_head\.weight; load the base whole"):
        caprese.load_base(str(tmp_path), residency="streamed")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3"])
def test_sums_layer_by_layer_are_those_of_one_pass(family):
    """Also where layers are called each in its own way: with sliding windows, other rotations, by position."""
    model = caprese.apply(tiny(family), caprese.Griffin(sparsity=0.5))
    generator = torch.Generator().manual_seed(0)
    lengths = [(12, 6), (20, 8), (16, 5), (9, 3)]
    rows = [Sample(torch.randint(3, 60, (n,), generator=generator).tolist(), at, "", "") for n, at in lengths]
    train, held_out = make_batches(rows[:2], 2), make_batches(rows[2:], 2)
    plain = [new_moments(model) for _ in range(2)]
    for sums, batches in zip(plain, (train, held_out), strict=True):
        accumulate(model, batches, sums)
    streamed = list(moments_by_layer(model, train, held_out))
    assert len(streamed) == len(plain[0])
    for number, pair in enumerate(streamed):
        for found, group in zip(pair, plain, strict=True):
            for name, expected in group[number].tensors().items():
                torch.testing.assert_close(found.tensors()[name], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["closed", "sequential"])
def test_an_adapter_of_a_streamed_base_is_that_of_the_whole_one(tiny_dir, small_recipe, tmp_path, how):
    settings = {"end_to_end": small_recipe.end_to_end.model_copy(update={"epochs": 0})}
    settings["layerwise"] = small_recipe.layerwise.model_copy(update={"how": how})
    found = {}
    for kind in ("whole", "streamed"):
        recipe = small_recipe.model_copy(update={**settings, "output": str(tmp_path / kind), "model": str(tiny_dir)})
        model, tokenizer = caprese.load_base(str(tiny_dir), residency=kind)
        found[kind] = (
            caprese.recover(model, tokenizer, recipe),
            load_file(tmp_path / kind / "adapter_model.safetensors"),
        )
    (report, ours), (expected, theirs) = found["streamed"], found["whole"]
    assert report["samples"] == expected["samples"] and report["latency"] is None
    products = [
        {
            name[:-13]: tensors[name[:-13] + "lora_B.weight"] @ tensors[name]
            for name in tensors
            if name.endswith("lora_A.weight")
        }
        for tensors in (ours, theirs)
    ]
    assert products[0] and any(product.any() for product in products[1].values())
    for name, product in products[1].items():
        torch.testing.assert_close(products[0][name], product, rtol=1e-3, atol=1e-5)
    for variant in ("efficient", "recovered"):
        assert report["quality"][variant]["kl"] == pytest.approx(expected["quality"][variant]["kl"], rel=1e-3)


def test_what_a_streamed_base_cannot_is_refused(tiny_dir, small_recipe):
    model, tokenizer = caprese.load_base(str(tiny_dir), residency="streamed")
    with pytest.raises(caprese.CapreseError, match=r"layer by layer alone; use end_to_end\.epochs=0"):
        caprese.recover(model, tokenizer, small_recipe)
    none = small_recipe.end_to_end.model_copy(update={"epochs": 0})
    adam = small_recipe.layerwise.model_copy(update={"how": "adam"})
    with pytest.raises(caprese.CapreseError, match="use layerwise.how=closed"):
        caprese.recover(model, tokenizer, small_recipe.model_copy(update={"end_to_end": none, "layerwise": adam}))
    for key, value in {"reselect_every": 4, "rank": "auto"}.items():
        with pytest.raises(caprese.CapreseError, match="wants the base whole, and it is streamed"):
            caprese.recover(model, tokenizer, small_recipe.model_copy(update={key: value}))
    with pytest.raises(caprese.CapreseError, match="static makes weights of the base's"):
        methods = (caprese.Static(sparsity=0.5),)
        caprese.recover(model, tokenizer, small_recipe.model_copy(update={"end_to_end": none, "methods": methods}))


def test_it_is_neither_saved_nor_fused(tiny_dir, tmp_path):
    """What stands in the place of its weights holds no number."""
    model, _ = caprese.load_base(str(tiny_dir), residency="streamed")
    with pytest.raises(caprese.CapreseError, match="not saved"):
        model.save_pretrained(tmp_path / "base")
    with pytest.raises(caprese.CapreseError, match="leave out `full`"):
        check_keepable(model, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with pytest.raises(caprese.CapreseError, match="load the base whole"):
        caprese.fuse(caprese.apply(model, caprese.Griffin(sparsity=0.5)))


def test_one_process_shards_nothing(tiny_dir):
    with pytest.raises(caprese.CapreseError, match="start them with torchrun"):
        caprese.load_base(str(tiny_dir), residency="sharded")


# two processes: what each holds of the layers after a pass, and inside `resident`
SHARDED = textwrap.dedent(
    """
    import sys, torch, caprese
    from accelerate import PartialState
    from torch.distributed.tensor import DTensor
    from caprese.models.residency import resident
    torch.set_num_threads(1)
    model, _ = caprese.load_base(sys.argv[1], residency="sharded", device="cpu")

    def whole():
        return sum(not isinstance(p, DTensor) for layer in model.model.layers for p in layer.parameters())

    ids, held = torch.arange(4, 14)[None], [whole()]
    with torch.no_grad():
        model(ids)
        held.append(whole())
        with resident(model.model.layers[0]):
            held.append(whole())
            model(ids)
            held.append(whole())
        held.append(whole())
    own = sum(1 for _ in model.model.layers[0].parameters())
    assert held == [0, 0, own, own, 0], held
    PartialState().destroy_process_group()
    """
)


def test_a_sharded_base_is_in_parts_again_after_a_pass(tiny_dir, tmp_path):
    (tmp_path / "run.py").write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(tiny_dir)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_checkpoint_that_is_not_whole_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "layers.1" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path, {"format": "pt"})
    with pytest.raises(caprese.CapreseError, match=f"holds no {gone}"):
        caprese.load_base(str(tmp_path), residency="streamed")
    path.unlink()
    with pytest.raises(caprese.CapreseError, match="no whole safetensors checkpoint"):
        caprese.load_base(str(tmp_path), residency="streamed")


# a layer-wise recovery in a process that may not hold the base, and how much it held beside what it began with
SMALL = textwrap.dedent(
    """
    import json, re, sys
    from pathlib import Path
    import torch, caprese
    from caprese.data_gen import Sample
    from caprese.distill import Branches, Distillation, EndToEnd, Layerwise, fit
    torch.set_num_threads(1)

    def memory(name):
        return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    directory, kind = sys.argv[1:]
    torch.manual_seed(0)
    samples = [Sample(torch.randint(3, 250, (24,)).tolist(), 8, "", "") for _ in range(8)]
    small, _ = caprese.load_base("reasoner-tiny")  # what any run loads comes before
    del small
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model, _ = caprese.load_base(directory, residency=kind)
    caprese.apply(model, caprese.Griffin(sparsity=0.5))
    layerwise = Layerwise(batch_size=4, ridge=0.01)
    found = fit(model, samples[:6], samples[6:], Distillation(Branches(4), layerwise=layerwise,
                end_to_end=EndToEnd(epochs=0)))
    print(json.dumps({"held": memory("VmHWM") - before, "kl": found.kl}))
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_it_holds_one_layer_and_its_sums(tmp_path):
    """A base of eight layers in a fraction of its size, and to the same end."""
    config = tiny("llama").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 256, 8192, 8, 64
    model = type(tiny("llama"))(config)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    del model
    told = {}
    for kind in ("streamed", "whole"):
        done = subprocess.run(
            [sys.executable, "-c", SMALL, str(tmp_path), kind],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        told[kind] = json.loads(done.stdout.splitlines()[-1])
    assert told["streamed"]["held"] < size / 2 < size < told["whole"]["held"], (told, size)
    assert told["streamed"]["kl"] == pytest.approx(told["whole"]["kl"], rel=1e-3)
