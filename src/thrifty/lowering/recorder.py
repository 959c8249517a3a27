"""Runs a network once and records what becomes of its input, operation by operation.

Modules and functions of whatever style come down to the same few operations of torch. What does not depend on the
input is a constant, whose value is at hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from thrifty.dynamic import evaluating, hooked
from thrifty.errors import LoweringError, ThriftyError
from thrifty.gates import ChannelGate, Gate, InputGate, LayerGate, layer_names
from thrifty.lowering.call import Call
from thrifty.lowering.gating import layer_gate, pruned
from thrifty.lowering.nodes import Graph
from thrifty.lowering.rules import RULES, SUPPORTED
from thrifty.lowering.values import IMAGES, Refused, Resolver, Scale, Tracked, Value

OWN = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
OWN_FILES = {str(Path(__file__).parent.parent / name) for name in ("dynamic.py", "gates.py", "compiler.py")}


def record(model: nn.Module, example: Tensor) -> tuple[Graph, Value]:
    """The nodes that a network is made of, and what it returns.

    Args:
        model: any module that takes a batch of images and returns one tensor.
        example: a batch [N, C, H, W].

    Raises:
        LoweringError: the network does something that programs cannot express.
    """
    with torch.inference_mode(False):
        image = example[:1].detach()
        x = torch.cat([image] * IMAGES).clone() if len(example) < IMAGES else example[:IMAGES].detach().clone()
    channels, height, width = x.shape[1:]
    graph = Graph((channels, height, width))
    recorder = _Recorder(graph)
    recorder.values[x] = Value(graph.nodes[0], tuple(x.shape))
    handles = []
    names = layer_names(model)
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(recorder.entering(names[path]), prepend=True))
        handles.append(module.register_forward_hook(recorder.leaving, always_call=True))
    with hooked(handles), evaluating(model), recorder:
        output = model(x)
    if not isinstance(output, Tensor):
        raise LoweringError(
            f"{type(model).__name__} returns a {type(output).__name__}, but programs return one tensor. "
            "Wrap it in a module that picks the logits."
        )
    known = recorder.values.get(output)
    if known is None:
        raise LoweringError(f"what {type(model).__name__} returns does not depend on its input.")
    if not isinstance(known, Value):
        raise LoweringError(f"{type(model).__name__} returns {_reason(known)}.")
    return graph, known


@dataclass
class _Frame:
    """A module that is being executed."""

    name: str
    module: nn.Module


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.resolver = Resolver(graph)
        self.values: Any = WeakTensorKeyDictionary()
        self.frames: list[_Frame] = []

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, _inputs: object) -> None:
            self.frames.append(_Frame(name, module))

        return hook

    def leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.frames.pop()
        if isinstance(module, Gate) and output is not None:
            x = self.values.get(inputs[0])
            if isinstance(x, Value):
                with self._naming("the gate"):
                    self._gate(module, x, output)

    def _gate(self, gate: Gate, x: Value, output: tuple[Any, ...]) -> None:
        """Note what a gate makes of x: its decisions are for executors, nothing else may read them."""
        kept, *decisions = output
        for decision in decisions:
            if decision is not None:
                self.values[decision] = Refused("a gate's decision")
        self.graph.scope, self.graph.place = self._scope(), _users_place()
        if isinstance(gate, ChannelGate):
            self.values[kept] = Scale(gate, f"{self._scope()}.gate", x, tuple(kept.shape))
        elif isinstance(gate, InputGate):
            self.values[kept] = pruned(self.resolver, gate, x)
        elif isinstance(gate, LayerGate):
            self.values[kept] = Scale(gate, gate.block, x, tuple(kept.shape), layer_gate(self.resolver, gate, x))
        else:
            self.values[kept] = Refused(f"what a {type(gate).__name__} made, which programs have no form for")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(isinstance(frame.module, Gate) for frame in self.frames):
            return output
        if torch.Tag.nondeterministic_seeded in func.tags and func.overloadpacket not in RULES:
            self.graph.scope, self.graph.place = self._scope(), _users_place()
            with self._naming(func.overloadpacket.__name__, f" Supported are: {SUPPORTED}."):
                raise LoweringError(
                    "draws at random, as programs don't: give dropout that is a function training=self.training"
                )
        if not self._reads_tracked((args, kwargs)):
            return output
        with self._naming(func.overloadpacket.__name__, f" Supported are: {SUPPORTED}."):
            self._record(func, args, kwargs or {}, output)
        return output

    @contextmanager
    def _naming(self, what: str, advice: str = "") -> Iterator[None]:
        """Say of errors what they are about and where that is; what is no refusal is a fault of the rules."""
        try:
            yield
        except LoweringError as error:
            raise LoweringError(f"{self._where(what)} {error}.{advice}") from error
        except ThriftyError:
            raise
        except Exception as error:
            raise LoweringError(
                f"{self._where(what)} made thrifty fail: {type(error).__name__}: {error}. This is a fault of thrifty, "
                "not of the model: please report it, with what the model does there."
            ) from error

    def _where(self, what: str) -> str:
        return f"{what} in {self.graph.scope or 'the model'} ({self.graph.place})"

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.graph.scope, self.graph.place = self._scope(), _users_place()
        self.graph.whole = bool(self.frames) and next(self.frames[-1].module.children(), None) is None
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            raise LoweringError("is not supported")
        schema = func._schema
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments |= dict(zip(arguments, args, strict=False)) | kwargs
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        changed = [arguments[name] for name in written if arguments[name] is not None]
        before = [self.values.get(tensor) for tensor in changed]
        if any(known is None for known in before):
            raise LoweringError("writes values that depend on the input into a constant")
        after = rule(Call(func, arguments, output, self._known, self.resolver))
        outputs = output if isinstance(output, (list, tuple)) else [output]
        known_outputs = after if isinstance(after, (list, tuple)) else [after]
        for tensor, known in zip(outputs, known_outputs, strict=True):
            if isinstance(tensor, Tensor) and known is not None:
                if any(tensor is one for one in changed):
                    self._rename_views(tensor, known)
                self.values[tensor] = known

    def _scope(self) -> str:
        """The executed module's name."""
        return self.frames[-1].name if self.frames else ""

    def _reads_tracked(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value in self.values
        if isinstance(value, dict):
            value = value.values()
        elif not isinstance(value, (list, tuple)):
            return False
        return any(self._reads_tracked(part) for part in value)

    def _known(self, value: Any) -> Tracked | None:
        known = self.values.get(value) if isinstance(value, Tensor) else None
        if isinstance(known, Refused):
            raise LoweringError(f"takes {known.reason}")
        return known

    def _rename_views(self, changed: Tensor, after: Tracked) -> None:
        """Tensors that share memory with one that was changed in place hold other values from now on."""
        memory = changed.untyped_storage().data_ptr()
        others = [t for t in self.values if t is not changed and t.untyped_storage().data_ptr() == memory]
        if not others:
            return
        places = _memory(changed)
        for other in others:
            seen = _memory(other)
            inside = torch.isin(seen, places)
            if not bool(inside.any()):
                continue
            if bool(inside.all()) and isinstance(after, Value):
                order = torch.argsort(places)
                found = order[torch.searchsorted(places[order], seen)]
                index = after.index().reshape(-1)[found].reshape(other.shape)
                self.values[other] = Value(after.node, tuple(other.shape), index)
            else:
                self.values[other] = Refused("a tensor of which a part was changed in place")


def _memory(tensor: Tensor) -> Tensor:
    """For each element of a tensor, which element of its storage it is."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return torch.arange(size).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)


def _users_place() -> str:
    """File and line of the innermost code that is neither torch's nor the recorder's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*OWN, "<")) and name not in OWN_FILES:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown place"


def _reason(known: Tracked) -> str:
    return known.reason if isinstance(known, Refused) else "a gate's scale"
