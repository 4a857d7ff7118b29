"""Recover a model in Python, then load what came out.

python examples/recover.py                      # SmolLM2-135M, about ten minutes on two cores
python examples/recover.py --model DIR --samples 24 --rank 4 --new-tokens 16
"""

import argparse

import caprese

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--new-tokens", type=int, default=128)
parser.add_argument("--rank", type=int, default=32)
parser.add_argument("--output", default="out-example")
args = parser.parse_args()

model, tokenizer = caprese.load_base(args.model)  # alias, hub id, or local path
recipe = caprese.resolve_recipe(
    "smollm2-135m",  # its sizes suit two cores; a flag or a keyword overrides anything in a recipe
    model=args.model,
    rank=args.rank,
    output=args.output,
    samples={"train": args.samples, "max_new_tokens": args.new_tokens},
)
report = caprese.recover(model, tokenizer, recipe)
print(f"KL {report['quality']['efficient']['kl']:.3f} -> {report['quality']['recovered']['kl']:.3f}")

model = caprese.load(args.model, args.output)  # later, elsewhere
ids = tokenizer("Two and two is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=16, do_sample=False)[0]))
