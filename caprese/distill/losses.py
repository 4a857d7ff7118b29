"""What the student is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
CHUNK = 256


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits [n, V], per token [n], in float32."""
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1)


class _HiddenKL(torch.autograd.Function):
    """Logits exist for one chunk of tokens at a time; the gradient is taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: Head, chunk: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_()
                loss = kl_divergence(head(hidden), head(teacher[part])).sum()
            gradient[part] = torch.autograd.grad(loss, hidden)[0]
            total += loss.detach().double()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


def hidden_kl(student: torch.Tensor, teacher: torch.Tensor, head: Head, chunk: int = CHUNK) -> torch.Tensor:
    """Sum over tokens of KL(teacher || student), from hidden states [n, D]; [tokens, vocabulary] is never made."""
    return _HiddenKL.apply(student, teacher, head, chunk)


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The paper's objective: squared error of final hidden states [n, D], mean over D, summed over tokens."""
    return (student.float() - teacher.float()).square().mean(-1).sum()
