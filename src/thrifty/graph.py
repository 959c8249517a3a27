"""Reading a model's structure with torch.fx: its convolutions, what normalises them and what stands behind them."""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from thrifty.dynamic import evaluating, hooked
from thrifty.errors import ConversionError
from thrifty.gates import ChannelGate, GatedConv, Wrapper

PLAIN_NORMS = ("BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d", "InstanceNorm2d")
"""Per-channel normalisations that do nothing else. Compared by name: FrozenBatchNorm2d is torchvision's."""

NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct")
"""timm's normalisations that go on with `drop` and `act`."""

MIXING_MODULES = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
MIXING_FUNCTIONS = {
    *CONV_FUNCTIONS, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear,
    torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, operator.matmul,
    F.scaled_dot_product_attention,
}  # fmt: skip
MIXING_METHODS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__"}

KEEPS_ZERO_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.SELU, nn.CELU,
    nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.PixelShuffle,
    nn.ChannelShuffle, nn.Upsample,
)  # fmt: skip
KEEPS_ZERO_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "silu", "gelu", "hardswish", "mish", "elu", "tanh",
    "mul", "imul", "mul_", "truediv", "div", "dropout", "dropout2d", "max_pool2d", "avg_pool2d",
    "boolean_dispatch", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax", "max", "flatten", "view",
    "reshape", "transpose", "permute", "contiguous", "cat", "concat", "concatenate", "stack", "chunk", "split",
    "getitem", "getattr", "squeeze", "unsqueeze", "interpolate", "clone", "stochastic_depth", "unbind",
    "expand", "type", "to", "float", "detach", "channel_shuffle", "pixel_shuffle", "expand_as",
}  # fmt: skip
SUM_NAMES = {"add", "iadd", "add_", "sub", "isub", "sub_"}
"""Functions that keep zero where every operand is a map: a number or a weight that is added does not."""

SHAPE_METHODS = {"size", "dim", "numel", "ndimension", "is_contiguous", "get_device"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "device", "dtype", "requires_grad", "is_cuda", "layout"}


UNREACHED = "evaluation does not reach it"
AS_FUNCTION = "called as a function: make it an nn.Conv2d to gate it"


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a model, and what a method that gates its outputs must know.

    Attributes:
        name: of the convolution in the model.
        conv: the convolution.
        norm: name of the normalisation that alone reads the convolution's output, or None.
        blocked: why its outputs must not be gated, or empty.
        limit: what keeps its readers from skipping the channels that it skips, or empty.
        unpruned: why the map that it reads must not be pruned, or empty.
        map_size: positions of that map where it was made, before any pooling.
        input_shape: [C_in, H_in, W_in] for the example.
        macs: dense MACs of the convolution per input for the example.
    """

    name: str
    conv: nn.Module | None
    norm: str | None = None
    blocked: str = ""
    limit: str = ""
    unpruned: str = ""
    map_size: int = 0
    input_shape: torch.Size = field(default_factory=torch.Size)
    macs: int = 0

    def of(self, modules: Mapping[str, nn.Module]) -> ConvSite:
        """The same site in a copy of the model."""
        return replace(self, conv=modules.get(self.name))


class Sites(tuple[ConvSite, ...]):
    """Every convolution of a model in the order of execution, then those that evaluation does not reach.

    Attributes:
        inputs: [N, …] of what each module reads first, by name, for an example of one input.
    """

    inputs: Mapping[str, torch.Size]

    def __new__(cls, sites: Iterable[ConvSite], inputs: Mapping[str, torch.Size]) -> Sites:
        made = super().__new__(cls, sites)
        made.inputs = inputs
        return made

    def of(self, modules: Mapping[str, nn.Module]) -> Sites:
        """The same in a copy of the model."""
        return Sites((site.of(modules) for site in self), self.inputs)

    def map_of(self, name: str) -> torch.Size | None:
        """[C, H, W] of the map that a module reads for each of the model's inputs; None if it reads anything else."""
        shape = self.inputs.get(name, torch.Size())
        return torch.Size(shape[1:]) if len(shape) == 4 and shape[0] == 1 else None


class _Tracer(fx.Tracer):
    """Keeps convolutions and normalisations whole, whatever library's subclass they are.

    A module whose forward torch.fx cannot follow is kept whole too, so that the network around it can be read.

    Attributes:
        opaque: names of the modules that could not be followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.opaque: set[str] = set()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether the module becomes one node of the graph."""
        if isinstance(module, (_ConvNd, _BatchNorm, Wrapper)) or name in self.opaque:
            return True
        return type(module).__name__ in PLAIN_NORMS + NORMS_WITH_ACTIVATION or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace a call of `module`, or note it as one node where its forward cannot be followed."""
        last = next(iter(reversed(self.graph.nodes)), None)
        stack = self.module_stack.copy()
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # fx runs the user's forward, which may raise anything on a proxy
            self.module_stack = stack
            for node in list(reversed(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.opaque.add(self.path_of_module(module))
            return super().call_module(module, forward, args, kwargs)


@dataclass(frozen=True)
class Structure:
    """A traced model: its graph, its modules by name, and the names of the modules that could not be traced."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    opaque: set[str]

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def holder(self, name: str) -> nn.Module | None:
        """The module that could not be traced and holds the module `name`."""
        return next((self.modules[path] for path in self.opaque if f"{name}.".startswith(f"{path}.")), None)


def trace(model: nn.Module) -> Structure:
    """The model's structure in evaluation mode; the model is left as it was, its hooks are not run.

    Raises:
        ConversionError: the model's forward depends on values, which torch.fx cannot follow.
    """
    if isinstance(model, torch.jit.ScriptModule) or type(model).__name__ == "OptimizedModule":  # of torch.compile
        raise ConversionError(
            f"a {type(model).__name__} hides its layers: convert the model before torch.compile or jit."
        )
    with evaluating(model), _without_hooks(model):
        try:
            tracer, graph = _traced(model)
        except Exception as error:  # fx runs the user's forward, which may raise anything on a proxy
            raise ConversionError(
                f"torch.fx cannot trace {type(model).__name__}: {' '.join(str(error).split())[:300]}. Make its forward "
                "go the same way for all inputs, without `if` or `assert` on their values or shapes, or mark the "
                "helper that needs them with torch.fx.wrap."
            ) from error
    return Structure(graph, dict(model.named_modules()), tracer.opaque)


def _traced(model: nn.Module) -> tuple[_Tracer, fx.Graph]:
    """The graph of a model that is given its inputs alone: what its forward takes besides stays at its default."""
    tracer = _Tracer()
    taken = list(inspect.signature(model.forward).parameters.values())[1:]
    options = {p.name: p.default for p in taken if p.default is not p.empty}
    try:
        return tracer, tracer.trace(model)
    except Exception:
        if not options:
            raise
    tracer = _Tracer()
    return tracer, tracer.trace(model, concrete_args=options)


def conv_sites(model: nn.Module, example: Tensor) -> Sites:
    """Every convolution of `model`, and what its modules read.

    Args:
        model: a dense model.
        example: one input [1, C, H, W] that the model takes.
    """
    net = trace(model)
    calls = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
    measured, inputs = _measure(model, example)
    sites: dict[str, ConvSite] = {}
    for node in net.graph.nodes:
        if node.op == "call_function" and node.target in CONV_FUNCTIONS:
            sites[node.name] = ConvSite(node.name, None, blocked=AS_FUNCTION, unpruned=AS_FUNCTION)
        conv = net.module(node)
        if not isinstance(conv, _ConvNd) or node.target in sites:
            continue
        name = str(node.target)
        seen = measured.get(name, _Measured())
        norm, node_after = _norm_of(node, net, calls)
        unfit = ""
        if not isinstance(conv, nn.Conv2d):
            unfit = f"{type(conv).__name__} is not a 2-d convolution"
        elif node.kwargs or len(node.args) != 1:
            unfit = "it is called otherwise than with a map alone"
        elif calls[name] > 1:
            unfit = "its weights are used at several places"
        elif name not in measured:
            unfit = "the example does not reach it"
        makers, shared = _makers(node, net)
        sizes = [measured[str(maker.target)].positions for maker in makers if str(maker.target) in measured]
        sites[name] = ConvSite(
            name,
            conv,
            norm,
            blocked=unfit or ("its channels are the model's outputs" if _reaches_output(node, net) else ""),
            limit=_limit(node_after, net),
            unpruned=unfit or shared,
            map_size=max(sizes, default=0),
            input_shape=torch.Size(inputs.get(name, ())[1:]),
            macs=seen.macs,
        )
    for name, module in net.modules.items():
        if isinstance(module, _ConvNd) and name not in sites:
            holder = net.holder(name)
            reason = f"torch.fx cannot trace {type(holder).__name__}, which holds it" if holder else UNREACHED
            macs = measured.get(name, _Measured()).macs
            sites[name] = ConvSite(name, module, blocked=reason, unpruned=reason, macs=macs)
    return Sites(sites.values(), inputs)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module `name` is: a module may be registered under several names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child in [child for child, module in parent._modules.items() if module is old]:
            setattr(parent, child, new)


def gate_outputs(model: nn.Module, site: ConvSite, gate: ChannelGate) -> GatedConv:
    """Put a gate behind a convolution of `model` and the normalisation that belongs to it, and return the three.

    Where the normalisation was there is an `nn.Identity`, or the activation that was part of it.
    """
    conv: Any = site.conv
    gate.to(device=conv.weight.device, dtype=conv.weight.dtype)
    norm: nn.Module | None = None
    if site.norm is not None:
        norm = model.get_submodule(site.norm)
        replace_module(model, site.norm, _detach_activation(norm))
    gated = GatedConv(conv, norm, gate)
    gate.train(conv.training)  # the convolution and the norm keep their own modes: frozen statistics stay frozen
    gated.training = conv.training
    replace_module(model, site.name, gated)
    return gated


def _detach_activation(norm: Any) -> nn.Module:
    """What stays where a normalisation was moved away: nothing, or the activation that was part of it."""
    if type(norm).__name__ not in NORMS_WITH_ACTIVATION:
        return nn.Identity().train(norm.training)
    rest = nn.Sequential(norm.drop, norm.act)
    rest.training = norm.training
    norm.drop, norm.act = nn.Identity().train(norm.training), nn.Identity().train(norm.training)
    return rest


def _norm_of(conv: fx.Node, net: Structure, calls: Counter[Any]) -> tuple[str | None, fx.Node]:
    """The normalisation that is the convolution's only reader, and the node behind which a gate would multiply."""
    if len(conv.users) == 1:
        reader = next(iter(conv.users))
        norm = net.module(reader)
        if norm is not None and calls[reader.target] == 1 and reader.args[:1] == (conv,):
            known = type(norm).__name__ in PLAIN_NORMS + NORMS_WITH_ACTIVATION
            read = any(n.op == "get_attr" and str(n.target).startswith(f"{reader.target}.") for n in net.graph.nodes)
            if known and not read and not _shares_weights(norm, net.modules.values()):
                return str(reader.target), reader
    return None, conv


def _shares_weights(module: nn.Module, others: Iterable[nn.Module]) -> bool:
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    return any(id(p) in own for other in others if other is not module for p in other.parameters(recurse=False))


def mixes(node: fx.Node, net: Structure) -> bool:
    """Whether each output of the node depends on many channels of its input, through weights or other values."""
    module = net.module(node)
    if module is not None:
        parts = module.modules() if node.target in net.opaque else [module]
        return any(isinstance(part, MIXING_MODULES) for part in parts)
    if node.op == "call_function":
        return node.target in MIXING_FUNCTIONS
    return node.op == "call_method" and node.target in MIXING_METHODS


def reads_shape(node: fx.Node) -> bool:
    """Whether the node takes something else than values from its input."""
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    return node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def _reaches_output(start: fx.Node, net: Structure) -> bool:
    pending, seen = list(start.users), {start}
    while pending:
        node = pending.pop()
        if node.op == "output":
            return True
        if node not in seen and not mixes(node, net) and not reads_shape(node):
            pending.extend(node.users)
        seen.add(node)
    return False


def _limit(start: fx.Node, net: Structure) -> str:
    """What stands between a gate and the readers of its channels and turns zeros into something else."""
    pending, seen = list(start.users), {start}
    activation = getattr(net.module(start), "act", None)
    if activation is not None and not isinstance(activation, KEEPS_ZERO_MODULES):
        return _own_work_only(type(activation).__name__)
    while pending:
        node = pending.pop(0)
        if node in seen or node.op == "output" or reads_shape(node):
            continue
        seen.add(node)
        module = net.module(node)
        if mixes(node, net) and node.target not in net.opaque:
            continue
        if module is not None and not isinstance(module, KEEPS_ZERO_MODULES):
            return _own_work_only(type(module).__name__)
        if module is None and not _keeps_zero(node):
            return _own_work_only(function_name(node))
        pending.extend(node.users)
    return ""


def _own_work_only(name: str) -> str:
    return f"skips its own work only: {name} follows"


def _makers(conv: fx.Node, net: Structure) -> tuple[list[fx.Node], str]:
    """The layers that make the map which a convolution reads, and why it must not be pruned, or an empty text."""
    makers, pending, seen = [], list(conv.all_input_nodes), {conv}
    while pending:
        node = pending.pop()
        if node in seen or node.op == "get_attr" or reads_shape(node):
            continue
        seen.add(node)
        if node.op == "placeholder":
            return [], "it reads the network's input"
        if sums_maps(node):
            return [], "it reads a sum with a shortcut"
        if mixes(node, net):
            makers.append(node)
        else:
            pending.extend(node.all_input_nodes)
    read, sums = _reached(makers, net)
    for reader in read:  # a projection: one reader's output meets in a sum with what the others made of the map
        projected = _reached([reader], net)[1]
        if projected & _descendants(makers, without=reader):
            sums |= projected
    return makers, "the map that it reads is a shortcut too" if sums else ""


def _reached(starts: Iterable[fx.Node], net: Structure) -> tuple[set[fx.Node], set[fx.Node]]:
    """The layers and the sums of maps that read what `starts` make, with nothing between that mixes channels."""
    pending, seen = [user for start in starts for user in start.users], set()
    layers, sums = set(), set()
    while pending:
        node = pending.pop()
        if node in seen or reads_shape(node):
            continue
        seen.add(node)
        if sums_maps(node):
            sums.add(node)
        elif mixes(node, net):
            layers.add(node)
        else:
            pending.extend(node.users)
    return layers, sums


def _descendants(starts: Iterable[fx.Node], without: fx.Node) -> set[fx.Node]:
    """Everything that depends on `starts` by a way that does not lead through one node."""
    pending, seen = [user for start in starts for user in start.users], {without}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return seen - {without}


def sums_maps(node: fx.Node) -> bool:
    """Whether the node adds one map to another."""
    if node.op not in {"call_function", "call_method"} or function_name(node) not in SUM_NAMES:
        return False
    return all(isinstance(value, fx.Node) and value.op != "get_attr" for value in node.args[:2])


def _keeps_zero(node: fx.Node) -> bool:
    """Whether a function or method gives zero wherever all the maps that it takes are zero."""
    name = function_name(node)
    if name in SUM_NAMES:
        return sums_maps(node)
    if name in {"truediv", "div"}:
        return isinstance(node.args[0], fx.Node) and node.args[0].op != "get_attr"
    if name == "pad":
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        return bool(mode != "constant" or not value)
    return name in KEEPS_ZERO_NAMES


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    target: Any = node.target
    return str(target if node.op == "call_method" else getattr(target, "__name__", target))


@dataclass(frozen=True)
class _Measured:
    """Of one convolution for the example: dense MACs, positions of its output."""

    macs: int = 0
    positions: int = 0


def _measure(model: nn.Module, example: Tensor) -> tuple[dict[str, _Measured], dict[str, torch.Size]]:
    """What is known of each convolution that the example reaches, and the shape of what each module reads first."""
    found: dict[str, _Measured] = {}
    shapes: dict[str, torch.Size] = {}

    def read(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next(iter((*arguments, *named.values())), None)
            if isinstance(first, Tensor):
                shapes[name] = first.shape

        return hook

    def note(name: str) -> Any:
        def hook(conv: Any, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            inputs = arguments or tuple(named.values())
            weights = conv.weight.numel() // conv.out_channels
            positions = inputs[0][0, 0].numel() if conv.transposed else output[0, 0].numel()
            per_position = conv.in_channels if conv.transposed else conv.out_channels
            weights = conv.weight[0].numel() if conv.transposed else weights
            macs = weights * per_position * positions
            found[name] = _Measured(macs, output[0, 0].numel())

        return hook

    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in convs]
    handles += [
        module.register_forward_pre_hook(read(name), with_kwargs=True, prepend=True)
        for name, module in model.named_modules()
    ]
    with hooked(handles), evaluating(model):
        model(example)
    return found, shapes


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(module, kind, getattr(module, kind)) for module in model.modules() for kind in kinds]
    for module, kind, _ in kept:
        setattr(module, kind, OrderedDict())
    try:
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)
