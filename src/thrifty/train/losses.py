"""What training minimises, as functions of logits [N, classes] and labels int64 [N]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy, with the share `smoothing` in [0, 1) of the target spread over all classes."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² * KL(teacher || student), batch mean, both softened by temperature T.

    Hinton, Vinyals, Dean, 'Distilling the Knowledge in a Neural Network', arXiv 1503.02531, section 2.
    """
    target = F.log_softmax(teacher / temperature, 1)
    student = F.log_softmax(logits / temperature, 1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2
