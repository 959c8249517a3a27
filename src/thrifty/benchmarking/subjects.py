"""What is measured: a dense network, and the dynamic one made of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.errors import CheckpointError, ProgramError, ThriftyError
from thrifty.program import GATE_ATTRIBUTES, Operator, Preprocessing, Program, Shape
from thrifty.program_file import load_program
from thrifty.zoo.records import records

if TYPE_CHECKING:
    from torch import nn

    from thrifty.dynamic import Dynamic

SUFFIX = ".thrifty"
SPREAD = 0.3
"""Standard deviation of the random gates' saliencies over images; their mean is 1."""

IMAGES = 8
"""Different images that gates are made with and that are measured."""

PHOTOGRAPHS = 1000
"""Of a folder, that are measured at most."""


@dataclass(frozen=True)
class Subject:
    """A network to measure.

    Attributes:
        name: as it was asked for.
        dense: the dense network; of a program that has gates, the same without them.
        module: the dense network in torch, or None where there is only a program.
        dynamic: the network with gates, or None.
        method: name of the method that put the gates there, or ''.
        own_density: whether the densities that the dynamic network was trained with are to be measured.
        preprocessing: of photographs, or None where the network was trained on none or its gates are random.
    """

    name: str
    dense: Program
    module: nn.Module | None
    dynamic: Program | None
    method: str = ""
    own_density: bool = False
    preprocessing: Preprocessing | None = None

    @property
    def shape(self) -> Shape:
        """Of an image, [C, H, W]."""
        return self.dense.buffers[0]


def find_subject(
    source: str,
    image: int | None = None,
    method: str | None = None,
    where: Sequence[str] = (),
    density: float = 0.5,
    images: int = IMAGES,
    settings: Mapping[str, Any] | None = None,
    channels: int | None = None,
) -> Subject:
    """The network that `source` names.

    Args:
        source: a .thrifty file, a zoo model, a file of weights, or a network's name (see `zoo.resolve.build_net`).
        image: height and width in pixels; if not given, the model's own, 32 for zoo networks and 224 for others.
        method: makes a dense network dynamic, with random gates that decide differently for every image; FBS if not
            given, and 'none' leaves it dense.
        where: patterns of the names of layers that may be gated; none means all.
        density: that the dynamic network starts at.
        images: number of images that the random gates are fitted to.
        settings: others of the method; they make the density the method's own.
        channels: of an image; if not given, the model's own, 3 for a network's name.

    Raises:
        ThriftyError: there is no such network, it does not take images of this size, it cannot be lowered, or it is
            dynamic already and a method or its settings are given.
    """
    chosen = method not in {None, "none"} or where or settings
    if source.endswith(SUFFIX):
        subject = _of_program(source, image)
        _check_channels(source, channels, subject.shape[0])
        if chosen or (method == "none" and subject.dynamic is not None):
            raise ThriftyError(f"{source} is a program as it is: leave --method, --where and --set out.")
        return subject
    import torch  # noqa: PLC0415 (programs need none of these)

    from thrifty.converter import convert  # noqa: PLC0415
    from thrifty.lowering import lower  # noqa: PLC0415
    from thrifty.methods import METHODS, method_config  # noqa: PLC0415
    from thrifty.zoo.resolve import build_net, usual_size  # noqa: PLC0415
    from thrifty.zoo.store import load_model  # noqa: PLC0415

    if Path(source).is_file() or source in {record.name for record in records()}:
        model, card = load_model(source)
        size = card.size
        if image not in {None, size}:
            raise CheckpointError(f"{source} takes images of {size} px, --image {image} was given.")
        _check_channels(source, channels, 3)
        preprocessing = Preprocessing(card.mean, card.std)
        if card.method is not None:
            if where or settings or method not in {None, card.method["name"]}:
                raise ThriftyError(f"{source} is a dynamic model already: leave --method, --where and --set out.")
            return _of_trained(source, model, build_net(card.net, **card.arguments), size, preprocessing)
    else:
        model, size, preprocessing = build_net(source), image or usual_size(source), None
    model = model.eval()
    example = torch.zeros(1, channels or 3, size, size)
    dense = lower(model, example)
    method = method or "fbs"
    if method == "none":
        return Subject(source, dense, model, None, preprocessing=preprocessing)
    usual = {"density": density} if hasattr(METHODS.get(method), "density") else {}
    config = method_config(method, {"where": tuple(where) or None, **(settings or usual)})
    dynamic = convert(copy.deepcopy(model), config, example, inplace=True)
    if not dynamic.gates():
        raise ThriftyError(f"{method} gates no layer of {source}: `thrifty convert {source}` tells why.")
    randomise_gates(dynamic, torch.from_numpy(random_images(images, dense.buffers[0])))
    return Subject(source, dense, model, lower(dynamic, example), method, not usual or bool(settings))


def _check_channels(source: str, asked: int | None, own: int) -> None:
    if asked not in {None, own}:
        raise CheckpointError(f"{source} takes images of {own} channels, --channels {asked} was given.")


def random_images(count: int, shape: Shape, seed: int = 0) -> NDArray[np.float32]:
    """float32 [count, C, H, W]: blots and grain of random strength, each image with mean 0 and deviation 1."""
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    x = np.zeros((count, *shape))
    for cells in (1, 4, 16):
        strength = rng.uniform(0.2, 1.5, (count, channels, 1, 1))
        blots = rng.standard_normal((count, channels, cells, cells))
        rows, columns = (np.arange(size) * cells // size for size in (height, width))
        x += strength * blots[:, :, rows[:, None], columns]
    x += rng.uniform(0.05, 1, (count, 1, 1, 1)) * rng.standard_normal(x.shape)
    x -= x.mean((1, 2, 3), keepdims=True)
    return (x / x.std((1, 2, 3), keepdims=True)).astype(np.float32)


def photographs(files: Sequence[Path], subject: Subject) -> NDArray[np.float32]:
    """Photographs as a trained network takes them, float32 [N, 3, H, W]: at most `PHOTOGRAPHS`, in an order of chance.

    Raises:
        DataError: a file is not an image.
        ThriftyError: the network was trained on no photographs, or its gates are random.
    """
    from thrifty.data.files import normalised, read_files  # noqa: PLC0415 (needs Pillow)

    _, height, width = subject.shape
    if subject.preprocessing is None or height != width:
        raise ThriftyError(
            f"{subject.name} was trained on no photographs, or its gates are random. Leave --photographs out, or give "
            "a dynamic zoo model, a file of its weights, or a program made of it."
        )
    order = np.random.default_rng(0).permutation(len(files))[:PHOTOGRAPHS]
    pixels = read_files([files[i] for i in order], height)
    return normalised(pixels, subject.preprocessing.mean, subject.preprocessing.std)


def without_gates(program: Program) -> Program:
    """The dense network that a program with gates was made of: the same weights, everything computed."""
    decided = {operator.output for operator in program.operators if operator.kind == "layer_gate"}
    operators = []
    for operator in program.operators:
        if operator.kind == "layer_gate":
            continue
        kept = {key: value for key, value in operator.attributes.items() if key not in GATE_ATTRIBUTES}
        tensors = {role: name for role, name in operator.tensors.items() if not role.startswith("gate")}
        dense = replace(operator, attributes=kept, tensors=tensors, guard=None)
        if operator.kind == "mul" and operator.inputs[1] in decided:
            dense = replace(dense, kind="activation", inputs=operator.inputs[:1])
        operators.append(dense)
    buffers, operators = _renumbered(program, operators)
    used = {name for operator in operators for name in operator.tensors.values()}
    weights = {name: tensor for name, tensor in program.tensors.items() if name in used}
    output = buffers[program.output]
    shapes = tuple(program.buffers[old] for old in sorted(buffers))
    return replace(program, buffers=shapes, operators=tuple(operators), output=output, tensors=weights, method=None)


def _renumbered(program: Program, operators: list[Operator]) -> tuple[dict[int, int], list[Operator]]:
    """The buffers that operators still use, old number -> new, and the operators on them."""
    used = sorted({0, program.output, *(operator.output for operator in operators)})
    number = {old: new for new, old in enumerate(used)}
    return number, [
        replace(operator, inputs=tuple(number[i] for i in operator.inputs), output=number[operator.output])
        for operator in operators
    ]


def randomise_gates(model: Dynamic, x: Any, seed: int = 0) -> None:
    """Give every gate that has weights random ones with which images x [N, C, H, W] decide independently of each other.

    Scores are c + phi (m - mean of m over x), scaled to a standard deviation of `SPREAD`, where m is what the gate
    predicts from and c about where it decides: so no two images agree, and values neither explode nor fade on their
    way. Where a method has a target of MACs, the thresholds are then put where x cost that.

    Raises:
        ThriftyError: a gate has weights, but no linear predictor to randomise.
    """
    import torch  # noqa: PLC0415 (programs need no torch)

    from thrifty.budgets import set_budget  # noqa: PLC0415
    from thrifty.dynamic import evaluating, hooked  # noqa: PLC0415
    from thrifty.gates import Predictor  # noqa: PLC0415

    generator = torch.Generator().manual_seed(seed)

    def fit(gate: Any, inputs: tuple[Any, ...]) -> None:
        seen = gate.features(inputs[0])
        mean = seen.mean(0)
        # Images differ most in their strength, by which alone they would fall into two classes: all directions in which
        # they differ get the same weight, down to a hundredth of the first.
        _, sizes, directions = torch.linalg.svd(seen - mean, full_matrices=False)
        outputs = gate.lower(inputs[0].shape[1:]).tensors["bias"].numel()
        weight = torch.randn(outputs, len(sizes), generator=generator)
        weight = weight / sizes.clamp_min(1e-2 * float(sizes[0]) + 1e-12) @ directions
        scores = (seen - mean) @ weight.T
        weight *= SPREAD / scores.std().clamp_min(1e-12)
        gate.predict(weight, gate.CENTRE - weight @ mean)

    gates = {name: gate for name, gate in model.gates().items() if next(gate.parameters(), None) is not None}
    for name, gate in gates.items():
        if not isinstance(gate, Predictor):
            raise ThriftyError(f"the gate of {name}, a {type(gate).__name__}, has no predictor to randomise.")
    with evaluating(model), hooked([gate.register_forward_pre_hook(fit) for gate in gates.values()]):
        model(x)
    target = getattr(model.method, "target", None)
    if target is not None:
        set_budget(model, target, x)


def _of_program(source: str, image: int | None) -> Subject:
    program = load_program(source)
    size = program.buffers[0][1:]
    if image is not None and size != (image, image):
        raise ProgramError(f"{source} takes images of {size[0]} x {size[1]} px, --image {image} was given.")
    if not program.gated:
        return Subject(source, program, None, None, preprocessing=program.preprocessing)
    method = str((program.method or {}).get("name", "gated"))
    return Subject(source, without_gates(program), None, program, method, True, program.preprocessing)


def _of_trained(source: str, model: Any, dense: nn.Module, size: int, preprocessing: Preprocessing) -> Subject:
    """A trained dynamic model beside its dense network, whose weights are random: time does not depend on them."""
    import torch  # noqa: PLC0415

    from thrifty.lowering import lower  # noqa: PLC0415

    example = torch.zeros(1, 3, size, size)
    dense = dense.eval()
    gated = lower(model, example)
    return Subject(source, lower(dense, example), dense, gated, model.method.name, True, preprocessing)
