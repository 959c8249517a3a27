"""Residual blocks of a model, found on its fx graph: x + F(x), where F, the branch, may be skipped for an input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from thrifty.gates import LayerEntry, LayerExit, LayerGate, Link, Wrapper
from thrifty.graph import Sites, Structure, function_name, mixes, reads_shape, replace_module, sums_maps, trace

PASSED_MODULES = ("Identity", "Dropout", "Dropout2d", "DropPath", "StochasticDepth")
PASSED_FUNCTIONS = {"dropout", "dropout2d", "stochastic_depth", "drop_path", "permute", "transpose", "contiguous"}
PASSED_FUNCTIONS |= {"clone", "to", "float", "type"}
PRODUCTS = {"mul", "mul_", "imul"}


@dataclass(frozen=True)
class Block:
    """A residual block: the sum of a shortcut and a branch, both of which read one map.

    The shortcut is the map itself, or has one convolution at most. Of two operands the one with more weights is the
    branch. A block that holds another block which can take a gate is none.

    Attributes:
        name: path of the innermost module that holds the sum and the members; `<first member>-<last member>` where
            that is the whole model or another block's.
        entry: path of the module that alone reads the map in the branch.
        exit: path of the module whose output, times constants, reaches the sum.
        members: the branch's convolutions and linear layers that nothing else needs, in the order of execution.
        refused: why no gate can skip the branch, or empty.
    """

    name: str
    entry: str
    exit: str
    members: tuple[str, ...]
    refused: str = ""


def residual_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The residual blocks of a dense model in the order of execution.

    Raises:
        ConversionError: torch.fx cannot trace the model.
    """
    return _Finder(trace(model)).blocks()


def block_input(model: nn.Module, block: Block, sites: Sites) -> tuple[torch.Size | None, int]:
    """Shape [C, H, W] of the map that a block reads, None where that is not known, and MACs of its convolutions."""
    members = [site for site in sites if site.name in block.members]
    macs = sum(site.macs for site in members)
    entry = model.get_submodule(block.entry)
    while isinstance(entry, Wrapper):
        entry = getattr(entry, entry.INNER)
    # A plain LayerNorm's channels come last: LayerNorm2d, of torchvision and timm, is for maps.
    known = "Norm" in type(entry).__name__ or isinstance(entry, (_ConvNd, nn.ReLU, nn.SiLU, nn.GELU))
    if not members or not known or type(entry) is nn.LayerNorm:
        return None, macs
    return sites.map_of(block.entry), macs


def gate_block(model: nn.Module, block: Block, gate: LayerGate) -> None:
    """Let a gate decide whether the branch of a block of `model` runs."""
    link = Link()
    entry = model.get_submodule(block.entry)
    like = next(entry.parameters(), None)
    if like is not None:
        gate.to(device=like.device, dtype=like.dtype)
    gate.train(entry.training)
    replace_module(model, block.entry, _in_mode_of(entry, LayerEntry(entry, gate, link)))
    last = model.get_submodule(block.exit)
    replace_module(model, block.exit, _in_mode_of(last, LayerExit(last, link)))


def _in_mode_of(module: nn.Module, wrapper: nn.Module) -> nn.Module:
    wrapper.training = module.training
    return wrapper


class _Finder:
    def __init__(self, net: Structure) -> None:
        self.net = net
        self.nodes = list(net.graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.calls = Counter(str(node.target) for node in self.nodes if node.op == "call_module")
        self.read = {str(node.target).rpartition(".")[0] for node in self.nodes if node.op == "get_attr"}
        self.ancestors: dict[fx.Node, set[fx.Node]] = {}
        self.constant: dict[fx.Node, bool] = {}
        self.paths = {node: _paths(node) for node in self.nodes}
        for node in self.nodes:
            inputs = node.all_input_nodes
            self.constant[node] = node.op == "get_attr" or (
                bool(inputs) and all(self.constant[read] for read in inputs)
            )
            mine = {node}
            if not reads_shape(node):
                for read in inputs:
                    if not self.constant[read]:
                        mine |= self.ancestors[read]
            self.ancestors[node] = mine

    def blocks(self) -> tuple[Block, ...]:
        found: list[tuple[set[fx.Node], Block]] = []
        for node in self.nodes:
            candidate = self._block(node) if sums_maps(node) else None
            if candidate is None:
                continue
            branch, block = candidate
            inner = [other for inside, other in found if inside < branch]
            if not any(not other.refused for other in inner):
                found = [(inside, other) for inside, other in found if not inside < branch]
                found.append((branch, block))
        blocks = []
        taken: set[str] = set()
        for _, block in found:
            name = block.name
            if not name or name in taken or name in block.members:
                name = f"{block.members[0]}-{block.members[-1]}"
            taken.add(name)
            blocks.append(Block(name, block.entry, block.exit, block.members, block.refused))
        return tuple(blocks)

    def _block(self, total: fx.Node) -> tuple[set[fx.Node], Block] | None:
        """The block that ends in a sum, and the nodes of its branch."""
        first, second = total.args[:2]
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        common = self.ancestors[first] & self.ancestors[second]
        if not common:
            return None
        x = max(common, key=self.order.__getitem__)
        sides = [(self._between(x, operand), operand) for operand in (first, second)]
        sides.sort(key=lambda side: self._work(side[0]))
        (shortcut, _), (branch, end) = sides
        layers = self._layers(branch)
        if not layers or self._mixing(shortcut) > 1 or any(self._is_linear(node) for node in shortcut):
            return None
        members = self._needed_only(branch, total, layers)
        entry, no_entry = self._entry(branch, x)
        leave, no_exit = self._exit(branch, end)
        refused = no_entry or no_exit
        if not refused and any(mixes(node, self.net) and not self._layers({node}) for node in branch):
            refused = "it mixes channels by a function"
        if not refused and any(
            not self.constant[read] and read is not x and read not in branch
            for node in branch
            if not reads_shape(node)
            for read in node.all_input_nodes
            if not self._is_shape(read)
        ):
            refused = "its branch reads other maps too"
        if not refused and members != tuple(layers):
            refused = "something else reads a part of its branch"
        return branch, Block(self._name(total, layers), entry, leave, members or tuple(layers), refused)

    def _between(self, x: fx.Node, end: fx.Node) -> set[fx.Node]:
        return {node for node in self.ancestors[end] if x in self.ancestors[node] and node is not x}

    def _is_shape(self, node: fx.Node) -> bool:
        """Whether a value comes from shapes alone."""
        sources = [n for n in self.ancestors[node] if not n.all_input_nodes and n is not node]
        return reads_shape(node) or not sources

    def _is_linear(self, node: fx.Node) -> bool:
        return isinstance(self.net.module(node), nn.Linear)

    def _mixing(self, nodes: Iterable[fx.Node]) -> int:
        return sum(mixes(node, self.net) for node in nodes)

    def _layers(self, nodes: set[fx.Node]) -> dict[str, int]:
        """Convolutions and linear layers that the nodes call, by name, with their numbers of weights."""
        found = {}
        for node in sorted(nodes, key=self.order.__getitem__):
            module = self.net.module(node)
            for path, part in module.named_modules() if module is not None else ():
                if isinstance(part, (_ConvNd, nn.Linear)):
                    found[f"{node.target}.{path}" if path else str(node.target)] = part.weight.numel()
        return found

    def _work(self, nodes: set[fx.Node]) -> int:
        return sum(self._layers(nodes).values())

    def _needed_only(self, branch: set[fx.Node], total: fx.Node, layers: dict[str, int]) -> tuple[str, ...]:
        """Names of the layers, called once, whose results reach nothing but the sum."""
        inside = {total}
        for node in reversed(self.nodes[: self.order[total]]):  # those that nothing reads are inside too
            if all(user in inside or reads_shape(user) for user in node.users):
                inside.add(node)
        kept = self._layers({n for n in inside & branch if n.op != "call_module" or self.calls[str(n.target)] == 1})
        return tuple(name for name in layers if name in kept)

    def _entry(self, branch: set[fx.Node], x: fx.Node) -> tuple[str, str]:
        readers = [node for node in branch if x in node.all_input_nodes and not reads_shape(node)]
        if len(readers) != 1:
            return "", f"{len(readers)} operations of its branch read its input"
        node = readers[0]
        if node.op != "call_module" or node.args[:1] != (x,):
            return "", f"its branch begins with {function_name(node)}, which is no module"
        return self._usable(str(node.target))

    def _exit(self, branch: set[fx.Node], node: fx.Node) -> tuple[str, str]:
        while node in branch:
            module = self.net.module(node)
            if module is not None and type(module).__name__ not in PASSED_MODULES:
                return self._usable(str(node.target))
            if module is None and not self._passes(node):
                break
            inputs = [read for read in node.all_input_nodes if not self.constant[read] and not self._is_shape(read)]
            if len(inputs) != 1 or len(inputs[0].users) != 1:
                break
            node = inputs[0]
        for path in reversed(self.paths.get(node, ())):
            scope = [other for other in self.nodes if path in self.paths[other]]
            ends = [other for other in scope if any(path not in self.paths[user] for user in other.users)]
            if ends == [node] and branch.issuperset(scope) and len(scope) > 1:
                return self._usable(path)
        return "", f"its branch ends with {function_name(node)}, which is no module"

    def _usable(self, path: str) -> tuple[str, str]:
        if self.calls[path] > 1:
            return "", f"{path} is called at several places"
        if path in self.read:
            return "", f"what {path} holds is read elsewhere"
        return path, ""

    def _passes(self, node: fx.Node) -> bool:
        """Whether a function's output is its input times a constant, perhaps in another order."""
        name = function_name(node)
        if name in PRODUCTS:
            return sum(isinstance(v, fx.Node) and not self.constant[v] for v in node.args[:2]) == 1
        return name in PASSED_FUNCTIONS

    def _name(self, total: fx.Node, layers: Iterable[str]) -> str:
        for path in reversed(self.paths[total]):
            if all(layer.startswith(f"{path}.") for layer in layers):
                return path
        return ""


def _paths(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules in whose forward a node is called, the outermost first; not of the one that it calls."""
    paths = tuple(path for path in node.meta.get("nn_module_stack", {}) if path)
    return tuple(path for path in paths if node.op != "call_module" or path != str(node.target))
