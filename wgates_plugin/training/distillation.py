"""Knowledge distillation: the pruned network learns from the whole one's soft answers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0
) -> Tensor:
    """Cross-entropy gap between softened answers.

    T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton, Vinyals
    and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2). The factor T^2 keeps
    the gradient's size when T changes.

    Both logits (N, C) or (N, C, ...), classes in dimension 1; returns a scalar in nats. No gradient
    flows into the teacher.

    >>> import torch
    >>> logits = torch.tensor([[1.0, -1.0, 0.5]])
    >>> round(float(distillation_loss(logits, logits)), 6)
    0.0
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits.detach() / temperature, dim=1)
    gap = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return gap.mean() * temperature**2
