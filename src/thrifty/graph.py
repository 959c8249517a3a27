"""Reading a model's structure with torch.fx: its convolutions, what normalises them and what stands behind them."""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from thrifty.dynamic import evaluating
from thrifty.errors import ConversionError
from thrifty.gates import GatedConv

PLAIN_NORMS = ("BatchNorm2d", "SyncBatchNorm", "FrozenBatchNorm2d", "InstanceNorm2d")
"""Per-channel normalisations that do nothing else. Compared by name: FrozenBatchNorm2d is torchvision's."""

NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "FrozenBatchNormAct2d", "SyncBatchNormAct")
"""timm's normalisations that go on with `drop` and `act`."""

MIXING_MODULES = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
MIXING_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d, F.linear, torch.matmul, torch.bmm, torch.einsum, operator.matmul}
MIXING_FUNCTIONS |= {torch.conv2d, F.scaled_dot_product_attention}
MIXING_METHODS = {"matmul", "bmm", "mm", "__matmul__"}

KEEPS_ZERO_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.SELU, nn.CELU,
    nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.PixelShuffle,
    nn.ChannelShuffle, nn.Upsample,
)  # fmt: skip
KEEPS_ZERO_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "silu", "gelu", "hardswish", "mish", "elu", "tanh", "add",
    "iadd", "add_", "sub", "mul", "imul", "mul_", "truediv", "div", "dropout", "dropout2d", "max_pool2d", "avg_pool2d",
    "boolean_dispatch", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax", "max", "flatten", "view",
    "reshape", "transpose", "permute", "contiguous", "cat", "concat", "concatenate", "stack", "chunk", "split",
    "getitem", "getattr", "squeeze", "unsqueeze", "pad", "interpolate", "clone", "size", "stochastic_depth", "unbind",
    "expand", "type", "to", "float", "detach", "dim", "numel", "channel_shuffle", "pixel_shuffle", "expand_as",
}  # fmt: skip


@dataclass(frozen=True)
class ConvSite:
    """One convolution of a model, and what a method that gates its outputs must know.

    Attributes:
        name: of the convolution in the model.
        conv: the convolution.
        norm: name of the normalisation that alone reads the convolution's output, or None.
        blocked: why its outputs must not be gated, or empty.
        limit: what keeps its readers from skipping the channels that it skips, or empty.
        input_shape: [C_in, H_in, W_in] for the example.
        macs: dense MACs of the convolution per input for the example.
    """

    name: str
    conv: nn.Module | None
    norm: str | None = None
    blocked: str = ""
    limit: str = ""
    input_shape: torch.Size = torch.Size()
    macs: int = 0

    def of(self, modules: Mapping[str, nn.Module]) -> ConvSite:
        """The same site in a copy of the model."""
        return replace(self, conv=modules.get(self.name))


class _Tracer(fx.Tracer):
    """Keeps convolutions and normalisations whole, whatever library's subclass they are."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (_ConvNd, _BatchNorm, GatedConv)) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph in evaluation mode; the model is left as it was, its hooks are not run.

    Raises:
        ConversionError: the model's forward depends on values, which torch.fx cannot follow.
    """
    with evaluating(model), _without_hooks(model):
        try:
            return _Tracer().trace(model)
        except Exception as error:  # fx runs the user's forward, which may raise anything on a proxy
            raise ConversionError(
                f"torch.fx cannot trace {type(model).__name__}: {' '.join(str(error).split())[:300]}. Make its forward "
                "independent of values (shapes are fine), or mark the helper that depends on them with torch.fx.wrap."
            ) from error


def conv_sites(model: nn.Module, example: Tensor) -> tuple[ConvSite, ...]:
    """Every convolution of `model` in the order of execution, then those that evaluation does not reach.

    Args:
        model: a dense model.
        example: a batch of inputs [N, C, H, W] that the model takes.
    """
    graph = trace(model)
    modules = dict(model.named_modules())
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    measured = _measure(model, example)
    sites = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (F.conv1d, F.conv2d, F.conv3d, torch.conv2d):
            sites.append(ConvSite(node.name, None, blocked="called as a function: make it an nn.Conv2d to gate it"))
        if node.op != "call_module" or not isinstance(modules[node.target], _ConvNd):
            continue
        name = str(node.target)
        if any(site.name == name for site in sites):
            continue
        conv = modules[name]
        shape, macs = measured.get(name, (torch.Size(), 0))
        norm, node_after = _norm_of(node, modules, calls)
        blocked = ""
        if not isinstance(conv, nn.Conv2d):
            blocked = f"{type(conv).__name__} is not a 2-d convolution"
        elif calls[name] > 1 or names[id(conv)] > 1:
            blocked = "its weights are used at several places"
        elif _reaches_output(node, modules):
            blocked = "its channels are the model's outputs"
        elif name not in measured:
            blocked = "the example does not reach it"
        sites.append(ConvSite(name, conv, norm, blocked, _limit(node_after, modules), shape, macs))
    reached = {site.name for site in sites}
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and name not in reached:
            sites.append(ConvSite(name, module, blocked="evaluation does not reach it"))
    return tuple(sites)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module `name` is."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _norm_of(conv: fx.Node, modules: dict[str, nn.Module], calls: Counter[Any]) -> tuple[str | None, fx.Node]:
    """The normalisation that is the convolution's only reader, and the node behind which a gate would multiply."""
    if len(conv.users) == 1:
        reader = next(iter(conv.users))
        if reader.op == "call_module" and calls[reader.target] == 1 and reader.args[:1] == (conv,):
            kind = type(modules[str(reader.target)]).__name__
            if kind in PLAIN_NORMS + NORMS_WITH_ACTIVATION:
                return str(reader.target), reader
    return None, conv


def _mixes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether each output of the node depends on many channels of its input, through weights or other values."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], MIXING_MODULES)
    if node.op == "call_function":
        return node.target in MIXING_FUNCTIONS
    return node.op == "call_method" and node.target in MIXING_METHODS


def _reaches_output(start: fx.Node, modules: dict[str, nn.Module]) -> bool:
    pending, seen = list(start.users), {start}
    while pending:
        node = pending.pop()
        if node.op == "output":
            return True
        if node not in seen and not _mixes(node, modules):
            pending.extend(node.users)
        seen.add(node)
    return False


def _limit(start: fx.Node, modules: dict[str, nn.Module]) -> str:
    """What stands between a gate and the readers of its channels and turns zeros into something else."""
    pending, seen = list(start.users), {start}
    if start.op == "call_module" and type(modules[str(start.target)]).__name__ in NORMS_WITH_ACTIVATION:
        activation = getattr(modules[str(start.target)], "act", None)
        if activation is not None and not isinstance(activation, KEEPS_ZERO_MODULES):
            return _own_work_only(type(activation).__name__)
    while pending:
        node = pending.pop(0)
        if node in seen or node.op == "output" or _mixes(node, modules):
            continue
        seen.add(node)
        if node.op == "call_module":
            module = modules[str(node.target)]
            if not isinstance(module, KEEPS_ZERO_MODULES):
                return _own_work_only(type(module).__name__)
        elif _function_name(node) not in KEEPS_ZERO_NAMES:
            return _own_work_only(_function_name(node))
        pending.extend(node.users)
    return ""


def _own_work_only(name: str) -> str:
    return f"skips its own work only: {name} follows"


def _function_name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target if node.op == "call_method" else getattr(target, "__name__", target))


def _measure(model: nn.Module, example: Tensor) -> dict[str, tuple[torch.Size, int]]:
    """Input shape without the batch and dense MACs of each convolution that the example reaches."""
    found: dict[str, tuple[torch.Size, int]] = {}

    def note(name: str) -> Any:
        def hook(conv: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weights = conv.weight.numel() // conv.out_channels
            positions = inputs[0][0, 0].numel() if conv.transposed else output[0, 0].numel()
            per_position = conv.in_channels if conv.transposed else conv.out_channels
            weights = conv.weight[0].numel() if conv.transposed else weights
            found[name] = (inputs[0].shape[1:], weights * per_position * positions)

        return hook

    convs = [(name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd)]
    handles = [module.register_forward_hook(note(name)) for name, module in convs]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


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
