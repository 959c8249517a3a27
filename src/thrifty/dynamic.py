"""Dynamic models: the user's own class with four members more, made without touching its forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from thrifty.decision import Decision
from thrifty.density import Density, check_patterns
from thrifty.errors import ThriftyError
from thrifty.gates import Gate, LayerGate, gates_of

if TYPE_CHECKING:
    from thrifty.conversion import Conversion
    from thrifty.methods import MethodConfig


class Dynamic(nn.Module):
    """What `convert` adds to a model. `isinstance(model, Dynamic)` tells a dynamic model from a dense one."""

    conversion: Conversion
    method: MethodConfig

    def gates(self) -> dict[str, Gate]:
        """The model's gates by the name of what each belongs to: a convolution, or a block for a layer gate."""
        return gates_of(self)

    def regularization(self) -> Tensor:
        """The method's loss term for the latest forward pass in training mode, a scalar; add it to your loss."""
        return self.method.regularization(self)

    def set_density(self, density: Density | None = None, columns: Density | None = None) -> None:
        """Change the shares that are kept.

        Args:
            density: of channels, in (0, 1]: one number, or by pattern of the layers' names. None: nothing changes.
            columns: of positions, likewise, where the method skips any.

        Raises:
            ThriftyError: a share is out of range, a pattern fits no gated layer, none is gated, or the method keeps no
                such shares; everything stays as it was.
        """
        for shares in (density, columns):
            if shares is not None:
                check_patterns(shares, self.gates())
        if columns is not None:
            method: Any = self.method
            if not hasattr(method, "set_column_density"):
                raise ThriftyError(f"{method.name} skips no columns, so that they have no density.")
            method.set_column_density(self, columns)
        if density is not None:
            self.method.set_density(self, density)

    @property
    def density(self) -> float:
        """Mean density over the gated layers."""
        return self.method.density_of(self)


def decisions(model: nn.Module, x: Tensor) -> dict[str, Decision]:
    """Decisions of every gate for inputs x [N, C, H, W], in evaluation mode, by name of the gated layer or block.

    Gates inside of a block that is skipped decide nothing: theirs are all False there.
    """
    if not isinstance(model, Dynamic):
        raise ThriftyError(f"{type(model).__name__} is a dense model and decides nothing. Convert it first.")
    found: dict[str, Decision] = {}

    def note(name: str) -> Any:
        def hook(gate: Gate, _inputs: object, output: tuple[Any, ...]) -> None:
            found[name] = gate.decision(output)

        return hook

    handles = [gate.register_forward_hook(note(name)) for name, gate in model.gates().items()]
    with evaluating(model), hooked(handles):
        model(x)
    for gate in model.gates().values():
        if isinstance(gate, LayerGate):
            runs = found[gate.block].layer
            found.update({name: found[name].only(runs) for name in gate.members if name in found})
    return found


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were registered for the block alone: they are removed after it, whatever happens in it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; each module's own mode is put back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():  # which hides operations from what counts or records them
            yield
    finally:
        for module, training in modes:
            module.training = training


def make_dynamic(model: nn.Module, method: MethodConfig, conversion: Conversion) -> Dynamic:
    """Turn `model` itself into a dynamic model: its class gains `Dynamic`, its forward stays what it was."""
    model.__class__ = _dynamic_class(type(model))
    dynamic = cast(Dynamic, model)
    dynamic.method = method
    dynamic.conversion = conversion
    return dynamic


def taken_names(model: nn.Module) -> list[str]:
    """What `Dynamic` adds to a model and the model has already, under another meaning."""
    names = [name for name in (*vars(Dynamic), *Dynamic.__annotations__) if not name.startswith("_")]
    return [name for name in names if hasattr(model, name)]


_CLASSES: dict[type, type] = {}


def _dynamic_class(base: type) -> type:
    if base not in _CLASSES:
        members = {"__reduce_ex__": _reduce, "__module__": base.__module__, "__doc__": base.__doc__}
        if issubclass(base, fx.GraphModule):
            members |= {"__deepcopy__": _no_copy, "__reduce_ex__": _no_copy}
        _CLASSES[base] = type(f"Dynamic{base.__name__}", (Dynamic, base), members)
    return _CLASSES[base]


def _reduce(self: Any, _protocol: object) -> tuple[Any, ...]:
    # A class made at run time can't be found by name when a pickle is read: name the user's class instead.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuild, (type(self).__mro__[2],), state


def _no_copy(self: Any, _memo: object) -> Any:
    raise ThriftyError(
        "a dynamic model that was made of a traced one (fx.GraphModule) can't be copied or pickled: its class is made "
        "anew for every copy. Convert the model that was traced instead."
    )


def _rebuild(base: type) -> Any:
    cls: Any = _dynamic_class(base)
    return cls.__new__(cls)
