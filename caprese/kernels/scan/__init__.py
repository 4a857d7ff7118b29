"""The state-space recurrence of Mamba-2 (arXiv 2405.21060): token by token, in chunks, and one step of decoding.

`scan`, `decode` and `convolve` are what a mixer calls: on a GPU mamba-ssm's and causal-conv1d's kernels where they are
installed and load, one token in float32 on a CPU in C where there is a compiler, and torch everywhere else.

S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t, for each head on its own.

Shapes: x [B, T, H, P], dt [B, T, H] (positive; 0 passes a token by), A [H] (negative), B and C [B, T, H, N], S and
`state` [B, H, P, N].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from caprese.kernels import native
from caprese.kernels.scan.chunk import CHUNK, chunk_scan, mixing_matrix
from caprese.kernels.scan.naive import read, recurrence, step

__all__ = ["CHUNK", "chunk_scan", "convolve", "decode", "in_use", "mixing_matrix", "recurrence", "scan", "step"]


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_scan` by whatever kernel there is for x's device."""
    kernels = _mamba_ssm(x.device.type)
    if kernels is None:
        return chunk_scan(x, dt, A, B, C, state)
    return kernels.scan(x, dt, A, B, C, CHUNK, initial_states=state, return_final_states=True)


def decode(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`step` by whatever kernel there is; without gradients, the new state is written over `state`."""
    if torch.is_grad_enabled() or (state.is_inference() and not torch.is_inference_mode_enabled()):
        return step(x, dt, A, B, C, state)
    kernels = _mamba_ssm(x.device.type)
    if kernels is None and state.is_contiguous() and native.fits(x, dt, A, B, C, state):
        x, dt, A, B, C = (t.contiguous() for t in (x, dt, A, B, C))
        y = torch.empty_like(x)
        native.call("caprese_step", *(t.data_ptr() for t in (x, dt, A, B, C, state, y)), *state.shape)
        return y, state
    if kernels is None:
        state.mul_(torch.exp(dt * A)[..., None, None]).addcmul_((dt[..., None] * x)[..., None], B[..., None, :])
        return read(state, C), state
    like = x[0]  # [H, P]
    none = like.new_zeros(len(A), 1).expand_as(like)  # it takes no D and no bias of dt only by mistake
    rate = A[:, None, None].expand(*like.shape, B.shape[-1])
    return kernels.decode(state, x, dt[..., None].expand_as(x), rate, B, C, D=none, dt_bias=none), state


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool = True) -> torch.Tensor:
    """A causal convolution of each channel alone, and SiLU of it: x [B, T + k - 1, channels] -> [B, T, channels].

    Args:
        weight: [channels, 1, k].
    """
    kernel, size = _causal_conv1d(x.device.type), weight.shape[-1]
    if kernel is not None:
        found = kernel(x.transpose(1, 2).contiguous(), weight.squeeze(1), bias, activation="silu" if silu else None)
        return found[..., size - 1 :].transpose(1, 2)
    if x.shape[1] == size and not torch.is_grad_enabled() and native.fits(x, weight, *([] if bias is None else [bias])):
        y, x, weight = x.new_empty(len(x), 1, x.shape[2]), x.contiguous(), weight.contiguous()
        where = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
        native.call("caprese_convolve", *where, *x.shape, silu)
        return y
    if x.shape[1] == size:  # one token, to which a convolution's setting up is most of its time
        y = (x * weight[:, 0].T).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = F.conv1d(x.transpose(1, 2), weight, bias, groups=len(weight)).transpose(1, 2)
    return F.silu(y) if silu else y


def in_use(device: str) -> dict[str, str]:
    """Whose kernels a mixer runs on a kind of device: {"scan", "convolution"}."""
    return {
        "scan": "torch" if _mamba_ssm(device) is None else "mamba-ssm",
        "convolution": "torch" if _causal_conv1d(device) is None else "causal-conv1d",
    }


# what is built for another torch, CUDA or GPU fails to import in its own way, and not with ImportError alone
@functools.cache
def _mamba_ssm(device: str) -> Any:
    if device != "cuda":
        return None
    try:
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except Exception:
        return None
    return SimpleNamespace(scan=mamba_chunk_scan_combined, decode=selective_state_update)


@functools.cache
def _causal_conv1d(device: str) -> Callable[..., torch.Tensor] | None:
    if device != "cuda":
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception:
        return None
    return causal_conv1d_fn
