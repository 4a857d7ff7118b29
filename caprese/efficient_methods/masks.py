"""Which of a pass's tokens are prompt, which completion, and which are pads."""

from __future__ import annotations

import torch

from caprese.efficient_methods.hooks import Call
from caprese.errors import CapreseError


def split_tokens(
    call: Call, past: int, prompt_lengths: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Prompt and completion tokens as `phases` was told, [B, T]; None where there are none."""
    batch, length = call.tokens.shape[:2]
    if len(prompt_lengths) != batch:
        raise CapreseError(f"phases() was given {len(prompt_lengths)} prompt lengths for a batch of {batch}")
    device = call.tokens.device
    mask = torch.ones(batch, past + length, device=device) if call.mask is None else call.mask
    mask = mask.bool()
    first = min(past, mask.shape[-1] - length)
    early = (mask.cumsum(-1) - 1)[:, first : first + length] < prompt_lengths.to(device)[:, None]
    real = mask[:, first : first + length]
    prompt, completion = real & early, real & ~early
    return prompt if prompt.any() else None, completion if completion.any() else None


def real_tokens(call: Call, past: int) -> torch.Tensor:
    """Which of the new tokens are no pads, [B, T], from whatever form the attention mask has."""
    batch, length = call.tokens.shape[:2]
    mask = call.mask
    if isinstance(mask, dict):  # one mask per kind of attention layer
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=call.tokens.device)
    # of a static cache it may be of all places; that of a sliding window which has moved on ends with the new tokens
    first = min(past, mask.shape[-1] - length)
    if mask.dim() == 2:
        return mask[:, first : first + length].bool()
    # 4D: a real token attends to itself, a pad does not
    own = mask[:, 0, torch.arange(length), first + torch.arange(length)]
    own = own if own.dtype == torch.bool else own == 0
    return own.expand(batch, -1)
