"""From torch networks to programs.

The network runs once on an example; what becomes of the input is recorded (`recorder`, `rules`, `values`), made into
fewer operators (`fusion`) and named (here).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thrifty.dynamic import Dynamic
from thrifty.errors import LoweringError, ThriftyError
from thrifty.lowering.fusion import fuse
from thrifty.lowering.nodes import Graph, Node
from thrifty.lowering.recorder import record
from thrifty.lowering.values import Resolver, Value
from thrifty.program import Operator, Preprocessing, Program

__all__ = ["lower"]


def lower(
    model: nn.Module, example: Tensor, preprocessing: Preprocessing | None = None, classes: Iterable[str] = ()
) -> Program:
    """Lower a dense or dynamic model, in evaluation mode, to a program for images of the example's size.

    Batch normalisation, activations, residual sums and padding are folded into the layers that they belong to. The
    model is not changed; the program holds copies of its weights in float32.

    Args:
        model: any module that takes a batch of images and returns one tensor, [N, classes] or [N, C, H, W].
        example: a batch of images [N, C, H, W] that the model takes, on its device. N may be 1.
        preprocessing: how photographs become the model's inputs, for a program that takes uint8.
        classes: names of the classes, in the order of the logits.

    Raises:
        LoweringError: the model does something that programs cannot express. The message names it, the layer, and the
            place in the user's code.
    """
    if not isinstance(model, nn.Module):
        raise LoweringError(f"lower takes a torch.nn.Module, not a {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise LoweringError("lower takes the module that was scripted or traced, not the ScriptModule made of it.")
    if isinstance(classes, str):
        raise LoweringError(f"classes is {classes!r}, but must be a list of names.")
    if not isinstance(example, Tensor) or example.ndim != 4 or not example.is_floating_point():
        given = f"{example.dtype} {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise LoweringError(f"example must be a batch of float images [N, C, H, W], not {given}.")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise LoweringError(f"preprocessing is {preprocessing!r}, but must be a thrifty.Preprocessing(mean, std).")
    if not example.numel():
        raise LoweringError(f"example is empty: {tuple(example.shape)}. Give one image at least.")
    try:
        graph, value = record(model, example)
    except ThriftyError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise LoweringError(f"the model does not take an example of shape {tuple(example.shape)}: {error}") from error
    with torch.no_grad():
        node, flat = _output(graph, value)
        nodes, node = fuse(graph, node)
        return _program(nodes, node, flat, preprocessing, tuple(classes), _settings(model))


def _output(graph: Graph, value: Value) -> tuple[Node, bool]:
    graph.scope, graph.place, graph.whole = "output", "", False
    try:
        node = Resolver(graph).map(value)
    except LoweringError as error:
        raise LoweringError(f"what the model returns {error}.") from error
    if node.kind == "input":
        node = graph.add("activation", [node], node.shape, activation="none")
    return node, len(value.shape) == 2


def _settings(model: nn.Module) -> dict[str, Any] | None:
    """Settings of the method that made the model dynamic; a function in `where` is left out."""
    if not isinstance(model, Dynamic):
        return None
    try:
        settings = model.method.settings()
    except ThriftyError:
        settings = replace(model.method, where=None).settings()
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _program(
    nodes: list[Node], output: Node, flat: bool, preprocessing: Preprocessing | None, classes: tuple[str, ...],
    method: dict[str, Any] | None,
) -> Program:  # fmt: skip
    number = {node: i for i, node in enumerate(nodes)}
    names = _names(nodes)
    weights = _Weights()
    operators = [
        Operator(
            node.kind,
            names[node],
            tuple(number[read] for read in node.inputs),
            number[node],
            {key: value for key, value in node.attributes.items() if (key, value) != ("activation", "none")},
            {role: weights.add(f"{names[node]}.{role}", tensor) for role, tensor in node.tensors.items()},
            **({} if node.guard is None else {"guard": number[node.guard]}),
        )
        for node in nodes[1:]
    ]
    return Program(
        tuple(node.shape for node in nodes), tuple(operators), number[output], flat, weights.arrays, preprocessing,
        classes, method,
    )  # fmt: skip


class _Weights:
    """Tensors of a program; what several operators share is there once."""

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self.known: dict[Any, str] = {}
        self.tensors: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> str:
        """Keep a copy as float32, or int32 for an index, and return the name that it has."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key in self.known:
            return self.known[key]
        kind = np.float32 if tensor.is_floating_point() else np.int32
        if tensor.dtype in {torch.bfloat16, torch.float16}:
            tensor = tensor.float()
        array: NDArray[Any] = np.array(tensor.detach().cpu().numpy(), kind, order="C")
        array.flags.writeable = False
        self.arrays[name] = array
        self.known[key] = name
        self.tensors.append(tensor)  # while it lives, no other tensor gets its address
        return name


LAYERS = frozenset({"conv", "linear", "layer_norm", "layer_gate"})


def _names(nodes: list[Node]) -> dict[Node, str]:
    """Unique names: layers by their modules, helpers by module and kind; repetitions are numbered."""
    taken: Counter[str] = Counter()
    names: dict[Node, str] = {}
    for layers_first in (True, False):
        for node in nodes[1:]:
            if (node.kind in LAYERS) is not layers_first:
                continue
            name = node.scope or "model"
            if not layers_first and (not node.whole or name in taken):
                name = f"{name}.{_verb(node)}"
            taken[name] += 1
            names[node] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names


def _verb(node: Node) -> str:
    activation = node.attributes.get("activation", "none")
    return activation if node.kind == "activation" and activation != "none" else node.kind
