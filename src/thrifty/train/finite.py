"""NaN and infinity: where they are, and where they came from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from thrifty.dynamic import hooked


def non_finite_tensor(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer of `model` that holds NaN or infinity, or None."""
    return next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)


def first_non_finite(model: nn.Module, x: Tensor) -> str:
    """Where NaN or infinity first appears when `model` computes `x`: input, a weight, or a layer's output, by name.

    The model runs once in the mode that it is in, whatever is found, so that processes which share batch statistics
    stay in step; its buffers may change.
    """
    parameters = model.named_parameters()  # no buffers: running statistics have caught it from the step that failed
    weight = next((name for name, parameter in parameters if not parameter.isfinite().all()), None)
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not found and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    with hooked(handles), torch.no_grad():
        model(x)
    if not x.isfinite().all():
        return "the input has it already"
    if weight is not None:
        return f"{weight} has it"
    return (
        f"it first appears in the output of {found[0]}" if found else "every layer's output is finite, the loss is not"
    )
