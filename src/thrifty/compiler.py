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
from thrifty.program import Preprocessing

TOLERANCE = 1e-3
"""Largest difference between engine and torch, over the largest logit, at which an engine counts as right."""

ROUNDINGS = 16
"""So many of its own roundings are allowed to a model of half precision, where they are more than that."""

CHECKED = 4
"""Images of the example that the check looks at."""


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
        check: compare the engine's answer for the example with the model's, at the model's decisions.

    Raises:
        LoweringError: the model does something that programs cannot express, or the check fails.
        ThriftyError: `threads` is out of range.
    """
    engine = Engine(lower(model, example, preprocessing, classes), threads)
    if check:
        _check(engine, model, example[:CHECKED])
    return engine


def _check(engine: Engine, model: nn.Module, example: Tensor) -> None:
    decided = decisions(model, example) if isinstance(model, Dynamic) else {}
    with evaluating(model):
        answer = model(example).detach()
    expected = answer.double().cpu().numpy()
    if not np.isfinite(expected).all():
        raise LoweringError("the model's answer for the example is NaN or infinite: repair its weights or the example.")
    x = example.detach().to("cpu", torch.float32)
    found = engine.trace(x, {name: _on_cpu(decision) for name, decision in decided.items()}).output
    largest = float(np.abs(expected).max())
    error = float(np.abs(found - expected).max()) / largest if largest else float(np.abs(found).max())
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(answer.dtype).eps)
    if not error <= allowed:
        raise LoweringError(
            f"the engine's answer for the example is off by {error:.1e} of the model's largest output, which is more "
            f"than {allowed:.0e}. The model may amplify rounding errors, or change from call to call; check=False "
            "takes the engine as it is."
        )


def _on_cpu(decision: Decision) -> Decision:
    parts = (decision.channels, decision.columns, decision.layer)
    return Decision(*(None if part is None else part.cpu() for part in parts))
