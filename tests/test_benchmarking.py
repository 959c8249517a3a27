"""The benchmark: what it times is the same network everywhere, and what it concludes follows from what it measured."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import thrifty
from thrifty.benchmarking import bench, timing
from thrifty.benchmarking import diagnosis as diagnosis_module
from thrifty.benchmarking.bench import Row, as_records, layer_rows, normalised_error, run_bench
from thrifty.benchmarking.diagnosis import Diagnosis, LayerCost, diagnose
from thrifty.benchmarking.peers import OnnxRuntime, OpenVino, Ours, Runner, Torch
from thrifty.benchmarking.subjects import IMAGES, Subject, find_subject, random_images, randomise_gates, without_gates
from thrifty.benchmarking.timing import Timing, interleave
from thrifty.decision import Decision
from thrifty.engine import Engine
from thrifty.errors import ThriftyError
from thrifty.lowering import lower
from thrifty.onnx_export import to_onnx
from thrifty.program_file import save_program
from thrifty.reference import run_reference
from thrifty.zoo.nets import build


class Net(nn.Module):
    """Small, and with a layer of its own for each thing that a benchmark looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.third = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.fc(x.mean((2, 3)))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def subject() -> Subject:
    return find_subject(f"{__name__}:small_net", image=16)


# ------------------------------------------------------------------------------------------------------------- timing


class Recorder(Runner):
    """Notes who was called when, with what."""

    def __init__(self, name: str, log: list[tuple[str, float | str]], seconds: float) -> None:
        self.name, self.log, self.seconds = name, log, seconds
        self.slept: list[float] = []

    def begin(self) -> None:
        self.log.append((self.name, "begin"))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.log.append((self.name, float(x[0])))
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.slept.append(time.perf_counter() - start)
        return x


def test_runners_take_turns_and_get_the_same_inputs() -> None:
    log: list[tuple[str, float | str]] = []
    runners = [Recorder("a", log, 0.002), Recorder("b", log, 0.004)]
    timings = interleave(runners, [np.array([float(i)]) for i in range(3)], seconds=0.1, pause=0.0)
    turns = [name for name, what in log if what == "begin"]
    assert turns[:2] == ["a", "b"]  # warming up
    assert turns[2:] == ["a", "b"] * ((len(turns) - 2) // 2)
    assert len(turns[2:]) >= 2 * timing.ROUNDS
    for runner, found in zip(runners, timings, strict=True):
        assert found.median == pytest.approx(1e3 * float(np.median(runner.slept)), rel=0.1, abs=0.2)
        assert found.percentile(10) <= found.median <= found.percentile(90)
        assert {what for name, what in log if name == runner.name and what != "begin"} == {0.0, 1.0, 2.0}
    calls = {name: sum(1 for n, what in log if n == name and what != "begin") for name in ("a", "b")}
    assert all(len(t.seconds) < calls[r.name] for r, t in zip(runners, timings, strict=True))  # warm-up is not timed


def test_a_runner_that_slows_down_does_not_run_forever() -> None:
    log: list[tuple[str, float | str]] = []
    runner = Recorder("a", log, 0.0001)
    original = interleave.__globals__["_warm_up"]

    def slower(one: Recorder, batches: Any) -> float:
        cost = original(one, batches)
        one.seconds = 0.01
        return cost

    interleave.__globals__["_warm_up"] = slower
    try:
        (found,) = interleave([runner], [np.zeros(1)], seconds=0.3, pause=0.0)
    finally:
        interleave.__globals__["_warm_up"] = original
    assert found.seconds.sum() < 5 * 0.3
    assert len(found.seconds) >= timing.ROUNDS


def test_percentiles_are_in_milliseconds() -> None:
    found = Timing(np.arange(1, 102) / 1e3)
    assert (found.median, found.percentile(10), found.percentile(90)) == pytest.approx((51, 11, 91))


# -------------------------------------------------------------------------------------------------------------- peers


def runners_of(model: nn.Module, x: np.ndarray, threads: int) -> list[Runner]:
    program = lower(model.eval(), torch.from_numpy(x))
    exported = to_onnx(program, batch=len(x)).SerializeToString()
    return [
        OnnxRuntime(exported, threads),
        OpenVino(exported, threads),
        Torch(model, threads, x),
        Ours(Engine(program, threads=threads)),
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_engine_computes_what_torch_computes(threads: int) -> None:
    model = small_net().eval()
    x = random_images(4, (3, 16, 16))
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    for runner in runners_of(model, x, threads):
        runner.begin()
        assert normalised_error(runner(x), expected) < 1e-5, runner.name


def test_every_engine_flushes_denormals() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, bias=False)
            self.second = nn.Conv2d(8, 8, 3, bias=False)
            self.first.weight.data.fill_(1e-25)
            self.second.weight.data.fill_(1e20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    x = np.full((1, 3, 8, 8), 1e-15, np.float32)  # the first layer's sums are 2.7e-39: below float32's normal range
    for runner in runners_of(Tiny(), x, 1):
        runner.begin()
        assert not runner(x).any(), runner.name


def test_torch_gets_its_threads_back_at_each_turn() -> None:
    model = small_net()
    runner = Torch(model, 1, random_images(1, (3, 16, 16)))
    torch.set_num_threads(2)
    runner.begin()
    assert torch.get_num_threads() == 1
    assert runner.setting in {"contiguous", "channels_last"}


def test_the_error_is_over_the_largest_value() -> None:
    expected = np.array([[1.0, -4.0]], np.float32)
    assert normalised_error(expected + np.float32(0.5), expected) == pytest.approx(0.125)
    assert normalised_error(expected[0], expected) == float("inf")
    assert normalised_error(expected * np.float32("nan"), expected) == float("inf")


# ----------------------------------------------------------------------------------------------------------- subjects


def test_random_gates_decide_differently_for_every_image() -> None:
    x = torch.from_numpy(random_images(8, (3, 32, 32)))
    dynamic = thrifty.convert(build("resnet20").eval(), thrifty.FBS(density=0.5), x)
    before = thrifty.decisions(dynamic, x)
    assert all((decision.channels == decision.channels[0]).all() for decision in before.values())
    randomise_gates(dynamic, x)
    for name, decision in thrifty.decisions(dynamic, x).items():
        differing = (decision.channels[:, None] != decision.channels[None]).any(2)
        assert differing.sum() >= 0.8 * 8 * 7, name
    assert dynamic.eval()(x).isfinite().all()


def test_a_program_without_its_gates_is_the_dense_network(subject: Subject) -> None:
    assert subject.dynamic is not None
    dense = without_gates(subject.dynamic)
    assert not dense.gated
    assert dense.macs() == subject.dynamic.macs() == subject.dense.macs()
    assert not [name for name in dense.tensors if "gate" in name]
    x = random_images(2, subject.shape)
    channels = {
        name: subject.dynamic.buffers[subject.dynamic.operators[i].output][0]
        for name, i in subject.dynamic.gated.items()
    }
    everything = {name: Decision(channels=np.ones((2, count), bool)) for name, count in channels.items()}
    run = run_reference(subject.dynamic, x, everything)
    assert all((run.macs[name] == macs).all() for name, macs in dense.macs().items())
    assert run_reference(dense, x).output.shape == run.output.shape


def test_where_and_method_choose_what_is_gated() -> None:
    name = f"{__name__}:small_net"
    assert find_subject(name, image=16, method="none").dynamic is None
    chosen = find_subject(name, image=16, where=["third"]).dynamic
    assert chosen is not None
    assert list(chosen.gated) == ["third"]
    with pytest.raises(ThriftyError, match="leaves no layer gated"):
        find_subject(name, image=16, where=["fc"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_net",), "no network 'no_such_net'"),
        (("/nowhere.thrifty",), "/nowhere.thrifty"),
        (("resnet20-cifar10", 64), "32 px"),
    ],
)
def test_what_cannot_be_measured_is_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ThriftyError, match=words):
        find_subject(*arguments)


def test_a_program_file_needs_no_network(tmp_path: Any, subject: Subject) -> None:
    assert subject.dynamic is not None
    path = tmp_path / "m.thrifty"
    save_program(subject.dynamic, path)
    found = find_subject(str(path))
    assert found.module is None
    assert found.own_density
    assert found.dense.macs() == subject.dense.macs()
    report = run_bench(found, [None], peers=["onnxruntime", "torch"], seconds=0.01)
    assert [row.engine for row in report.rows] == ["onnxruntime", "thrifty", "thrifty"]
    with pytest.raises(ThriftyError, match="--image 17"):
        find_subject(str(path), 17)


# --------------------------------------------------------------------------------------------------------------- bench


def test_rows_follow_from_what_was_measured(subject: Subject) -> None:
    peers = ["onnxruntime", "openvino"]  # torch's threads wait for each other too long where others work
    report = run_bench(subject, [0.25, 1.0], threads=[1, 2], batches=[1, 4], peers=peers, layers=True, seconds=0.02)
    assert len(report.rows) == 2 * 2 * (2 + 1 + 2)
    dense_macs = sum(subject.dense.macs().values())
    for row in report.rows:
        run = [other for other in report.rows if (other.threads, other.batch) == (row.threads, row.batch)]
        fastest = min((other for other in run if other.engine != "thrifty"), key=lambda other: other.ms)
        assert row.fastest == fastest.engine
        assert row.speed_up == pytest.approx(fastest.ms / row.ms)
        assert row.efficiency == pytest.approx(row.speed_up / (dense_macs / row.macs))
        assert row.mac_ratio == pytest.approx(row.macs / dense_macs)
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.ms)
        assert (row.error is None) == bool(row.method)
        assert row.error is None or row.error < 1e-5
        base = [other for other in report.rows if other.threads == other.batch == 1]
        (single,) = (o for o in base if (o.engine, o.method, o.density) == (row.engine, row.method, row.density))
        if row is single:
            assert row.scaling is None
        else:
            assert row.scaling == pytest.approx(row.images_per_second / single.images_per_second / row.threads)
    assert len(as_records(report.rows)) == len(report.rows)
    of_dense = [row for row in report.layers if not row.method and row.threads == row.batch == 1]
    assert {row.layer: row.macs for row in of_dense if row.macs} == subject.dense.macs()
    assert all(row.rate > 0 for row in of_dense if row.macs)


def test_macs_are_those_of_the_images_that_were_timed(subject: Subject) -> None:
    dynamic = thrifty.convert(small_net().eval(), thrifty.FBS(density=0.25), torch.zeros(1, 3, 16, 16))
    x = torch.from_numpy(random_images(8, (3, 16, 16)))
    randomise_gates(dynamic, x)
    (row,) = (row for row in run_bench(subject, [0.25], peers=[], seconds=0.01).rows if row.method)
    assert row.macs == pytest.approx(thrifty.count_macs(dynamic, x).mean)
    assert row.fastest == ""
    assert row.speed_up is row.efficiency is None


def test_images_that_are_given_are_the_ones_measured(subject: Subject) -> None:
    few = random_images(3, subject.shape, seed=5)
    rows = run_bench(subject, [0.5], batches=[1, 3], peers=[], seconds=0.01, images=few).rows
    assert subject.dynamic is not None
    expected = Engine(subject.dynamic).trace(few).macs.mean()
    assert [row.macs for row in rows if row.method] == pytest.approx([expected, expected])
    with pytest.raises(ThriftyError, match="3 photographs don't fill a batch of 4"):
        run_bench(subject, [0.5], batches=[4], peers=[], images=few)


def test_nothing_is_timed_where_answers_differ(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    other = small_net()
    with torch.no_grad():
        other.fc.bias[0] += 0.1
    monkeypatch.setattr(bench, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(ThriftyError, match=r"torch and thrifty do not agree on dense .*small_net"):
        run_bench(replace(subject, module=other), [0.5])
    with pytest.raises(ThriftyError, match="no peer 'tensorflow'"):
        run_bench(subject, [0.5], peers=["tensorflow"])


def test_own_and_given_densities_do_not_mix(subject: Subject) -> None:
    rows = run_bench(subject, [0.25, None], peers=[], seconds=0.01).rows
    by_density = {row.density: row.macs for row in rows if row.method}
    assert by_density[0.25] < 0.7 * by_density[None]


def row_of(**values: Any) -> Row:
    base = {"model": "m", "image": 1, "batch": 1, "threads": 1, "engine": "thrifty", "method": "", "density": None}
    times = {
        "ms": 1.23456789,
        "ms_p10": 1.0,
        "ms_p90": 2.0,
        "ms_p95": 2.0,
        "ms_p99": 2.0,
        "calls": 3,
        "images_per_second": 1.0,
        "macs": 12345678.0,
    }
    rest = {"mac_ratio": 1.0, "fastest": "", "speed_up": None, "efficiency": None, "scaling": None, "error": None}
    return Row(**(base | times | rest | {"setting": ""} | values))


def test_records_keep_macs_whole_and_round_times() -> None:
    (record,) = as_records([row_of()])
    assert record["macs"] == 12345678.0
    assert record["ms"] == 1.23457


# ----------------------------------------------------------------------------------------------------------- diagnosis


def cost(name: str, dense_ms: float, ms: float, macs: float = 50.0, gated: bool = True) -> LayerCost:
    return LayerCost(name, "conv", gated, dense_ms, ms, 100e6, macs * 1e6, 0.0)


def diagnosis(*layers: LayerCost) -> Diagnosis:
    dense_ms, ms = sum(layer.dense_ms for layer in layers), sum(layer.ms for layer in layers)
    dense_macs, macs = sum(layer.dense_macs for layer in layers), sum(layer.macs for layer in layers)
    peak = max(layer.dense_rate for layer in layers)
    return Diagnosis("m", "fbs", 0.5, 1, dense_ms, ms, dense_macs, macs, peak, layers)


def test_a_network_that_falls_as_its_work_does_is_left_alone() -> None:
    found = diagnosis(cost("a", 2, 1), cost("b", 2, 1.1))
    assert "time falls as the work falls" in found.verdict()
    assert all("Nothing to do" in finding for finding in found.findings())


@pytest.mark.parametrize(
    ("layers", "place", "words"),
    [
        ((cost("a", 2, 1), cost("stem", 6, 6, 50.0, gated=False)), 0, "outside gated layers"),
        ((cost("a", 2, 1), cost("small", 2, 1.9, 10.0)), 1, "kernels slow down"),
        ((cost("a", 2, 1), cost("worse", 2, 3)), 2, "cost more than they save"),
    ],
)
def test_the_largest_loss_is_named(layers: tuple[LayerCost, ...], place: int, words: str) -> None:
    found = diagnosis(*layers)
    assert words in found.verdict()
    assert layers[1].name in found.findings()[place]
    assert "Nothing to do" not in found.findings()[place]


def test_a_layer_gate_is_judged_by_its_block() -> None:
    gate = LayerCost("block", "layer_gate", True, 0.0, 0.1, 0.0, 0.0, 1e3)
    inside = [LayerCost(name, "conv", False, 2.0, 0.5, 100e6, 25e6, 0.0, "block") for name in ("c1", "c2")]
    found = diagnosis(gate, *inside)
    assert found.futile == ()
    assert found.outside == 0
    slower = [replace(layer, ms=2.1) for layer in inside]
    found = diagnosis(gate, *slower)
    assert found.futile == (gate,)
    assert found.lost()["gates"] == pytest.approx(0.3)


def test_time_lost_in_a_block_is_counted_once() -> None:
    """The block costs more than it saves, and so does one of the layers in it, which has a gate of its own."""
    gate = LayerCost("block", "layer_gate", True, 0.0, 0.1, 0.0, 0.0, 1e3)
    inner = LayerCost("c1", "conv", True, 2.0, 2.5, 100e6, 25e6, 1e3, "block")
    other = LayerCost("c2", "conv", False, 2.0, 1.9, 100e6, 25e6, 0.0, "block")
    alone = cost("alone", 2.0, 2.2)
    found = diagnosis(gate, inner, other, alone, cost("stem", 1.0, 1.0, 100.0, gated=False))
    assert set(found.futile) == {gate, inner, alone}
    assert found.wasted == pytest.approx(0.1 + 0.5 - 0.1 + 0.2)
    assert found.lost() == {"outside": pytest.approx(1 - found.macs / found.dense_macs), "kernels": 0.0,
                            "gates": pytest.approx(0.7)}  # fmt: skip
    assert "0.70 ms together" in found.findings()[2]


def test_the_diagnosis_of_layers_that_run_for_some_images() -> None:
    subject = find_subject("resnet20", None, "lcnet", settings={"target": 0.5})
    found = diagnose(subject, seconds=0.02)
    assert max(layer.rate for layer in found.layers) < 4 * found.peak
    assert all(layer.kind == "layer_gate" or layer.gated or not layer.block for layer in found.futile)
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name["layer1.0.conv2"].block
    assert not by_name["layer1.0.conv2"].outside
    assert by_name["conv1"].outside
    images = random_images(IMAGES, subject.shape)
    assert subject.dynamic is not None
    rows = layer_rows(subject, Ours(Engine(subject.dynamic)), 1, 1, [images[i : i + 1] for i in range(len(images))])
    measured = sum(row.macs + row.gate_macs for row in rows)
    assert measured == pytest.approx(Engine(subject.dynamic).trace(images).macs.mean())


def test_a_deep_network_of_equal_layers_has_a_peak(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis_module, "LARGE", 2.0)
    assert diagnose(subject, 0.25, seconds=0.02).peak > 0


def test_diagnosis_measures_every_operator(subject: Subject) -> None:
    found = diagnose(subject, 0.25, seconds=0.02)
    assert subject.dynamic is not None
    assert [layer.name for layer in found.layers] == [operator.name for operator in subject.dynamic.operators]
    assert {layer.name for layer in found.layers if layer.gated} == set(subject.dynamic.gated)
    assert found.dense_macs == sum(subject.dense.macs().values())
    assert 0 < found.outside < 1
    assert found.macs < found.dense_macs
    with pytest.raises(ThriftyError, match="no gates"):
        diagnose(replace(subject, dynamic=None))
