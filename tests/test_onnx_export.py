"""Programs as ONNX models: ONNX Runtime answers what the reference executor answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_gates import randomly_gated
from randomised import randomise

from thrifty import onnx_export
from thrifty.benchmarking.subjects import random_images
from thrifty.converter import convert
from thrifty.errors import ProgramError
from thrifty.lowering import lower
from thrifty.macs import count_macs
from thrifty.methods import AntiDote, LCNet, MethodConfig
from thrifty.onnx_export import save_onnx, to_onnx
from thrifty.program import ACTIVATIONS, KINDS, Operator, Program
from thrifty.reference import run_reference
from thrifty.zoo.resolve import build_net

RNG = np.random.default_rng(0)
SQUARE = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1)}


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def program(
    shapes: list[tuple[int, int, int]], *operators: tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]
) -> Program:
    """Operators as (kind, inputs, attributes, {role: array}); the n-th writes the n-th buffer after the input."""
    tensors = {f"{i}.{role}": array for i, (*_, arrays) in enumerate(operators) for role, array in arrays.items()}
    made = [
        Operator(kind, f"{kind}{i}", inputs, i + 1, attributes, {role: f"{i}.{role}" for role in arrays})
        for i, (kind, inputs, attributes, arrays) in enumerate(operators)
    ]
    return Program(tuple(shapes), tuple(made), len(operators), shapes[-1][1:] == (1, 1), tensors)


def answer(made: Program, x: np.ndarray, batch: int | None = None) -> np.ndarray:
    model = to_onnx(made, batch).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": x})
    return output


def check(made: Program, images: int = 3) -> None:
    x = floats(images, *made.buffers[0])
    expected = run_reference(made, x).output
    given = answer(made, x)
    assert given.shape == expected.shape
    assert np.abs(given - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
    assert np.array_equal(answer(made, x[:1], batch=1), answer(made, x[:1]))


def conv(inputs: int, outputs: int, kernel: int, groups: int = 1) -> dict[str, np.ndarray]:
    return {"weight": floats(outputs, inputs // groups, kernel, kernel), "bias": floats(outputs)}


def gate(inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"gate_weight": floats(outputs, inputs), "gate_bias": floats(outputs)}


CASES: dict[str, Program] = {
    "strided, uneven padding, groups, dilation": program(
        [(4, 9, 11), (6, 4, 11)],
        (
            "conv",
            (0,),
            {"stride": (2, 1), "padding": (1, 0, 0, 2), "dilation": (1, 1), "groups": 2, "activation": "relu"},
            conv(4, 6, 3, 2),
        ),
    ),
    "dilation": program(
        [(3, 9, 9), (4, 5, 5)], ("conv", (0,), SQUARE | {"dilation": (2, 2), "groups": 1}, conv(3, 4, 3))
    ),
    "residual": program(
        [(4, 6, 6), (4, 6, 6), (4, 6, 6)],
        ("conv", (0,), SQUARE | {"groups": 1}, conv(4, 4, 1)),
        ("conv", (1, 0), SQUARE | {"padding": (1, 1, 1, 1), "groups": 1, "activation": "relu6"}, conv(4, 4, 3)),
    ),
    "linear after flatten": program(
        [(3, 4, 5), (60, 1, 1), (7, 1, 1), (7, 1, 1)],
        ("flatten", (0,), {}, {}),
        ("linear", (1,), {"activation": "relu"}, {"weight": floats(7, 60), "bias": floats(7)}),
        ("linear", (2,), {}, {"weight": floats(7, 7), "bias": floats(7)}),
    ),
    "vectors as maps": program(  # squeeze and excite through linear layers
        [(6, 5, 5), (6, 1, 1), (6, 1, 1), (6, 5, 5)],
        ("adaptive_avg_pool", (0,), {}, {}),
        ("linear", (1,), {"activation": "sigmoid"}, {"weight": floats(6, 6), "bias": floats(6)}),
        ("mul", (0, 2), {}, {}),
    ),
    "position-wise product": program(
        [(6, 5, 5), (1, 5, 5), (6, 5, 5)],
        ("conv", (0,), SQUARE | {"groups": 1}, conv(6, 1, 1)),
        ("mul", (0, 1), {}, {}),
    ),
    "affine": program(
        [(5, 3, 3), (5, 3, 3), (5, 3, 3)],
        ("affine", (0,), {"activation": "relu"}, {"scale": floats(5), "shift": floats(5)}),
        ("affine", (1,), {}, {"scale": floats(5)}),
    ),
    "sums": program(
        [(5, 3, 3), (5, 1, 1), (5, 3, 3)],
        ("adaptive_max_pool", (0,), {}, {}),
        ("add", (0, 1), {"activation": "relu"}, {}),
    ),
    "concatenation": program(
        [(2, 3, 3), (2, 3, 3), (6, 3, 3)],
        ("activation", (0,), {"activation": "relu"}, {}),
        ("concat", (0, 1, 0), {}, {}),
    ),
    "layer norm": program(
        [(6, 4, 5), (6, 4, 5)], ("layer_norm", (0,), {"epsilon": 1e-6}, {"weight": floats(6), "bias": floats(6)})
    ),
    "pad": program([(2, 3, 3), (2, 6, 5)], ("pad", (0,), {"padding": (1, 2, 0, 2), "value": -1.5}, {})),
    "adaptive mean, uneven": program([(3, 7, 10), (3, 3, 4)], ("adaptive_avg_pool", (0,), {}, {})),
    "adaptive mean, upwards": program([(3, 2, 3), (3, 7, 7)], ("adaptive_avg_pool", (0,), {}, {})),
    "adaptive maximum, uneven": program([(3, 7, 10), (3, 3, 4)], ("adaptive_max_pool", (0,), {}, {})),
}
for name in ACTIVATIONS:
    CASES[f"activation {name}"] = program(
        [(4, 6, 6), (4, 6, 6)], ("activation", (0,), {"activation": name, "slope": 0.2}, {})
    )
for name, indices in {
    "slice": [1, 2, 3],
    "all": [0, 1, 2, 3, 4, 5],
    "shuffle": [0, 3, 1, 4, 2, 5],
    "zeros around all": [-1, -1, 0, 1, 2, 3, 4, 5, -1],
    "zeros around a slice": [-1, 2, 3, -1],
    "zeros between": [5, -1, 0, -1, 5],
    "zeros only": [-1, -1],
    "repeated": [2, 2, 2],
}.items():
    CASES[f"gather, {name}"] = program(
        [(6, 3, 3), (len(indices), 3, 3)], ("gather", (0,), {}, {"index": np.array(indices, np.int32)})
    )
POOL = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}
for name, size, attributes in (
    ("rounded down", 4, POOL),
    ("rounded up", 5, POOL),
    ("rounded up, no padding", 4, POOL | {"padding": (0, 0, 0, 0)}),
    ("uneven", 4, POOL | {"kernel": (2, 3), "padding": (0, 0, 1, 1)}),
):
    shape = [(2, 8, 8), (2, size, size)]
    CASES[f"maximum, {name}"] = program(shape, ("max_pool", (0,), attributes | {"dilation": (1, 1)}, {}))
    for include in (0, 1):
        for divisor in (0, 5):
            CASES[f"mean, {name}, {include}, {divisor}"] = program(
                shape, ("avg_pool", (0,), attributes | {"count_include_pad": include, "divisor": divisor}, {})
            )
CASES["maximum, dilated"] = program([(2, 9, 9), (2, 4, 4)], ("max_pool", (0,), POOL | {"dilation": (2, 2)}, {}))


@pytest.mark.parametrize("name", CASES)
def test_an_operator_answers_as_the_reference_does(name: str) -> None:
    check(CASES[name])


def test_every_kind_is_tried() -> None:
    tried = [*CASES.values(), with_skipped_layers()]
    assert {operator.kind for made in tried for operator in made.operators} == set(KINDS)


def test_a_gated_network_skips_what_the_reference_skips() -> None:
    gated = SQUARE | {"padding": (1, 1, 1, 1), "groups": 1, "gate": "topk", "activation": "relu"}
    made = program(
        [(5, 6, 6), (8, 6, 6), (8, 6, 6), (8, 6, 6), (8, 1, 1), (3, 1, 1)],
        ("conv", (0,), gated | {"winners": 3}, conv(5, 8, 3) | gate(5, 8)),
        ("conv", (1,), gated | {"winners": 5}, conv(8, 8, 3) | gate(8, 8)),
        ("conv", (2, 1), gated | {"winners": 1}, conv(8, 8, 3) | gate(8, 8)),
        ("adaptive_avg_pool", (3,), {}, {}),
        ("linear", (4,), {}, {"weight": floats(3, 8), "bias": floats(3)}),
    )
    check(made, images=7)


def test_ties_go_to_the_lowest_index() -> None:
    weights = {"weight": np.ones((6, 2, 1, 1), np.float32), "bias": np.zeros(6, np.float32)}
    gates = {"gate_weight": np.zeros((6, 2), np.float32), "gate_bias": np.array([1, 2, 1, 1, 2, 1], np.float32)}
    gated = SQUARE | {"groups": 1, "gate": "topk", "winners": 3}
    made = program([(2, 2, 2), (6, 2, 2)], ("conv", (0,), gated, weights | gates))
    computed = answer(made, np.ones((2, 2, 2, 2), np.float32)).any((2, 3))
    assert computed.tolist() == [[True, True, False, False, True, False]] * 2


def test_a_file_holds_what_was_exported(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(CASES["residual"], path)
    assert onnx.load(path) == to_onnx(CASES["residual"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 4, 6, 6]
    assert [node.name for node in session.get_outputs()] == ["output"]


def test_weights_beyond_what_a_file_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "LIMIT", 100)
    with pytest.raises(ProgramError, match="2 GiB at most"):
        to_onnx(CASES["residual"])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20", 32),
        ("vgg16", 32),
        ("shufflenet_v2_x0_5", 64),
        ("mobilenet_v3_small", 64),
        ("squeezenet1_1", 64),
    ],
)
def test_networks_answer_as_in_torch(name: str, size: int) -> None:
    model = build_net(name).eval()
    x = torch.from_numpy(random_images(2, (3, size, size)))
    with torch.no_grad():
        expected = model(x).numpy()
    given = answer(lower(model, x), x.numpy())
    assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_dynamic_network_answers_as_in_torch() -> None:
    x = torch.from_numpy(random_images(8, (3, 32, 32)))
    model = randomly_gated(randomise(build_net("resnet20"), x), x)
    with torch.no_grad():
        expected = model.eval()(x).numpy()
        model.set_density(1.0)
        dense = model(x).numpy()
        model.set_density(0.5)
    given = answer(lower(model, x), x.numpy())
    assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(given - dense).max() > 1e-2 * np.abs(expected).max()


def test_pruned_maps_and_scored_channels() -> None:
    plain = SQUARE | {"padding": (1, 1, 1, 1), "groups": 1}
    made = program(
        [(5, 6, 6), (8, 6, 6), (8, 6, 6), (6, 6, 6), (6, 6, 6)],
        ("conv", (0,), plain | {"gate": "attention", "kept_channels": 3, "kept_columns": 13}, conv(5, 8, 3)),
        ("conv", (1,), plain | {"gate": "attention", "kept_channels": 8, "kept_columns": 20}, conv(8, 8, 3)),
        ("conv", (2,), plain | {"gate": "attention", "kept_channels": 5, "kept_columns": 36}, conv(8, 6, 3)),
        ("conv", (3,), plain | {"gate": "clip", "threshold": 0.25}, conv(6, 6, 3) | gate(6, 6)),
    )
    check(made, images=7)


def with_skipped_layers() -> Program:
    plain = SQUARE | {"padding": (1, 1, 1, 1), "groups": 1}
    score = {"weight": floats(1, 4) * 20, "bias": np.zeros(1, np.float32)}
    made = program(
        [(4, 6, 6), (1, 1, 1), (4, 6, 6), (4, 6, 6), (4, 6, 6), (4, 6, 6)],
        ("layer_gate", (0,), {"threshold": 0.1}, score),
        ("conv", (0,), plain | {"activation": "relu"}, conv(4, 4, 3)),
        ("conv", (2, 0), plain | {"activation": "relu"}, conv(4, 4, 3)),
        ("activation", (3,), {"activation": "sigmoid"}, {}),
        ("mul", (4, 1), {}, {}),
    )
    operators = [replace(op, guard=1) if i in (1, 2, 3) else op for i, op in enumerate(made.operators)]
    operators[2] = replace(operators[2], attributes={**operators[2].attributes, "scaled": 1})
    return replace(made, operators=tuple(operators))


def test_layers_that_run_for_some_images_only() -> None:
    made = with_skipped_layers()
    x = floats(40, 4, 6, 6)
    runs = run_reference(made, x).decisions["layer_gate0"].layer
    assert 5 < runs.sum() < 35
    expected = run_reference(made, x).output
    assert np.abs(answer(made, x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("method", [AntiDote(channels=0.3, columns=0.6), LCNet()], ids=lambda method: method.name)
def test_other_methods_answer_as_in_torch(method: MethodConfig) -> None:
    torch.manual_seed(0)
    x = torch.from_numpy(random_images(8, (3, 32, 32)))
    model = convert(randomise(build_net("resnet20"), x).eval(), method, x)
    for one in model.gates().values():
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter, 0.2, 0.5)
    with torch.no_grad():
        expected = model(x).numpy()
    assert count_macs(model, x).mean < 0.9 * model.conversion.total_macs
    given = answer(lower(model, x), x.numpy())
    assert np.abs(given - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_operator_may_be_called_output() -> None:
    operator = ("activation", (0,), {"activation": "relu"}, {})
    made = program([(3, 4, 4), (3, 4, 4)], operator)
    made = replace(made, operators=(replace(made.operators[0], name="output"),))
    check(made)
