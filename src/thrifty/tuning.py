"""Which layers can do with less: a sweep of ratios, group by group, and what it proposes for a compute target.

One group of layers after another is pruned at rising ratios while all others keep everything. The proposal is greedy:
it raises, step by step, the group that loses least accuracy per MAC saved in the sweep, until the MACs of the model
with all steps taken meet the target, or until every further step would bring the sum of the losses above the floor.
Losses of groups are added up, which is a guess: measure what is proposed as a whole.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thrifty.dynamic import Dynamic, evaluating, hooked
from thrifty.errors import DataError, ThriftyError, require
from thrifty.evaluation import accuracy
from thrifty.files import replacing
from thrifty.gates import GatedConv, LayerGate, MaskedConv, layer_names
from thrifty.macs import count_macs
from thrifty.methods import MethodConfig
from thrifty.methods.budget import BudgetConfig

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares pruned that a sweep tries if not told otherwise."""

COUNTED = 64
"""Inputs whose MACs are counted at each point; accuracy is of all."""

SETTERS = {"channels": "set_density", "columns": "set_column_density"}
"""What can be pruned, and the function of a method that sets the share of it that each layer keeps."""

By = Literal["stage", "layer"]
Knob = tuple[str, str]
"""An axis ('channels' or 'columns') and a group of layers."""


@dataclass(frozen=True)
class Row:
    """One point of the sweep: everything is kept but what `group` prunes.

    Attributes:
        axis: 'channels' or 'columns'.
        group: name of the group.
        ratio: share that its layers prune, in (0, 1).
        accuracy: in [0, 1].
        macs: mean MACs of an input.
    """

    axis: str
    group: str
    ratio: float
    accuracy: float
    macs: float


@dataclass(frozen=True)
class Proposal:
    """Ratios for a compute target.

    Attributes:
        chosen: ratio of each (axis, group) that is pruned.
        ratios: the same by axis and by name of the layer.
        settings: the method's settings as recipes hold them; layers that no pattern fits keep everything.
        lost: accuracy that the sweep predicts to be lost, in [0, 1].
        macs: mean MACs of an input with all ratios set.
        share: of the dense model's MACs.
        reached: whether the target is met.
    """

    chosen: dict[Knob, float]
    ratios: dict[str, dict[str, float]]
    settings: dict[str, Any]
    lost: float
    macs: float
    share: float
    reached: bool

    def apply(self, model: Dynamic) -> None:
        """Set a model of the same method and network to these ratios; layers without one keep everything."""
        _set(model, self.ratios)

    @property
    def recipe(self) -> str:
        """The line of a recipe."""
        parts = ", ".join(f"{key}: {_flow(value)}" for key, value in self.settings.items())
        return f"method: {{{parts}}}"


@dataclass(frozen=True)
class Sensitivity:
    """What a sweep measured.

    Attributes:
        method: name of the method.
        groups: names of the layers of each group.
        rows: points, by axis and group, ratios rising.
        accuracy: in [0, 1], where every gate keeps everything.
        macs: mean MACs of an input then, gates included.
        dense_macs: MACs of the dense model.
        inputs: how many were classified at each point.
        settings_of: the method's settings for ratios by (axis, group), as recipes hold them.
        count: mean MACs of an input for ratios by axis and name of the layer.
    """

    method: str
    groups: dict[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    accuracy: float
    macs: float
    dense_macs: int
    inputs: int
    settings_of: Callable[[Mapping[Knob, float]], dict[str, Any]] = field(repr=False, compare=False)
    count: Callable[[Mapping[str, Mapping[str, float]]], float] = field(repr=False, compare=False)

    def curves(self) -> dict[Knob, list[Row]]:
        """The points of each axis and group."""
        found: dict[Knob, list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.axis, row.group), []).append(row)
        return found

    def propose(self, target: float, floor: float = 0.01) -> Proposal:
        """Ratios that bring the MACs to `target`, a share of the dense model's in (0, 1].

        No step is taken that brings the predicted loss of accuracy above `floor`, in [0, 1]; a target that is then out
        of reach is told by `reached`.

        Raises:
            ThriftyError: target or floor is out of range.
        """
        check_goal(target, floor)
        steps = self._steps(floor)
        counted: dict[int, float] = {}

        def met(index: int) -> bool:
            if index not in counted:
                counted[index] = self.count(self._by_layer(steps[index][0]))
            return counted[index] <= target * self.dense_macs

        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if met(middle) else (middle + 1, high)
        reached = met(low)
        chosen, lost = steps[low]
        macs = counted[low]
        return Proposal(
            chosen, self._by_layer(chosen), self.settings_of(chosen), lost, macs, macs / self.dense_macs, reached
        )

    def plot(self, path: str | Path, proposal: Proposal | None = None) -> None:
        """Draw accuracy lost against ratio and against MACs as PNG, a line a group; the proposal's points are ringed.

        Raises:
            MissingExtraError: matplotlib is not installed.
            ThriftyError: the file cannot be written.
        """
        require("matplotlib", "drawing")
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an extra)
        from matplotlib.figure import Figure  # noqa: PLC0415

        curves = self.curves()
        rows_of_legend = (len(curves) + 1) // 2
        figure = Figure(figsize=(11, 4.6 + 0.19 * rows_of_legend), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for index, (knob, rows) in enumerate(curves.items()):
            lost = [0.0, *(100 * (self.accuracy - row.accuracy) for row in rows)]
            ratios = [0.0, *(row.ratio for row in rows)]
            shares = [100 * macs / self.dense_macs for macs in (self.macs, *(row.macs for row in rows))]
            style = {
                "color": _colour(index, len(curves)),
                "linestyle": "--" if knob[0] == "columns" else "-",
                "marker": ".",
                "label": f"{knob[0]}, {knob[1]}",
            }
            left.plot(ratios, lost, **style)
            right.plot(shares, lost, **style)
            if proposal is not None and knob in proposal.chosen:
                at = ratios.index(proposal.chosen[knob])
                for axes, x in ((left, ratios), (right, shares)):
                    axes.plot(x[at], lost[at], "o", markersize=11, fillstyle="none", color=style["color"])
        left.set_xlabel("share pruned")
        right.set_xlabel("MACs, % of dense")
        right.invert_xaxis()
        left.set_ylabel("accuracy lost, points")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        title = f"{self.method}: one group pruned at a time, {self.inputs:,} photographs"
        figure.suptitle(title + (", ringed: proposed" if proposal is not None else ""))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130)

    def to_csv(self, path: str | Path) -> None:
        """Write the points, a line each.

        Raises:
            ThriftyError: the file cannot be written.
        """
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(
                ("axis", "group", "layers", "ratio", "accuracy", "accuracy_lost", "macs", "share_of_dense", "inputs")
            )
            for row in self.rows:
                layers = " ".join(self.groups[row.group])
                lost, share = self.accuracy - row.accuracy, row.macs / self.dense_macs
                writer.writerow(
                    (row.axis, row.group, layers, row.ratio, row.accuracy, lost, row.macs, share, self.inputs)
                )

    def _by_layer(self, chosen: Mapping[Knob, float]) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for (axis, group), ratio in chosen.items():
            found.setdefault(axis, {}).update(dict.fromkeys(self.groups[group], ratio))
        return found

    def _steps(self, floor: float) -> list[tuple[dict[Knob, float], float]]:
        """The greedy path: ratios and predicted loss after each step, first with nothing pruned.

        Along a curve a loss never falls and MACs never rise: what a few photographs more or less say to the contrary
        is noise.
        """
        curves: dict[Knob, list[tuple[float, float, float]]] = {}
        for knob, rows in self.curves().items():
            points = [(0.0, 0.0, self.macs)]
            for row in rows:
                lost = max(points[-1][1], self.accuracy - row.accuracy)
                points.append((row.ratio, lost, min(points[-1][2], row.macs)))
            curves[knob] = points
        at = dict.fromkeys(curves, 0)
        steps: list[tuple[dict[Knob, float], float]] = [({}, 0.0)]
        while True:
            chosen, total = steps[-1]
            options = []
            for order, (knob, points) in enumerate(curves.items()):
                _, lost, macs = points[at[knob]]
                further = (i for i in range(at[knob] + 1, len(points)) if points[i][2] < macs)
                index = next(further, None)
                if index is None:
                    continue
                more, saved = points[index][1] - lost, macs - points[index][2]
                if min(1.0, total + more) <= floor + 1e-9:
                    options.append((more / saved, -saved, order, knob, index, more))
            if not options:
                return steps
            *_, knob, index, more = min(options)
            at[knob] = index
            steps.append((chosen | {knob: curves[knob][index][0]}, min(1.0, total + more)))


def tune(
    dynamic: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    groups: Mapping[str, Sequence[str]],
    ratios: Sequence[float] = RATIOS,
    axes: Sequence[str] = ("channels",),
    observe: Callable[[Row], None] | None = None,
) -> Sensitivity:
    """Sweep ratios over groups of a dynamic model's layers. The model itself is left as it is.

    Args:
        dynamic: the model; on other axes than those swept it keeps everything.
        batches: labelled inputs to measure on ([N, C, H, W], [N]), not those that the model is tested on.
        groups: gated layers that share a ratio, by the group's name (see `groups_of`).
        ratios: shares pruned, in (0, 1).
        axes: what is pruned: 'channels', 'columns' (AntiDote), or both, each by itself.
        observe: called with each point when it is measured.

    Raises:
        ThriftyError: the model is dense, a group names layers that it cannot prune, or a ratio is out of range.
        DataError: there are no inputs.
    """
    if not isinstance(dynamic, Dynamic):
        raise ThriftyError(f"{type(dynamic).__name__} is a dense model, which has nothing to tune. Convert it first.")
    check_sweep(dynamic.method, ratios, axes)
    _check_groups(dynamic, groups)
    model = copy.deepcopy(dynamic)
    held = list(batches) if iter(batches) is batches else batches  # what can be read once only
    sample = _first(held, COUNTED)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

    def count(by_layer: Mapping[str, Mapping[str, float]]) -> float:
        _set(model, by_layer)
        return count_macs(model, sample.to(device)).mean

    names = {name: tuple(layers) for name, layers in groups.items()}
    base_macs = count({})
    base = accuracy(model, held, device)
    rows = []
    for axis in dict.fromkeys(axes):
        for group, layers in names.items():
            for ratio in sorted(set(map(float, ratios))):
                macs = count({axis: dict.fromkeys(layers, ratio)})
                rows.append(Row(axis, group, ratio, accuracy(model, held, device), macs))
                if observe is not None:
                    observe(rows[-1])
    others = [place.name for place in dynamic.conversion.places]

    def settings(chosen: Mapping[Knob, float]) -> dict[str, Any]:
        return _settings(dynamic, names, chosen, others)

    inputs = sum(len(y) for _, y in held)
    total = dynamic.conversion.total_macs
    return Sensitivity(dynamic.method.name, names, tuple(rows), base, base_macs, total, inputs, settings, count)


def groups_of(dynamic: Dynamic, example: Tensor, by: By = "stage") -> dict[str, tuple[str, ...]]:
    """The gated layers in groups, in the order of execution.

    Args:
        dynamic: the model.
        example: a batch of inputs [N, C, H, W] on its device.
        by: 'layer', each by itself, or 'stage', together where the maps that are pruned are of the same size when they
            are made. A group's name is the pattern of its layers' names where one fits them and no other layer.

    Raises:
        ThriftyError: the model has no layer whose ratio could be set, or there is no such grouping.
    """
    if by not in ("stage", "layer"):
        raise ThriftyError(f"layers can be grouped by stage or by layer, not by {by!r}.")
    sizes = _map_sizes(dynamic, example)
    if not sizes:
        raise ThriftyError(f"no layer of {type(dynamic).__name__} is gated, so there is nothing to tune.")
    if by == "layer":
        return {name: (name,) for name in sizes}
    others = [place.name for place in dynamic.conversion.places]
    stages: dict[int, list[str]] = {}
    for name, size in sizes.items():
        stages.setdefault(size, []).append(name)
    groups = {}
    for size, names in stages.items():
        patterns = patterns_of(names, others)
        edge = isqrt(size)
        title = f"{edge}x{edge}" if edge * edge == size else f"{size} positions"
        groups[patterns[0] if len(patterns) == 1 else f"{title} ({patterns[0]} … {patterns[-1]})"] = tuple(names)
    return groups


def check_sweep(method: MethodConfig, ratios: Sequence[float], axes: Sequence[str]) -> None:
    """The method must prune by ratios and on each of the axes; there must be ratios, all in (0, 1)."""
    if not axes or not set(axes) <= set(SETTERS):
        raise ThriftyError(f"axes are {', '.join(axes) or 'missing'}; choose of: {', '.join(SETTERS)}.")
    if isinstance(method, BudgetConfig):
        raise ThriftyError(f"{method.name} has no ratios to tune: it learns what to skip. Take antidote or fbs.")
    for axis in axes:
        if not hasattr(method, SETTERS[axis]):
            raise ThriftyError(f"{method.name} does not prune {axis}. Tune its channels.")
    if not ratios:
        raise ThriftyError("there are no ratios to try. Give at least one, in (0, 1).")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise ThriftyError(f"a ratio is {ratio!r}, but must be a number in (0, 1).")


def check_goal(target: float, floor: float) -> None:
    """The target must be in (0, 1], the floor in [0, 1]."""
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise ThriftyError(f"the target is {target!r}, but must be a share of the dense model's MACs in (0, 1].")
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
        raise ThriftyError(f"the floor is {floor!r}, but must be a number in [0, 1].")


def patterns_of(names: Sequence[str], others: Iterable[str]) -> tuple[str, ...]:
    """Few patterns that fit all of `names` and none of `others` that is not one of them."""
    if len(names) == 1:
        return (names[0],)
    parts = [name.split(".") for name in names]
    head = _common(parts)
    tail = _common([part[len(head) :][::-1] for part in parts])[::-1]
    pattern = ".".join([*head, "*", *tail])
    fitted = {name for name in (*names, *others) if fnmatchcase(name, pattern)}
    if fitted == set(names):
        return (pattern,)
    inner: dict[str, list[str]] = {}
    for name, part in zip(names, parts, strict=True):
        inner.setdefault(".".join(part[: len(head) + 1]), []).append(name)
    if len(inner) == 1:
        return tuple(names)
    others = list(others)
    return tuple(found for part in inner.values() for found in patterns_of(part, others))


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    """Leading components that all have, the last component of each left out."""
    found: list[str] = []
    for components in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(components)) > 1:
            break
        found.append(components[0])
    return found


def _map_sizes(dynamic: Dynamic, example: Tensor) -> dict[str, int]:
    """Positions of the map that each gate prunes, where that map is made, in the order of execution."""
    sizes: dict[str, int] = {}
    names = layer_names(dynamic)

    def note(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            size = output[0, 0].numel() if isinstance(module, GatedConv) else inputs[0][0, 0].numel()
            sizes[name] = getattr(module.gate, "map_size", size)

        return hook

    found = [(names[p], m) for p, m in dynamic.named_modules() if isinstance(m, (GatedConv, MaskedConv))]
    handles = [module.register_forward_hook(note(name)) for name, module in found]
    with hooked(handles), evaluating(dynamic):
        dynamic(example[:1])
    return sizes


def _set(model: Dynamic, by_layer: Mapping[str, Mapping[str, float]]) -> None:
    for axis, setter in SETTERS.items():
        if not hasattr(model.method, setter):
            continue
        ratios = by_layer.get(axis, {})
        names = [name for name, gate in model.gates().items() if not isinstance(gate, LayerGate)]
        getattr(model.method, setter)(model, {name: 1 - ratios.get(name, 0.0) for name in names})


def _settings(
    dynamic: Dynamic, groups: Mapping[str, Sequence[str]], chosen: Mapping[Knob, float], others: Sequence[str]
) -> dict[str, Any]:
    """The method's settings, plain: ratios under the axis' own name where the method has it, else densities."""
    method = dynamic.method
    defaults = type(method)()
    known = {f.name for f in fields(method)}
    own = {name: getattr(method, name) for name in known if getattr(method, name) != getattr(defaults, name)}
    settings: dict[str, Any] = {"name": method.name}
    settings |= {f.name: own[f.name] for f in fields(method) if f.name in own and not callable(own[f.name])}
    for axis in SETTERS:
        ratios: dict[str, float] = {}
        for group, names in groups.items():
            if (axis, group) in chosen:
                ratios |= dict.fromkeys(patterns_of(names, others), chosen[axis, group])
        if axis in known:
            settings[axis] = ratios or 0.0
        elif axis == "channels":
            settings["density"] = {name: round(1 - ratio, 9) for name, ratio in ratios.items()} or 1.0
    return settings


def _flow(value: Any) -> str:
    """A value in YAML's flow style; patterns are quoted, for a star means something else there."""
    if isinstance(value, str) and value.isidentifier():
        return value
    return json.dumps(value, ensure_ascii=False)


def _first(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    parts: list[Tensor] = []
    for x, _ in batches:
        parts.append(x)
        if sum(map(len, parts)) >= count:
            break
    if not sum(map(len, parts)):
        raise DataError("there are no photographs to tune on.")
    return torch.cat(parts)[:count]


def _check_groups(dynamic: Dynamic, groups: Mapping[str, Sequence[str]]) -> None:
    known = [name for name, gate in dynamic.gates().items() if not isinstance(gate, LayerGate)]
    seen: set[str] = set()
    if not groups:
        raise ThriftyError("there are no groups of layers to tune. Give at least one.")
    for group, names in groups.items():
        if not names:
            raise ThriftyError(f"group {group!r} has no layers.")
        for name in names:
            if name not in known:
                raise ThriftyError(f"group {group!r} names {name!r}, which is not gated. Gated: {', '.join(known)}.")
            if name in seen:
                raise ThriftyError(f"{name!r} is in two groups. Leave it in one.")
            seen.add(name)


def _colour(index: int, count: int) -> Any:
    """A colour for each line: distinct ones for a few, a gradient from first to last layer for many."""
    from matplotlib import colormaps  # noqa: PLC0415 (an extra)

    return colormaps["tab10"](index) if count <= 10 else colormaps["viridis"](0.95 * index / (count - 1))
