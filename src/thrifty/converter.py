"""From a dense model to a dynamic one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from thrifty.conversion import Conversion, Place
from thrifty.dynamic import Dynamic, make_dynamic, taken_names
from thrifty.errors import ConversionError, ThriftyError
from thrifty.gates import LayerGate
from thrifty.graph import conv_sites
from thrifty.macs import count_macs
from thrifty.methods.base import NOT_SELECTED, MethodConfig

log = logging.getLogger(__name__)


def convert(model: nn.Module, method: MethodConfig, example: Tensor, *, inplace: bool = False) -> Dynamic:
    """Make a dense model dynamic.

    The result is of the model's own class with a few members more (see `Dynamic`): it trains with any loop, keeps
    device, dtype, mode, hooks, and the names of parameters outside gated layers. A gated convolution `c` holds its
    parts as `c.conv`, `c.norm` and `c.gate`; where its normalisation was, there is an `nn.Identity` (or what else
    that module did). A layer that cannot be gated stays dense; `result.conversion` says which and why.

    Args:
        model: any CNN that torch.fx can trace. It is copied, unless `inplace`.
        method: the method's config, such as `thrifty.FBS(density=0.5)`.
        example: a batch of inputs [N, C, H, W] on the model's device.
        inplace: change `model` itself instead of a copy.

    Raises:
        ConversionError: the model as a whole cannot be converted, or does not take the example.
        ThriftyError: a setting of the method does not fit the model, such as a pattern that no layer's name fits.
    """
    _check(model, method, example)
    try:
        dense = count_macs(model, example[:1])
    except ThriftyError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise ConversionError(f"the model does not take an example of shape {tuple(example.shape)}: {error}") from error
    sites = conv_sites(model, example[:1].clone())  # it may write to what it is given
    if not inplace:
        model = copy.deepcopy(model)
        modules = dict(model.named_modules())
        sites = sites.of(modules)
    places = method.place(model, sites)
    if method.where is not None and not callable(method.where) and not any(place.gated for place in places):
        notes = dict.fromkeys(place.note for place in places if place.note not in {"", NOT_SELECTED})
        reasons = f" Those that it names stay dense: {'; '.join(notes)}." if notes else ""
        raise ConversionError(
            f"where={method.where!r} leaves no layer gated.{reasons} "
            "Without where, the report `conversion` of the result says which can be."
        )
    macs = {name: int(count[0]) for name, count in dense.layers.items()}
    places += tuple(_skipped(model, macs.keys() - {place.name for place in places}, macs))
    conversion = Conversion(method.name, places, int(dense.total[0]), macs, tuple(example.shape[1:]))
    log.info(conversion.summary())
    dynamic = make_dynamic(model, method, conversion)
    method.measure(dynamic, example[:1].clone())
    return dynamic


def _check(model: object, method: object, example: object) -> None:
    """An error where there is nothing to convert, or nothing to convert it by."""
    if isinstance(model, Dynamic):
        raise ConversionError(f"the model is dynamic already ({model.method.name}). Convert the dense one.")
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert takes a torch.nn.Module, not a {type(model).__name__}.")
    if not isinstance(method, MethodConfig):
        given = method.__name__ if isinstance(method, type) else repr(method)
        raise ConversionError(f"method is {given}, but must be a method's config, such as thrifty.FBS(density=0.5).")
    if not isinstance(example, Tensor) or example.ndim != 4:
        given = str(tuple(example.shape)) if isinstance(example, Tensor) else type(example).__name__
        raise ConversionError(f"example must be a batch of inputs [N, C, H, W], not {given}.")
    if not len(example):
        raise ConversionError("example is an empty batch. Give one input at least.")
    taken = taken_names(model)
    if taken:
        raise ConversionError(
            f"{type(model).__name__} has members of its own named {', '.join(taken)}, which dynamic models need. "
            "Rename them, or wrap the model in another nn.Module."
        )
    for name, tensor in model.state_dict().items():
        if is_lazy(tensor):
            raise ConversionError(f"{name} of the model has no values yet. Run the model on a batch once first.")
        if not tensor.isfinite().all():
            raise ConversionError(f"{name} of the model has NaN or infinite values. Repair the weights first.")


def _skipped(model: nn.Module, names: Collection[str], macs: Mapping[str, int]) -> Iterator[Place]:
    """Those of these layers that run only if a layer gate opens: linear ones, for methods report convolutions."""
    for gate in model.modules():
        if isinstance(gate, LayerGate):
            for name in gate.members:
                if name in names:
                    yield Place(name, True, f"block {gate.block}: layer gate", macs[name])
