"""The closed form is the optimum; losses are what they say; training resumes bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from families import tiny as family
from hypothesis import given, settings
from hypothesis import strategies as st

import caprese
from caprese.adapters import attach_adapter, get_branches, set_branch, set_branches
from caprese.data_gen import Sample
from caprese.distill import (
    Branches,
    Distillation,
    EndToEnd,
    HeldOut,
    Layerwise,
    Teacher,
    accumulate,
    allocate_ranks,
    fit,
    fit_layer,
    make_batches,
    new_moments,
)
from caprese.distill.adam import fit_adam
from caprese.distill.batches import completion_hidden, lm_logits, prefill
from caprese.distill.end_to_end import train
from caprese.distill.layerwise import Moments
from caprese.distill.losses import hidden_loss, hidden_mse, kl_divergence
from caprese.distill.sequential import fit_sequential
from caprese.efficient_methods import Cats, Griffin, applied_ffns
from caprese.efficient_methods.memory import memory_of
from caprese.evaluation import fidelity, layer_errors
from caprese.recovery.run import Run

METHODS = {"griffin": Griffin, "cats": Cats}


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Unequal prompts and the dense model's own greedy completions."""
    model, tokenizer = tiny_llama(eos_token_id=None), byte_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n = int(torch.randint(1, 9, (), generator=generator))
        ids = torch.randint(2, 258, (1, n), generator=generator)
        full = model.generate(ids, max_new_tokens=int(torch.randint(4, 12, (), generator=generator)), do_sample=False)
        rows.append(Sample(full[0].tolist(), n, "p", tokenizer.decode(full[0, n:].tolist())))
    return rows


SAMPLES = samples(24)
HELD = samples(8, seed=1)


def moments_of(x: torch.Tensor, e: torch.Tensor) -> Moments:
    m = Moments.zeros(x.shape[1], torch.device("cpu"))
    for part in torch.arange(len(x)).split(7):
        m.add(x[part], e[part], e[part] + 1)
    return m


def reduced_rank(x: torch.Tensor, e: torch.Tensor, rank: int) -> torch.Tensor:
    """The textbook way: least squares, then the best rank-r approximation of the fitted values."""
    w = torch.linalg.lstsq(x, e).solution
    v = torch.linalg.svd(x @ w, full_matrices=False).Vh[:rank]
    return w @ v.T @ v


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), hidden=st.integers(3, 12), rank=st.integers(1, 3), bias=st.booleans())
def test_closed_form_is_reduced_rank_regression(seed, hidden, rank, bias):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, hidden, generator=generator) + 0.5
    e = torch.randn(80, hidden, generator=generator) + x @ torch.randn(hidden, hidden, generator=generator) + 2
    fit = fit_layer(moments_of(x, e), moments_of(x, e), rank, ridge=0.0, bias=bias)
    left, right, offset = fit.at(rank)
    xd, ed = x.double(), e.double()
    if bias:
        mx, me = xd.mean(0), ed.mean(0)
        best = (xd - mx) @ reduced_rank(xd - mx, ed - me, rank) + me
    else:
        best = xd @ reduced_rank(xd, ed, rank)
    mine = xd @ left @ right + (offset if bias else 0)
    loss, reference = ((ed - mine).square().sum(), (ed - best).square().sum())
    assert loss <= reference * (1 + 1e-5)
    # the curve says what the plain computation says
    yy = (ed + 1).square().sum()
    assert float(fit.curve[rank]) == pytest.approx(float(loss / yy), rel=1e-4, abs=1e-6)


def test_ridge_is_chosen_on_held_out_tokens():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 2, generator=generator) @ torch.randn(2, 30, generator=generator)

    def draw(n: int) -> Moments:
        x = torch.randn(n, 30, generator=generator)
        return moments_of(x, x @ weight + 10 * torch.randn(n, 30, generator=generator))

    few, held = draw(35), draw(2000)
    chosen = fit_layer(few, held, 2)
    plain = fit_layer(few, held, 2, ridge=0.0)
    assert chosen.ridge > 0 and chosen.curve[2] < plain.curve[2]


def test_rank_budget_goes_where_error_is():
    steep = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.09])
    flat = torch.tensor([0.3, 0.29, 0.285, 0.28, 0.28])
    assert allocate_ranks([steep, flat], 4) == [3, 1]
    assert sum(allocate_ranks([steep, flat], 6)) <= 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["closed", "sequential", "adam"])
def test_layerwise_lowers_error_and_kl(method, how):
    model = caprese.apply(tiny_llama(), METHODS[method](sparsity=0.5))
    train_batches, held = make_batches(SAMPLES, 4), make_batches(HELD, 4)
    adapted = attach_adapter(model, 6)
    before = HeldOut(adapted, make_batches(SAMPLES, 4), 1).kl()
    if how == "closed":
        moments, other = new_moments(model), new_moments(model)
        accumulate(model, train_batches, moments)
        accumulate(model, held, other)
        for wrapper, a, b in zip(applied_ffns(model).values(), moments, other, strict=True):
            set_branch(wrapper.recovery, *fit_layer(a, b, 6).at(6))
    elif how == "sequential":
        fit_sequential(adapted, train_batches, held, [6] * 3)
    else:
        fit_adam(adapted, train_batches, Layerwise(how="adam", epochs=20, learning_rate=1e-2), seed=0)
    rows = layer_errors(adapted, Teacher(adapted, make_batches(SAMPLES, 4), 0))
    assert all(row["recovered"] < row["efficient"] for row in rows[:1])
    if how != "sequential":  # which repairs the layers below it too, so its own residual is not its target
        assert all(row["recovered"] < row["efficient"] for row in rows)
    assert HeldOut(adapted, make_batches(SAMPLES, 4), 1).kl() < before


def test_adam_gives_the_same_with_activations_cached_or_recomputed():
    results = []
    for cached in (True, False):
        model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
        torch.manual_seed(0)
        adapted = attach_adapter(model, 4)
        config = Layerwise(how="adam", epochs=3, cache_activations=cached)
        fit_adam(adapted, make_batches(SAMPLES, 4), config, seed=0)
        results.append(get_branches(adapted))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_batches_lose_no_token_and_predict_the_next():
    batches = make_batches(SAMPLES, 5)
    assert sum(b.tokens for b in batches) == sum(len(s.completion_ids) - 1 for s in SAMPLES)
    for b in batches:
        for row in range(len(b.prompt)):
            n = int(b.mask[row].sum())
            full = b.prompt[row][b.prompt_mask[row]].tolist() + b.inputs[row, :n].tolist()
            assert any([*full, int(b.targets[row, n - 1])] == s.input_ids for s in SAMPLES)


@pytest.mark.parametrize("method", METHODS)
def test_two_passes_equal_one(method):
    """Prefill, then completion on the cache, computes what one pass over both does; and padding changes nothing."""
    model = caprese.apply(tiny_llama(), METHODS[method](sparsity=0.5))
    batch = make_batches(SAMPLES[:5], 5)[0]
    hidden = completion_hidden(model, batch, prefill(model, batch)).split(batch.mask.sum(-1).tolist())
    for row in range(5):
        n, p = int(batch.mask[row].sum()), int(batch.prompt_mask[row].sum())
        ids = torch.cat([batch.prompt[row][batch.prompt_mask[row]], batch.inputs[row, :n]])[None]
        with caprese.phases(model, [p]):
            alone = model.get_decoder()(ids).last_hidden_state[0, p:]
        assert torch.allclose(hidden[row], alone, atol=1e-4)


def test_chunked_kl_is_kl_and_so_is_its_gradient():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False).requires_grad_(False)
    teacher, student = torch.randn(13, 8), torch.randn(13, 8, requires_grad=True)
    hidden_loss(student, teacher, head, chunk=4).backward()
    grad, student.grad = student.grad.clone(), None
    p, q = (torch.log_softmax(head(h).double(), -1) for h in (teacher, student))
    reference = (p.exp() * (p - q)).sum()
    reference.backward()
    assert float(hidden_loss(student.detach(), teacher, head, chunk=5)) == pytest.approx(
        float(reference.detach()), rel=1e-5
    )
    assert torch.allclose(grad, student.grad, atol=1e-5)
    assert float(kl_divergence(head(teacher), head(teacher)).abs().max()) < 1e-6
    assert float(hidden_mse(teacher, teacher + 2)) == pytest.approx(13 * 4)


def test_fidelity_of_dense_is_perfect_and_matches_a_plain_computation():
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    adapted = attach_adapter(model, 2)
    figures = fidelity(adapted, make_batches(HELD, 4))
    assert figures["dense"]["kl"] == 0 and figures["dense"]["top1_agreement"] == 1
    assert figures["efficient"] == figures["recovered"] and figures["efficient"]["kl"] > 0.01
    kl = nll = tokens = 0.0
    for s in HELD:
        ids = torch.tensor([s.input_ids[:-1]])
        with caprese.phases(model, [s.prompt_length]):
            student = model(ids).logits[0, s.prompt_length :].double().log_softmax(-1)
            with caprese.dense(model):
                teacher = model(ids).logits[0, s.prompt_length :].double().log_softmax(-1)
        kl += float((teacher.exp() * (teacher - student)).sum())
        nll -= float(student.gather(1, torch.tensor(s.completion_ids[1:])[:, None]).sum())
        tokens += len(student)
    assert figures["efficient"]["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert figures["efficient"]["perplexity"] == pytest.approx(float(torch.tensor(nll / tokens).exp()), rel=1e-3)


@pytest.mark.parametrize("objective", ["kl", "hidden"])
def test_end_to_end_learns_and_resumes_bit_for_bit(tmp_path, objective):
    def run(path, stop_at=None):
        model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
        torch.manual_seed(0)
        adapted = attach_adapter(model, 6)
        config = EndToEnd(
            objective=objective, epochs=3, batch_size=8, micro_batch=4, learning_rate=1e-2, checkpoint_every=2
        )
        held = HeldOut(adapted, make_batches(SAMPLES, 4), 1)
        start = held.kl()
        if stop_at is not None:
            calls = []
            plain = torch.optim.AdamW.step

            def step(self, *args, **kwargs):
                calls.append(1)
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                return plain(self, *args, **kwargs)

            torch.optim.AdamW.step = step
        try:
            best, curve, checks = train(
                adapted, Teacher(adapted, make_batches(SAMPLES, 4), 1), held, config, start, Run(path, "id")
            )
        finally:
            if stop_at is not None:
                torch.optim.AdamW.step = plain
        return start, best, curve, checks, get_branches(adapted)

    whole = run(tmp_path / "whole")
    assert whole[1] < whole[0] and len(whole[3]) == 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=6)
    resumed = run(tmp_path / "cut")
    assert resumed[1:4] == whole[1:4]
    assert all(torch.equal(whole[4][n], resumed[4][n]) for n in whole[4])


@pytest.mark.parametrize("every", [None, 3])
def test_a_teacher_that_was_watched_is_the_teacher(every, monkeypatch):
    """What the layers are fitted to is what end to end learns from: bit for bit, and computed once."""
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5), reselect_every=every)
    batches = make_batches(SAMPLES, 4)
    asked, watched, forgetful = (Teacher(model, batches, gigabytes) for gigabytes in (1, 1, 0))
    seen: list[int] = []
    watched.observe(0, lambda wrapper, *_: seen.append(wrapper.layer))
    forgetful.observe(0, lambda *_: None)
    assert set(seen) == {0, 1, 2} and not forgetful.known
    for teacher in (watched, forgetful):
        assert torch.equal(teacher[0][2], asked[0][2])
    assert bool(watched.known) and (watched.left == asked.left)
    monkeypatch.setattr("caprese.distill.teacher.prefill", None)
    assert torch.equal(watched[0][2], asked[0][2])


def test_end_to_end_that_does_not_help_is_not_kept():
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    adapted = attach_adapter(model, 4)
    before = get_branches(adapted)
    held = HeldOut(adapted, make_batches(HELD, 4), 1)
    config = EndToEnd(epochs=1, learning_rate=30.0, batch_size=8, clip=1e6)
    best, _, _ = train(adapted, Teacher(adapted, make_batches(SAMPLES, 8), 1), held, config, held.kl())
    assert all(torch.equal(before[n], v) for n, v in get_branches(adapted).items()) and best == held.kl()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_memory_of_what_comes_before_a_completion(kind):
    model = caprese.apply(family(kind), caprese.Griffin(sparsity=0.5), reselect_every=3)
    (batch,) = make_batches([Sample(list(range(2, 22)), 6, "", "")], 1)
    context = prefill(model, batch)
    tensors = [t for _, _, cache in context.blocks for layer in cache.layers for t in (layer.keys, layer.values)]
    own = {t.data_ptr(): t.nbytes for t in sorted(tensors, key=lambda t: t.nbytes)}
    learned = sum(memory_of(cache).nbytes for _, _, cache in context.blocks)
    assert len(context.blocks) == 5 and context.nbytes == sum(own.values()) + learned


def test_branches_of_unequal_rank_with_bias(tmp_path):
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    adapted = attach_adapter(model, [2, 5, 3], bias=True)
    set_branches(adapted, {n: torch.randn_like(v) * 0.05 for n, v in get_branches(adapted).items()})
    caprese.save(adapted, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    out = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    again = caprese.load(caprese.remove(adapted), tmp_path)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=5, do_sample=False), out)
    shapes = {n: v.shape for n, v in get_branches(again).items()}
    assert [s[0] for n, s in shapes.items() if "lora_A" in n] == [2, 5, 3]
    assert lm_logits(again, torch.zeros(1, 32)).shape == (1, 258)


def test_fit_is_all_of_it_and_goes_on(tmp_path, monkeypatch):
    """Without a run nothing is kept; with one, a second attempt does no work and ends with the same adapter."""
    config = Distillation(
        Branches(rank=4), end_to_end=EndToEnd(epochs=2, batch_size=4, micro_batch=4, learning_rate=1e-2)
    )

    def fitted(run=None):
        model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
        return fit(model, SAMPLES, SAMPLES, config, run)  # so few teach little about others

    alone, kept = fitted(), fitted(Run(tmp_path, "id"))
    assert alone.kl["end_to_end"] < alone.kl["layerwise"] < alone.kl["efficient"] and alone.ranks == [4, 4, 4]
    assert alone.kl["end_to_end"] == pytest.approx(HeldOut(alone.model, make_batches(SAMPLES, 4), 1).kl(), rel=1e-4)
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    monkeypatch.setattr("caprese.distill.layerwise.Moments.add", None)
    again = fitted(Run(tmp_path, "id"))
    for other in (kept, again):
        assert other.kl == alone.kl and other.curves == alone.curves
        branches = get_branches(other.model)
        assert all(torch.equal(branches[n], value) for n, value in get_branches(alone.model).items())


def test_a_fit_that_fails_leaves_the_model_applied():
    model = caprese.apply(tiny_llama(), caprese.Griffin(sparsity=0.5))
    with pytest.raises(caprese.CapreseError, match="rank 99 exceeds the hidden size 32"):
        fit(model, SAMPLES, HELD, Distillation(Branches(rank=99)))
    broken = Distillation(Branches(rank=2), end_to_end=EndToEnd(learning_rate=3e37, batch_size=8))
    with pytest.raises(
        caprese.CapreseError,
        match=r"the (loss|gradient's norm) is \S+ at step \d+ of end to end; lower its learning_rate",
    ):
        fit(model, SAMPLES, HELD, broken)
    assert fit(model, SAMPLES, HELD, Distillation(Branches(rank=2), end_to_end=EndToEnd(epochs=0))).ranks == [2] * 3


@pytest.mark.parametrize("how", ["closed", "adam"])
def test_what_a_bad_gradient_left_is_not_gone_on_with(tmp_path, monkeypatch, how):
    """A gradient that is no number once: the attempt stops, and the next ends as one without it."""
    config = Distillation(
        Branches(rank=2),
        layerwise=Layerwise(how=how, epochs=2),
        end_to_end=EndToEnd(batch_size=4, micro_batch=4, checkpoint_every=1),
    )

    def fitted(run=None):
        return get_branches(fit(caprese.apply(tiny_llama(), caprese.Griffin()), SAMPLES, HELD, config, run).model)

    alone, backward, steps = fitted(), torch.Tensor.backward, []

    def once(loss, *arguments, **more):
        steps.append(loss)
        backward(loss * math.nan if len(steps) == 2 else loss, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "backward", once)
    where = "epoch 1 of layerwise" if how == "adam" else "step 2 of end to end"
    with pytest.raises(caprese.CapreseError, match=f"the gradient's norm is nan at {where}; lower its learning_rate"):
        fitted(Run(tmp_path, "id"))
    again = fitted(Run(tmp_path, "id"))
    assert all(torch.equal(again[name], value) for name, value in alone.items())
