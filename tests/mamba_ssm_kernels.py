"""Run by test_mamba.py in a process of its own: mamba-ssm's real kernels, in Triton's interpreter, against ours.

What they ask of a GPU beside running kernels (its number, its processors, timings) is answered for it; its package,
which wants a CUDA extension, is not imported, only the modules with the kernels.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.runtime.autotuner

from caprese.kernels import scan

spec = importlib.util.find_spec("mamba_ssm")
assert spec is not None
package = types.ModuleType("mamba_ssm")
package.__path__ = list(spec.submodule_search_locations or [])
package.__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None, is_package=True)
sys.modules["mamba_ssm"] = package
torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=4)  # type: ignore
triton.runtime.autotuner.Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]  # type: ignore[method-assign]

kernels = scan._mamba_ssm("cuda")
assert kernels is not None and scan.in_use("cuda")["scan"] == "mamba-ssm"
scan._mamba_ssm = lambda device: kernels  # type: ignore[assignment]

generator = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


for length in (1, 21, 70):
    batch, heads, size = 2, 3, 16
    x, dt, a = drawn(batch, length, heads, size), drawn(batch, length, heads).abs(), -drawn(heads).abs()
    b, c, state = drawn(*x.shape), drawn(*x.shape), drawn(batch, heads, size, size)
    y, last = scan.recurrence(x, dt, a, b, c, state)
    with torch.no_grad():
        for ours, theirs in zip((y, last), scan.scan(x, dt, a, b, c, state), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4), (length, (ours - theirs).abs().max())
        first = [t[:, 0] for t in (x, dt)], [t[:, 0] for t in (b, c)]
        wanted = scan.step(*first[0], a, *first[1], state)
        for ours, theirs in zip(wanted, scan.decode(*first[0], a, *first[1], state.clone()), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
x.requires_grad_()
scan.scan(x, dt, a, b, c)[0].square().sum().backward()
theirs, x.grad = x.grad, None
scan.chunk_scan(x, dt, a, b, c)[0].square().sum().backward()
assert theirs is not None and x.grad is not None and torch.allclose(theirs, x.grad, rtol=1e-3, atol=1e-2)
print("equal")
