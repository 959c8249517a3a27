"""What one input's decisions look like: computed as numbers by `explain`, drawn as a picture by `draw`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from thrifty.decision import Decision
from thrifty.dynamic import Dynamic, hooked
from thrifty.errors import ThriftyError, require
from thrifty.files import replacing
from thrifty.gates import ChannelGate, Gate, InputGate, LayerGate
from thrifty.macs import count_macs

MAPS = 24
"""Attention maps in a picture, unless the layers are picked."""

MAPS_IN_ROW = 8

SOFTWARE = "thrifty show"
"""What pictures say they were made with."""

KEPT, DENSE, SKIPPED = "#1f6f8b", "#d5dbe0", "#f3e3dc"


@dataclass(frozen=True)
class Explanation:
    """What a dynamic model did with one input. Layers are in the order of execution.

    Attributes:
        method: name of the model's method.
        probabilities: float32 [classes], softmax of the logits.
        decisions: of each gated layer or block, arrays of NumPy with N = 1.
        dense: MACs of each convolution and linear layer if nothing were skipped.
        executed: MACs of each that were executed, gates not included.
        gates: MACs of each gate.
        attention: float32 [H, W] for each layer whose map is pruned: mean magnitude of the map, over the channels.
        saliencies: float32 [C] for each layer whose output channels are gated, zero where skipped; [1] for a block.
        members: layers that run for each gated block's sake alone.
        dense_total: MACs of the dense model.
    """

    method: str
    probabilities: NDArray[np.float32]
    decisions: dict[str, Decision]
    dense: dict[str, int]
    executed: dict[str, int]
    gates: dict[str, int]
    attention: dict[str, NDArray[np.float32]]
    saliencies: dict[str, NDArray[np.float32]]
    members: dict[str, tuple[str, ...]]
    dense_total: int

    @property
    def macs(self) -> int:
        """MACs that were executed, gates included."""
        return sum(self.executed.values()) + sum(self.gates.values())

    @property
    def skipped(self) -> frozenset[str]:
        """Layers that did not run, for their block was skipped."""
        blocks = (name for name, d in self.decisions.items() if d.layer is not None and not d.layer[0])
        return frozenset(layer for block in blocks for layer in self.members[block])


def explain(model: nn.Module, x: Tensor) -> Explanation:
    """Run one input through a dynamic model, in evaluation mode, and note what it decides and costs.

    Args:
        model: the dynamic model.
        x: one input, [1, C, H, W], on the model's device.

    Raises:
        ThriftyError: the model is dense, or x is not one input.
    """
    if not isinstance(model, Dynamic):
        raise ThriftyError(
            f"{type(model).__name__} is a dense model: it computes everything for every input, and there is nothing "
            "to show. Convert it first."
        )
    if x.ndim != 4 or len(x) != 1:
        raise ThriftyError(f"one input [1, C, H, W] can be explained, not {list(x.shape)}.")
    model.conversion.check_shape(x)
    decisions: dict[str, Decision] = {}
    attention: dict[str, NDArray[np.float32]] = {}
    saliencies: dict[str, NDArray[np.float32]] = {}
    logits: list[Tensor] = []

    def decided(name: str) -> Any:
        def hook(gate: Gate, inputs: tuple[Tensor, ...], output: tuple[Any, ...]) -> None:
            found = gate.decision(output)
            parts = (found.channels, found.columns, found.layer)
            decisions[name] = Decision(*(None if part is None else part.cpu().numpy() for part in parts))
            if isinstance(gate, InputGate):
                attention[name] = inputs[0][0].abs().mean(0).float().cpu().numpy()
            elif isinstance(gate, (ChannelGate, LayerGate)):
                saliencies[name] = output[0][0].detach().reshape(-1).float().cpu().numpy()

        return hook

    # Within the gates' own forward nothing is counted, so what the hooks compute costs nothing there.
    gates = model.gates()
    handles = [gate.register_forward_hook(decided(name)) for name, gate in gates.items()]
    handles.append(model.register_forward_hook(lambda _model, _inputs, output: logits.append(output)))
    with hooked(handles):
        counted = count_macs(model, x)
    executed = {name: int(macs[0]) for name, macs in counted.layers.items()}
    return Explanation(
        method=model.method.name,
        probabilities=logits[0][0].float().softmax(0).cpu().numpy(),
        decisions=decisions,
        dense={name: model.conversion.layers.get(name, macs) for name, macs in executed.items()},
        executed=executed,
        gates={name: int(macs[0]) for name, macs in counted.gates.items()},
        attention=attention,
        saliencies=saliencies,
        members={name: gate.members for name, gate in gates.items() if isinstance(gate, LayerGate)},
        dense_total=model.conversion.total_macs,
    )


def draw(
    explanation: Explanation,
    image: NDArray[np.uint8],
    path: str | Path,
    title: str,
    layers: str | Sequence[str] | None = None,
) -> None:
    """Draw what `explain` found as PNG, in one step.

    Above, the photograph beside the attention maps, with columns that were not read in grey: `MAPS` of them at most,
    spread over the network. Below, a line a layer: which channels it kept, the brighter the higher their saliency, and
    its MACs beside what they would be if nothing were skipped.

    Args:
        explanation: what to draw.
        image: the photograph, uint8 [H, W, 3].
        path: the file to write.
        title: stands above.
        layers: patterns of names; only layers that one fits are drawn, all of them. None draws all layers.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ThriftyError: no layer is of such a name, or the file cannot be written.
    """
    require("matplotlib", "drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    names = picked_layers(explanation, layers)
    attended = [name for name in names if name in explanation.attention]
    shown = attended if layers is not None else _spread(attended, MAPS)
    below = 0.9 + 0.19 * len(names)
    if shown:
        rows = -(-len(shown) // MAPS_IN_ROW)
        above = max(2.6, 1.25 * rows + 0.3)
        figure = Figure(figsize=(13, 0.5 + above + below), layout="constrained")
        upper, lower = _parts(figure, 2, 1, height_ratios=(above, below))
        photograph, maps = _parts(upper, 1, 2, width_ratios=(1, 4))
        _draw_maps(maps, explanation, shown, rows, len(attended))
    else:
        figure = Figure(figsize=(15, max(3.5, 0.5 + below)), layout="constrained")
        photograph, lower = _parts(figure, 1, 2, width_ratios=(1, 5))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", parse_math=False)
    axes = photograph.subplots()
    axes.imshow(image, interpolation="nearest")
    axes.set_anchor("N")
    axes.set_axis_off()
    _draw_layers(lower, explanation, names)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": SOFTWARE})


def picked_layers(explanation: Explanation, layers: str | Sequence[str] | None) -> list[str]:
    """Names of the layers, in the order of execution, that one of the patterns fits.

    Raises:
        ThriftyError: none does.
    """
    patterns = (layers,) if isinstance(layers, str) else layers
    if patterns is None:
        return list(explanation.dense)
    names = [name for name in explanation.dense if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise ThriftyError(f"no layer fits {', '.join(patterns)}. The layers are: {', '.join(explanation.dense)}.")
    return names


def _parts(area: Any, rows: int, columns: int, **ratios: Any) -> Any:
    return area.subfigures(rows, columns, **ratios)


def _spread(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, evenly spread, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[round(i * (len(names) - 1) / (count - 1))] for i in range(count)]


def _draw_maps(area: Any, explanation: Explanation, names: list[str], rows: int, total: int) -> None:
    columns = min(MAPS_IN_ROW, len(names))
    grid = area.subplots(rows, columns, squeeze=False)
    of_all = "" if len(names) == total else f", {len(names)} of {total} layers"
    area.suptitle(f"attention of the maps that layers read{of_all}; grey columns are not read", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names, strict=False):
        attention = explanation.attention[name]
        decided = explanation.decisions[name].columns
        kept = np.ones(attention.shape, bool) if decided is None else decided[0]
        axes.imshow(_coloured(attention, kept), interpolation="nearest")
        axes.set_title(f"{name}\n{kept.mean():.0%} of {attention.shape[0]}x{attention.shape[1]}", fontsize=7)


def _coloured(attention: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Attention [H, W] as colours [H, W, 3], from the lowest to the highest; in pale grey where it is not kept."""
    from matplotlib import colormaps  # noqa: PLC0415 (an extra)

    low, high = float(attention.min()), float(attention.max())
    scaled = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    colours = np.asarray(colormaps["viridis"](scaled))[..., :3]
    grey = np.repeat(0.78 + 0.18 * scaled[..., None].astype(np.float64), 3, axis=-1)
    return np.where(kept[..., None], colours, grey)


def _draw_layers(area: Any, explanation: Explanation, names: list[str]) -> None:
    strips, bars = area.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    skipped = explanation.skipped
    for row, name in enumerate(names):
        if name in skipped:
            strips.text(0.5, row, "skipped with its block", ha="center", va="center", fontsize=7, color="#9a4a2f")
        else:
            _draw_strip(strips, explanation, name, row)
    places = np.arange(len(names))
    dense = np.array([explanation.dense[name] for name in names]) / 1e6
    executed = np.array([explanation.executed[name] for name in names]) / 1e6
    bars.barh(places, dense, height=0.78, color=DENSE, label="dense")
    bars.barh(places, executed, height=0.78, color=KEPT, label="executed")
    for row, name in enumerate(names):
        share = explanation.executed[name] / explanation.dense[name] if explanation.dense[name] else 1.0
        bars.text(max(dense[row], executed[row]), row, f" {share:.0%}", va="center", fontsize=7)
    bars.set_xlim(0, 1.1 * max(1e-9, *dense, *executed))
    bars.set_title("M MACs of the layer", fontsize=9, loc="left")
    bars.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    strips.set_yticks(places, names, fontsize=7)
    strips.set_ylim(len(names) - 0.4, -0.6)
    strips.set_xlim(0, 1.09)
    strips.set_xticks([])
    what = "channels read" if explanation.attention else "channels computed, brighter for higher saliency"
    strips.set_title(f"{what}; pale: skipped", fontsize=9)
    for axes in (strips, bars):
        axes.tick_params(length=0, labelsize=7)
        for spine in axes.spines.values():
            spine.set_visible(False)


def _draw_strip(axes: Any, explanation: Explanation, name: str, row: int) -> None:
    """One line: a cell a channel, in the colour of its saliency, pale where it is skipped."""
    from matplotlib import colormaps, colors  # noqa: PLC0415 (an extra)

    decision = explanation.decisions.get(name)
    if decision is None or decision.channels is None:
        text = "all channels" if decision is not None and decision.columns is not None else "not gated"
        axes.text(0.5, row, text, ha="center", va="center", fontsize=7, color="#8a939b")
        return
    kept = decision.channels[0]
    saliency = explanation.saliencies.get(name)
    if saliency is None:
        cells = np.tile(colors.to_rgb(KEPT), (len(kept), 1))
    else:
        highest = float(saliency.max())
        cells = np.asarray(colormaps["viridis"](saliency / highest if highest > 0 else saliency))[:, :3]
    cells = np.where(kept[:, None], cells, colors.to_rgb(SKIPPED))
    axes.imshow(cells[None], extent=(0, 1, row + 0.39, row - 0.39), aspect="auto", interpolation="nearest")
    axes.text(1.01, row, f"{int(kept.sum())}/{len(kept)}", va="center", fontsize=7)
