"""Train reasoner-tiny from scratch: a one-million-parameter Llama that writes out chains of arithmetic.

    python examples/reasoner/train.py --output examples/reasoner

Or reasoner-long from it, whose workings have 600 to 1,450 tokens:

    python examples/reasoner/train.py --kinds fetching,fetching,fetching,local --start examples/reasoner --shortest 5 \\
        --batch 16 --rate 1e-3 --steps 1000 --context 2048 --problems 24 \\
        --output out-first --state out-first
    python examples/reasoner/train.py --kinds fetching,local --start out-first --batch 16 --rate 5e-4 --steps 300 \\
        --context 2048 --problems 60 --output examples/reasoner-long --state out-reasoner-long

For half of the first training its problems are short, until it finds what is asked for wherever it stands; then they
grow. The second is at all lengths.

Problems are drawn from the split "train" as long as training lasts. The loss is on the working alone.
A checkpoint every 100 steps: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from caprese.data_gen.chains import KINDS, Chain, chains
from caprese.files import read_tensors, write_json, write_tensors

ALPHABET = "0123456789+-*():>=\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocab = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{c: i + 3 for i, c in enumerate(ALPHABET)}}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_model(hidden: int, ffn: int, layers: int, heads: int, context: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 3,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Chain]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] padded right, and which of them are predicted: working and end of text."""
    prompts = [tokenizer(row.question + "\n").input_ids for row in rows]
    workings = [[*tokenizer(row.working).input_ids, 1] for row in rows]
    longest = max(len(p) + len(w) for p, w in zip(prompts, workings, strict=True))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (prompt, working) in enumerate(zip(prompts, workings, strict=True)):
        ids[i, : len(prompt) + len(working)] = torch.tensor(prompt + working)
        mask[i, len(prompt) : len(prompt) + len(working)] = True
    return ids, mask


def batches(
    kinds: list[str], size: int, seed: int, steps_at: Callable[[str, int], range]
) -> Iterator[tuple[str, list[Chain]]]:
    """Batches without end of problems of one kind, which is named, and like length, in random order.

    Args:
        size: of a batch of the longest problems; twice as many of those half as long.
        steps_at: of how many steps a kind's problems are after so many batches.
    """
    draw, given = random.Random(seed), 0
    streams: dict[tuple[str, range], Iterator[Chain]] = {}
    while True:
        parts = list[tuple[str, list[Chain]]]()
        for kind in kinds:
            steps = steps_at(kind, given)
            problems = streams.setdefault((kind, steps), chains("train", 100 * seed + steps[-1], steps, kind))
            many = size * min(2, KINDS[kind].steps[-1] // steps[-1])
            rows = sorted(itertools.islice(problems, 8 * many), key=lambda row: len(row.question) + len(row.working))
            parts += [(kind, rows[i : i + many]) for i in range(0, len(rows), many)]
        draw.shuffle(parts)
        given += len(parts)
        yield from parts


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Chain], temperature: float = 0.0
) -> dict[str, float]:
    """Greedy or at a temperature, by number of steps and over all."""
    model.eval()
    tokenizer.padding_side = "left"
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    right: dict[int, list[bool]] = {}
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        batch = tokenizer([row.question + "\n" for row in part], return_tensors="pt", padding=True)
        batch.pop("token_type_ids", None)
        longest = max(len(row.working) for row in part)
        out = model.generate(**batch, max_new_tokens=longest + 20, **{"do_sample": False, **how})
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(part, texts, strict=True):
            right.setdefault(row.steps, []).append(text.rpartition("=")[2] == row.answer)
    model.train()
    every = [mark for marks in right.values() for mark in marks]
    by_steps = {f"{steps} steps": sum(marks) / len(marks) for steps, marks in sorted(right.items())}
    return {"all": sum(every) / len(every), **by_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("examples/reasoner"))
    parser.add_argument("--state", type=Path, default=Path("out-reasoner"))
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--problems", type=int, default=400, help="test problems at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds",
        default="chains",
        help="of problems, with commas: chains, fetching, local; one named twice has two parts of them",
    )
    parser.add_argument("--start", type=Path, help="a model to go on from")
    parser.add_argument(
        "--shortest", type=int, help="so many steps for half of the training, all lengths in its last sixth"
    )
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := set(kinds) - {"chains", "fetching", "local"}:
        parser.error(f"--kinds are chains, fetching and local, not {', '.join(sorted(unknown))}")
    tokenizer = make_tokenizer()
    torch.manual_seed(args.seed)
    if args.start is None:
        model = make_model(args.hidden, args.ffn, args.layers, args.heads, args.context)
    else:
        model = LlamaForCausalLM.from_pretrained(args.start, max_position_embeddings=args.context)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    args.state.mkdir(parents=True, exist_ok=True)
    checkpoint = args.state / "checkpoint.safetensors"
    done, seconds = 0, 0.0
    if checkpoint.exists():
        tensors, known = read_tensors(checkpoint, "delete it and run again")
        done, seconds = known["step"], known["seconds"]
        for name, parameter in model.named_parameters():
            parameter.data.copy_(tensors[name])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(done)),
                "exp_avg": tensors[f"{name}|avg"],
                "exp_avg_sq": tensors[f"{name}|square"],
            }

    def steps_at(kind: str, given: int) -> range:
        known = KINDS[kind].steps
        grown = min(1.0, max(0.0, 3 * given / args.steps - 1.5))
        if args.shortest is None or grown == 1:
            return known
        longest = args.shortest + int((known[-1] - args.shortest) * grown)
        return range(longest // 2, longest + 1)

    problems = batches(kinds, args.batch, args.seed, steps_at)
    for _ in range(done):
        next(problems)
    tests = {kind: list(itertools.islice(chains("test", 0, kind=kind), args.problems)) for kind in kinds}
    model.train()
    begin, losses = time.perf_counter(), dict[str, list[float]]()
    for step in range(done, args.steps):
        warm = min(1.0, (step + 1) / 100)
        if args.shortest is None:
            decay = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        else:  # what is learned last is as much as what was learned first
            decay = min(1.0, 6 * (1 - step / args.steps))
        rate = args.rate * warm * (0.02 + 0.98 * decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        kind, rows = next(problems)
        ids, mask = encode(tokenizer, rows)
        hidden = model.model(input_ids=ids).last_hidden_state  # what is padded comes last, so no token sees it
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][mask[:, 1:]]), ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.setdefault(kind, []).append(loss.item())
        if (step + 1) % 100 == 0:
            means = "  ".join(f"{kind} {sum(some) / len(some):.4f}" for kind, some in sorted(losses.items()))
            losses = {}
            spent = seconds + time.perf_counter() - begin
            left = spent / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps}  loss: {means}  {spent:.0f} s, {left:.0f} s left", flush=True)
        if (step + 1) % 500 == 0 and args.shortest is None:
            print({kind: accuracy(model, tokenizer, rows[:100])["all"] for kind, rows in tests.items()}, flush=True)
        if (step + 1) % 100 == 0:
            spent = seconds + time.perf_counter() - begin
            tensors = {}
            for name, parameter in model.named_parameters():
                state = optimizer.state[parameter]
                tensors |= {
                    name: parameter.data,
                    f"{name}|avg": state["exp_avg"],
                    f"{name}|square": state["exp_avg_sq"],
                }
            write_tensors(checkpoint, tensors, {"step": step + 1, "seconds": spent})
    result = {
        "accuracy": {kind: accuracy(model, tokenizer, rows) for kind, rows in tests.items()},
        "at_0.7": {kind: accuracy(model, tokenizer, rows, 0.7)["all"] for kind, rows in tests.items()},
        "problems": args.problems,
        "seconds": seconds + time.perf_counter() - begin,
    }
    print(result)
    model.generation_config = GenerationConfig(
        pad_token_id=0, eos_token_id=1, max_new_tokens=200 if kinds == ["chains"] else 1500
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    write_json(args.state / "result.json", result)


if __name__ == "__main__":
    main()
