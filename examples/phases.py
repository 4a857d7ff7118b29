"""Apply a method, see what it costs on a sequence whose prompt and completion are known, and take it off again.

python examples/phases.py [--model DIR]
"""

import argparse

import torch

import caprese

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-135m")
args = parser.parse_args()

model, tokenizer = caprese.load_base(args.model)
prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
ids = model.generate(prompt, max_new_tokens=12, do_sample=False)
before = model(ids).logits

for method in (caprese.Griffin(sparsity=0.5), caprese.Cats(sparsity=0.5)):
    caprese.apply(model, method)
    with caprese.phases(model, [prompt.shape[1]]):  # prompt tokens dense, the rest efficient, in one pass
        after = model(ids).logits
    start = prompt.shape[1]
    agreement = (after[:, start:].argmax(-1) == before[:, start:].argmax(-1)).float().mean()
    assert torch.equal(after[:, :start], before[:, :start])
    print(f"{method.name}: top-1 agreement on the completion {agreement:.0%}")
    caprese.remove(model)

assert torch.equal(model(ids).logits, before)  # exactly the model it was
