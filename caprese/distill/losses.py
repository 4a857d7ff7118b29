"""What the student is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Head = Callable[[torch.Tensor], torch.Tensor]
Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(student, teacher), logits [n, V] -> per token [n]."""
CHUNK = 256


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits [n, V], per token [n], in float32."""
    p = teacher.log_softmax(-1)
    return (p.exp() * (p - student.log_softmax(-1))).sum(-1)


def total_variation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - sum of min(p, q) for logits [n, V], per token [n]: the chance that a token drafted by the student is refused
    by the teacher (arXiv 2211.17192, section 3)."""
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


def sharpened(divergence: Divergence, temperature: float) -> Divergence:
    """A divergence of the distributions at another temperature."""
    if temperature == 1:
        return divergence
    return lambda student, teacher: divergence(student / temperature, teacher / temperature)


class _HiddenLoss(torch.autograd.Function):
    """Logits exist for one chunk of tokens at a time; the gradient is taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: Head, divergence: Divergence, chunk: int
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                hidden = student[part].detach().requires_grad_()
                loss = divergence(head(hidden), head(teacher[part])).sum()
            gradient[part] = torch.autograd.grad(loss, hidden)[0]
            total += loss.detach().double()
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


def hidden_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: Head,
    divergence: Divergence = kl_divergence,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Sum over tokens of a divergence, from hidden states [n, D]; [tokens, vocabulary] is never made."""
    return _HiddenLoss.apply(student, teacher, head, divergence, chunk)


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The paper's objective: squared error of final hidden states [n, D], mean over D, summed over tokens."""
    return (student.float() - teacher.float()).square().mean(-1).sum()
