"""From a torch model to an engine in one call."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from thrifty.decision import Decision
from thrifty.dynamic import Dynamic, decisions, evaluating
from thrifty.engine import Engine
from thrifty.errors import LoweringError
from thrifty.lowering import lower
from thrifty.lowering.values import IMAGES
from thrifty.program import Preprocessing

TOLERANCE = 1e-3
"""Largest difference between engine and torch, over the largest logit, at which an engine counts as right."""

ROUNDINGS = 16
"""So many of its own roundings are allowed to a model of half precision, where they are more than that."""

CHECKED = (1, IMAGES + 1)
"""Images that the check looks at, at a time: not as many as lowering looks at."""


def compile(  # noqa: A001 (nobody needs Python's own in here, and users read thrifty.compile)
    model: nn.Module,
    example: Tensor,
    threads: int = 1,
    preprocessing: Preprocessing | None = None,
    classes: Iterable[str] = (),
    check: bool = True,
) -> Engine:
    """Lower a dense or dynamic model and make the engine that runs it.

    Args:
        model: any module that takes a batch of images and returns one tensor.
        example: a batch of images [N, C, H, W] that the model takes; the engine takes images of this size.
        threads: CPU threads that a call works on.
        preprocessing: how photographs become the model's inputs, for an engine that takes uint8.
        classes: names of the classes, in the order of the logits.
        check: compare the engine's answer with the model's, at the model's decisions, for images like the example's.

    Raises:
        LoweringError: the model does something that programs cannot express, or the check fails.
        ThriftyError: `threads` is out of range.
    """
    engine = Engine(lower(model, example, preprocessing, classes), threads)
    for count in CHECKED if check else ():
        _check(engine, model, _others(example, count))
    return engine


def _others(example: Tensor, count: int) -> Tensor:
    """Images like those of the example, so many of them: what was frozen of it is wrong for these."""
    rows = torch.arange(count, device=example.device) % len(example)
    return example.detach()[rows].flip(-1) * 0.9


def _check(engine: Engine, model: nn.Module, example: Tensor) -> None:
    # Copies, for the model may write to what it is given.
    decided = decisions(model, example.clone()) if isinstance(model, Dynamic) else {}
    with evaluating(model):
        try:
            answer = model(example.clone()).detach()
        except Exception as reason:  # whatever the model's own code raises
            raise LoweringError(f"the model takes no batch of {len(example)} images: {reason}") from reason
    expected = answer.double().cpu().numpy()
    if not np.isfinite(expected).all():
        raise LoweringError("the model's answer for the example is NaN or infinite: repair its weights or the example.")
    x = example.detach().to("cpu", torch.float32)
    found = engine.trace(x, {name: _on_cpu(decision) for name, decision in decided.items()}).output
    if found.shape != expected.shape:
        raise LoweringError(f"the engine's answer is {list(found.shape)}, but the model's is {list(expected.shape)}.")
    largest = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max()) / largest if largest else float(np.abs(found).max())
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(answer.dtype).eps)
    if not error <= allowed:
        raise LoweringError(
            f"the engine's answer for images like the example is off by {error:.1e} of the model's largest output, "
            f"which is more than {allowed:.0e}. The model may compute with what left torch (tolist, numpy, the size of "
            "the batch) and is fixed in a program, amplify rounding errors, or change from call to call; check=False "
            "takes the engine as it is."
        )


def _on_cpu(decision: Decision) -> Decision:
    parts = (decision.channels, decision.columns, decision.layer)
    return Decision(*(None if part is None else part.cpu() for part in parts))
