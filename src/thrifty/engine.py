"""The engine: runs programs natively, so that what a gate skips takes no time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty._native import Engine as NativeEngine
from thrifty.decision import Decision
from thrifty.density import Density, densities_of, density_for, kept, kept_at
from thrifty.errors import ThriftyError
from thrifty.program import SETTINGS, Program, operator_tuples
from thrifty.program_file import save_program
from thrifty.strength import HIGHEST_THRESHOLD, find_strength
from thrifty.zoo.programs import read_program

Array = NDArray[Any]
Change = tuple[int, str, float]
"""Of a gate's setting: the operator's place, the setting's name, its value."""


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """What one operator did for N images.

    Attributes:
        name: of the operator; of a layer, as in the user's model.
        kind: what it computes (see `thrifty.program`).
        kernel: how it was computed, '' where there is one way only.
        ms: milliseconds, all images together, its gate included.
        gate_ms: those of its gate.
        macs: int64 [N], multiply-accumulates that were executed, without the gate's.
        gate_macs: int64 [N], those of its gate.
    """

    name: str
    kind: str
    kernel: str
    ms: float
    gate_ms: float
    macs: NDArray[np.int64]
    gate_macs: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trace:
    """A call of an engine on N images, taken image by image with all threads on each; prints as a table.

    Attributes:
        layers: the operators in the order of execution.
        decisions: of each gate, by name, on the axes that it decides on.
        output: what the call returns, as NumPy array.
        macs: int64 [N], executed in all layers and gates.
        ms: milliseconds of the whole call.
    """

    layers: tuple[LayerTrace, ...]
    decisions: dict[str, Decision]
    output: NDArray[np.float32]
    macs: NDArray[np.int64]
    ms: float

    def __str__(self) -> str:
        count = max(1, len(self.macs))
        rows = [("layer", "kind", "kernel", "ms", "gate ms", "M MACs", "kept")]
        for layer in self.layers:
            macs = float((layer.macs + layer.gate_macs).sum()) / count
            rows.append(
                (
                    layer.name, layer.kind, layer.kernel, f"{layer.ms / count:.3f}",
                    f"{layer.gate_ms / count:.3f}" if layer.gate_ms else "", f"{macs / 1e6:.2f}" if macs else "",
                    _kept(self.decisions.get(layer.name, Decision())),
                )
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(cells)
            ).rstrip()
            for cells in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        lines.append(f"an image: {self.ms / count:.3f} ms, {self.macs.sum() / count / 1e6:,.2f} M MACs, gates included")
        return "\n".join(lines)


class Engine:
    """Runs a program on the CPU.

    One engine may be called from several Python threads at the same time. The answer for an image does not depend, to
    the bit, on the batch that it comes in, on the number of threads or on other calls; it may on the instruction set.
    What is set while a call runs is for calls that begin after, and each sees all of it or nothing.

    Args:
        program: what to run.
        threads: CPU threads; images of a batch are shared out, or one image's layers. Where that has been slower lately
            (the system may give two threads one core between them), calls of less than 2 ms work on one thread.

    Raises:
        ThriftyError: `threads` is out of range, or THRIFTY_ISA names an instruction set that is not there.
    """

    def __init__(self, program: Program, threads: int = 1) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ThriftyError(f"threads is {threads!r}, but must be an integer of 1 or more.")
        self._program = self._made = program
        self._gates = program.gated
        normalise = program.preprocessing
        try:
            self._native = NativeEngine(
                program.buffers,
                operator_tuples(program),
                program.output,
                min(threads, 1 << 20),
                mean=normalise.mean if normalise else None,
                std=normalise.std if normalise else None,
            )
        except (ValueError, RuntimeError) as error:
            raise ThriftyError(str(error)) from error
        except MemoryError as error:
            raise ThriftyError("there is not enough memory to make the program ready to run.") from error

    def __call__(self, x: Any) -> Any:
        """Logits (or maps) of a batch of images, of the same kind as they are: NumPy array or torch tensor.

        Args:
            x: float32 [N, C, H, W], normalised; or, where the program has preprocessing, photographs as uint8
                [N, C, H, W] or [N, H, W, C]. Any strides; they are read in place.

        Returns:
            float32 [N, classes], or [N, C, H, W] where the program gives maps.

        Raises:
            ThriftyError: x is not of these types and of the program's shape.
        """
        images, channels_last = self._images(x)
        out = np.empty((len(images), *self._program.buffers[self._program.output]), np.float32)
        self._run(self._native.run, images, out, None, channels_last)
        out = self._shaped(out)
        return sys.modules["torch"].from_numpy(out) if _is_tensor(x) else out

    def _run(self, run: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return run(*arguments)
        except MemoryError as error:
            raise ThriftyError("there is not enough memory for the call. Give fewer images at a time.") from error
        except RuntimeError as error:  # the system gives no thread
            raise ThriftyError(f"a call on {self.threads} threads failed: {error}. Give the engine fewer.") from error

    def trace(self, x: Any, decisions: Mapping[str, Decision] | None = None) -> Trace:
        """Run a batch and tell what was decided, what was executed and how long it took.

        Args:
            x: as for a call.
            decisions: by name of the gate; they replace what it decides, on the axes that are given. The gate still
                runs, for its saliencies scale what is computed.

        Raises:
            ThriftyError: x or a decision does not fit the program.
        """
        return self._trace(x, decisions)

    def _trace(self, x: Any, decisions: Mapping[str, Decision] | None = None, changes: Sequence[Change] = ()) -> Trace:
        """A trace with `changes` of settings that are for this call alone."""
        images, channels_last = self._images(x)
        forced = self._forced(decisions or {}, len(images))
        out = np.empty((len(images), *self._program.buffers[self._program.output]), np.float32)
        found = self._run(self._native.trace, images, out, forced, channels_last, changes)
        layers = tuple(
            LayerTrace(operator.name, operator.kind, *values)
            for operator, *values in zip(
                self._program.operators, found["kernels"], found["ms"], found["gate_ms"], found["macs"],
                found["gate_macs"], strict=True,
            )
        )  # fmt: skip
        made = {name: Decision(*found["decisions"][place]) for name, place in self._gates.items()}
        macs = sum((layer.macs + layer.gate_macs for layer in layers), np.zeros(len(images), np.int64))
        return Trace(layers, made, self._shaped(out), macs, found["total_ms"])

    def set_density(self, density: Density | None = None, columns: Density | None = None) -> None:
        """Change the shares that gates keep, for calls that begin after: nothing is compiled anew.

        Args:
            density: of channels, in (0, 1], for all gates that keep a share, or by pattern of names; gates that none
                fits keep theirs. None: nothing changes.
            columns: of positions, likewise.

        Raises:
            ThriftyError: a density is out of range, a pattern fits no gate, or none keeps a share.
        """
        changes = [
            *self._shares(density, ("winners", "kept_channels"), "density"),
            *self._shares(columns, ("kept_columns",), "density of columns"),
        ]
        self._native.set([(place, setting, kept(share, size)) for place, setting, share, size in changes])

    def set_threshold(self, threshold: float | Mapping[str, float]) -> None:
        """Change the scores above which gates compute, for calls that begin after.

        Args:
            threshold: in [0, 1), for all gates that have one (of kinds 'clip' and 'layer_gate'), or by pattern of
                names; gates that none fits keep theirs.

        Raises:
            ThriftyError: a threshold is out of range, a pattern fits no gate, or none has a threshold.
        """
        gates = self._with("threshold", "threshold")
        for value in threshold.values() if isinstance(threshold, Mapping) else (threshold,):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
                raise ThriftyError(f"threshold is {value!r}, but must be a number in [0, 1).")
        for pattern in threshold if isinstance(threshold, Mapping) else ():
            if not any(fnmatchcase(name, pattern) for name in gates):
                raise ThriftyError(f"threshold names {pattern!r}, but no gate does. They are: {', '.join(gates)}.")
        chosen = {place: density_for(threshold, name) for name, (place, _) in gates.items()}
        self._native.set([(place, "threshold", float(value)) for place, value in chosen.items() if value is not None])

    def set_budget(self, share: float, x: Any) -> float:
        """Prune as much as it takes to cost at most `share` of the dense MACs, for calls that begin after.

        Made for models that were trained for all budgets, or whose gates have thresholds. Shares are put between 1 and
        what the engine was made with, all at the same part of the way; thresholds between theirs and 1. So a model
        whose budget has been set is compiled for that much pruning at most: put it to its least budget before.

        Args:
            share: mean executed MACs over those of the dense network, in (0, 1], gates included.
            x: images, as for a call, to measure the cost on.

        Returns:
            The share that was reached.

        Raises:
            ThriftyError: the share is out of range, nothing is gated, or the program costs more at its full strength;
                everything stays as it was.
        """
        if not self._gates:
            raise ThriftyError("the program has no gates whose budget could be set.")
        images, _ = self._images(x)
        if not len(images):
            raise ThriftyError("there are no images to measure the cost on. Give at least one.")
        dense = sum(self._program.macs().values())
        changes: list[Change] = []

        def cost(strength: float) -> float:
            changes[:] = [change for place in self._gates.values() for change in self._at_strength(place, strength)]
            return float(self._trace(x, changes=changes).macs.mean()) / dense

        reached = find_strength(cost, share, "at the strength that it was compiled or saved with")
        self._native.set(changes)
        return reached

    def _at_strength(self, place: int, strength: float) -> Iterator[Change]:
        made = self._made.operators[place]
        for setting in SETTINGS[str(made.gate)]:
            if setting == "threshold":
                yield place, setting, max(made.setting(setting), min(strength, HIGHEST_THRESHOLD))
            else:
                size = self._size(place, setting)
                yield place, setting, kept_at(strength, int(made.setting(setting)), size)

    @property
    def program(self) -> Program:
        """The program as it runs now, with the densities and thresholds that are set."""
        changed = {}
        now = self._native.settings()
        for name, place in self._gates.items():
            settings = now[place]
            operator = self._program.operators[place]
            if any(operator.setting(key) != value for key, value in settings.items()):
                changed[name] = settings
        if changed:
            self._program = self._program.with_gates(changed)
        return self._program

    @property
    def density(self) -> float:
        """Mean share of channels kept by the gates that keep a share of them, 1 where there is none."""
        now = self._native.settings()
        shares = [
            now[place][setting] / self._size(place, setting)
            for name, place in self._gates.items()
            for setting in SETTINGS[str(self._program.operators[place].gate)]
            if setting in {"winners", "kept_channels"}
        ]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def threads(self) -> int:
        """CPU threads that a call works on."""
        return self._native.threads

    @property
    def isa(self) -> str:
        """The instruction set in use: generic, avx2 or avx512."""
        return self._native.isa

    def save(self, path: str | Path) -> None:
        """Write the program to a file that `thrifty.load` reads.

        What is set now is what the file's program was made with: after `set_budget` it can be set to less, but not to
        more pruning. Put the engine back to what it was made with first, to keep its whole range.
        """
        save_program(self.program, path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, in other processes too, prepare their own weights and threads and are set as this one is now."""
        return _restored, (self._made, self.program, self.threads)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self._program.buffers[0]))
        gates = f", {len(self._gates)} gates at density {self.density:.2f}" if self._gates else ""
        return f"Engine({shape}, {len(self._program.operators)} operators{gates}, threads={self.threads}, {self.isa})"

    def _with(self, what: str, *settings: str) -> dict[str, tuple[int, str]]:
        """Gates that have one of these settings, by name: their place, and which it is."""
        found = {
            name: (place, setting)
            for name, place in self._gates.items()
            for setting in SETTINGS[str(self._program.operators[place].gate)]
            if setting in settings
        }
        if not found:
            raise ThriftyError(f"the program has no gated layer whose {what} could be set.")
        return found

    def _shares(
        self, density: Density | None, settings: tuple[str, ...], what: str
    ) -> list[tuple[int, str, float, int]]:
        """What a density changes: place, setting, share, and of how many."""
        if density is None:
            return []
        gates = self._with(what, *settings)
        return [(*gates[name], share, self._size(*gates[name])) for name, share in densities_of(density, gates).items()]

    def _size(self, place: int, setting: str) -> int:
        """Of how many channels or positions the gate keeps some."""
        operator = self._program.operators[place]
        channels, height, width = self._program.buffers[operator.inputs[0]]
        if setting == "winners":
            return self._program.buffers[operator.output][0]
        return channels if setting == "kept_channels" else height * width

    def _shaped(self, out: Array) -> Array:
        return out.reshape(out.shape[:2]) if self._program.flat else out

    def _images(self, x: Any) -> tuple[Array, bool]:
        """x as an array that the native part can read, and whether its channels come last."""
        if _is_tensor(x):
            if x.device.type != "cpu" or x.layout != sys.modules["torch"].strided:
                raise ThriftyError(f"the input must be a dense tensor on the CPU, not {x.layout} on {x.device}.")
            if str(x.dtype) not in {"torch.float32", "torch.uint8"}:
                raise ThriftyError(f"the input is {x.dtype}, but must be float32 or uint8.")
            x = x.detach().resolve_neg().numpy()
        if not isinstance(x, np.ndarray):
            raise ThriftyError(f"the input is {type(x).__name__}, but must be a NumPy array or a torch tensor.")
        if x.dtype not in (np.float32, np.uint8):
            raise ThriftyError(f"the input is {x.dtype}, but must be float32 or uint8.")
        photographs = x.dtype == np.uint8
        if photographs and self._program.preprocessing is None:
            raise ThriftyError("the program has no preprocessing for uint8 photographs: give it normalised float32.")
        channels, height, width = self._program.buffers[0]
        first, last = (channels, height, width), (height, width, channels)
        channels_last = photographs and x.ndim == 4 and x.shape[1:] == last != first
        if x.ndim != 4 or (x.shape[1:] != first and not channels_last):
            wanted = f"[N, {channels}, {height}, {width}]"
            if photographs:
                wanted += f" or [N, {height}, {width}, {channels}]"
            raise ThriftyError(f"the input is {list(x.shape)}, but the program takes {wanted}.")
        if not x.flags.aligned or any(stride % x.itemsize for stride in x.strides):
            x = x.copy()
        return x, channels_last

    def _forced(self, decisions: Mapping[str, Decision], count: int) -> dict[int, tuple[Array | None, ...]]:
        program = self.program
        if not isinstance(decisions, Mapping) or not all(isinstance(each, Decision) for each in decisions.values()):
            raise ThriftyError("decisions must be a mapping of gates' names to thrifty.Decision.")
        forced = {}
        for name, decision in decisions.items():
            if name not in self._gates:
                known = ", ".join(self._gates) or "none"
                raise ThriftyError(f"there is a decision for {name!r}, which is no gated layer. They are: {known}.")
            given = decision.checked(name, program.axes(name), count)
            forced[self._gates[name]] = tuple(given.get(axis) for axis in ("channels", "columns", "layer"))
        return forced


def load(path: str | Path, threads: int = 1) -> Engine:
    """An engine for a program file, as `Engine.save` writes it. Needs neither torch nor the model's code.

    Args:
        path: of the file, or the name of a zoo model (see `thrifty zoo`).
        threads: CPU threads.

    Raises:
        ThriftyError: the file is missing, damaged or of a newer version, or `threads` is out of range.
    """
    return Engine(read_program(path), threads)


def _restored(made: Program, now: Program, threads: int) -> Engine:
    """An engine for the program `made`, with its gates set as they are in `now`."""
    engine = Engine(made, threads)
    engine._native.set(
        [
            (place, setting, now.operators[place].setting(setting))
            for place in engine._gates.values()
            for setting in SETTINGS[str(made.operators[place].gate)]
        ]
    )
    return engine


def _kept(decision: Decision) -> str:
    """Shares that it keeps, axis by axis."""
    shares = [getattr(decision, axis) for axis in ("channels", "columns", "layer")]
    return " x ".join(f"{share.mean():.0%}" for share in shares if share is not None and share.size)


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)
