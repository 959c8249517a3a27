"""Commands that run on the engine: bench, compile, demo, doctor."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import thrifty
from thrifty.benchmarking.subjects import random_images
from thrifty.cli.options import Several
from thrifty.data.files import SAMPLE
from thrifty.zoo.store import load_model

DENSE, DYNAMIC = "resnet20-cifar10", "resnet20-cifar10-fbs"
QUICK = ("--seconds", "0.02")
NO_TORCH = "import sys; sys.modules['torch'] = None; from thrifty.cli import main; sys.argv[0] = 'thrifty'; main()"


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-m", "thrifty") if code is None else ("-c", code)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def output(*arguments: str, code: str | None = None) -> str:
    done = run(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------------------- bench


def test_bench_takes_several_values_and_writes_what_it_prints(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    options = ("--threads", "1", "2", "--batch", "1", "2", "--density", "0.5", "0.7", "--peers", "onnxruntime")
    report = json.loads(output("bench", "resnet20", *options, *QUICK, "--layers", "--json", "--csv", str(file)))
    rows = report["rows"]
    assert {(row["threads"], row["batch"]) for row in rows} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert len(rows) == 4 * 4
    assert {row["density"] for row in rows if row["method"] == "fbs"} == {0.5, 0.7}
    with file.open(newline="", encoding="utf-8") as stream:
        written = list(csv.DictReader(stream))
    assert [float(row["ms"]) for row in written] == [row["ms"] for row in rows]
    assert {row["onnxruntime"] for row in written} == {report["machine"]["onnxruntime"]}
    assert all(row["CPU"] and row["thrifty"] == thrifty.__version__ for row in written)
    assert {row["instructions"] for row in written} <= {"generic", "avx2", "avx512"}
    layers = {row["layer"] for row in report["layers"]}
    assert {"conv1", "layer3.2.conv2", "fc"} <= layers


def test_bench_of_a_shipped_model_runs_at_the_densities_that_it_was_trained_with() -> None:
    text = output("bench", DYNAMIC, "--peers", "onnxruntime", *QUICK)
    record = thrifty.zoo.record(DYNAMIC)
    (line,) = (line for line in text.splitlines() if "thrifty, fbs" in line)
    assert f"{record.macs / record.dense_macs:.3f}" in line
    assert "efficiency" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "no_such_net"), "no network 'no_such_net'"),
        (("bench", "resnet20", "--peers", "tensorflow"), "no peer 'tensorflow'"),
        (("bench", "resnet20", "--method", "magic"), "no method 'magic'"),
        (("bench", "resnet20", "--density", "2", *QUICK, "--peers", "none"), "density is 2"),
        (("bench", "/nowhere.thrifty"), "/nowhere.thrifty"),
        (("compile", "resnet20", "-o", "model.pt"), "must end in .thrifty or .onnx"),
        (("compile", "resnet20", "-o", "m.thrifty", "--density", "0.5"), "is a dense network"),
        (("compile", DENSE, "-o", "m.thrifty", "--density", "0.5"), "is a dense model"),
        (("doctor", "resnet20", "--method", "none"), "has no gates"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_options_take_what_follows_them_and_nothing_else() -> None:
    app = typer.Typer(add_completion=False)
    seen: dict[str, Any] = {}

    @app.command(cls=Several)
    def command(
        names: list[str], threads: list[int] | None = None, image: int = 0, peers: list[str] | None = None
    ) -> None:
        seen.update(names=names, threads=threads, image=image, peers=peers)

    def parsed(*arguments: str) -> dict[str, Any]:
        app(list(arguments), standalone_mode=False)
        return dict(seen)

    expected = {"names": ["a", "b"], "threads": [1, 2], "image": 7, "peers": ["torch", "none"]}
    assert parsed("a", "b", "--threads", "1", "2", "--image", "7", "--peers", "torch", "none") == expected
    assert parsed("--threads", "1", "2", "a", "--peers", "torch", "none", "--image", "7", "b") == expected
    assert (
        parsed("a", "--threads", "1", "--threads", "2", "b", "--peers=torch", "--peers", "none", "--image=7")
        == expected
    )
    assert parsed("a", "--image", "7", "8")["names"] == ["a", "8"]


# ------------------------------------------------------------------------------------------------------------ compile


def test_a_compiled_model_runs_without_torch(tmp_path: Path) -> None:
    file, images, logits = tmp_path / "m.thrifty", tmp_path / "x.npy", tmp_path / "y.npy"
    text = output("compile", DYNAMIC, "-o", str(file), "--density", "0.4")
    assert "18 gated layers" in text
    x = random_images(3, (3, 32, 32))
    np.save(images, x)
    code = (
        "import sys; sys.modules['torch'] = None; import numpy as np, thrifty;"
        f"e = thrifty.load({str(file)!r}); np.save({str(logits)!r}, e(np.load({str(images)!r})));"
        "print(*e.program.classes)"
    )
    classes = output(code=code).split()
    model, card = load_model(DYNAMIC)
    assert tuple(classes) == card.classes
    model.set_density(0.4)
    import torch

    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    assert np.abs(np.load(logits) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_predict_of_a_program_agrees_with_the_model(tmp_path: Path) -> None:
    file, folder = tmp_path / "m.thrifty", str(SAMPLE / "frog")
    output("compile", DYNAMIC, "-o", str(file))
    ours = [json.loads(line) for line in output("predict", str(file), folder, "--json", code=NO_TORCH).splitlines()]
    torchs = [json.loads(line) for line in output("predict", DYNAMIC, folder, "--json").splitlines()]
    assert [line["picture"] for line in ours] == [line["picture"] for line in torchs]
    assert [line["macs"] for line in ours] == [line["macs"] for line in torchs]
    assert [line["class"] for line in ours] == [line["class"] for line in torchs]
    np.testing.assert_allclose([a["confidence"] for a in ours], [b["confidence"] for b in torchs], atol=1e-3)
    output("compile", "resnet20", "-o", str(file))
    assert "what its classes are" in run("predict", str(file), folder).stderr


def test_compile_writes_onnx_too(tmp_path: Path) -> None:
    import onnxruntime

    file = tmp_path / "m.onnx"
    text = output("compile", "resnet20", "-o", str(file), "--image", "32", "--method", "fbs", "--show")
    assert "layer3.2.conv2" in text
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]


# --------------------------------------------------------------------------------------------------- demo and doctor


def test_the_demo_needs_no_torch_and_shows_every_model() -> None:
    results = json.loads(output("demo", "--json", *QUICK, code=NO_TORCH))
    records = {record.name: record for record in thrifty.zoo.records()}
    dense = {name for name, record in records.items() if record.method is None}
    assert {(result["model"], result["engine"]) for result in results} == {
        *((name, "thrifty") for name in records),
        *((name, "onnxruntime") for name in dense),
    }
    by_row = {(result["model"], result["engine"]): result for result in results}
    for name, record in records.items():
        result = by_row[name, "thrifty"]
        spread = (record.accuracy * (1 - record.accuracy) / 1000) ** 0.5
        assert result["photographs"] == 1000
        assert abs(result["accuracy"] - record.accuracy) < 3 * spread
        assert result["macs"] == pytest.approx(record.macs, rel=0.01)
        assert result["ms_p10"] <= result["ms"] <= result["ms_p90"]
        assert result["constant_cost"] == (result["cheapest"] == [])
    for name in dense:
        assert abs(by_row[name, "onnxruntime"]["accuracy"] - by_row[name, "thrifty"]["accuracy"]) <= 0.002


def test_the_demo_names_what_it_misses() -> None:
    code = NO_TORCH.replace("import sys;", "import sys; sys.modules['onnxruntime'] = None;")
    done = run("demo", code=code)
    assert done.returncode == 1
    assert "pip install 'thrifty[demo]'" in done.stderr


def test_doctor_tells_why_a_model_is_not_faster() -> None:
    text = output("doctor", DYNAMIC)
    assert "times as fast as dense with 0.46 of the MACs" in text
    for cause in ("outside gated layers: ", "kernels: ", "gates: "):
        assert cause in text
    report = json.loads(output("doctor", "resnet20", "--density", "0.25", "--json"))
    assert report["efficiency"] == pytest.approx(report["speed_up"] * report["macs"] / report["dense_macs"])
    assert 0 < report["outside"] < 1
    assert set(report["lost_ms"]) == {"outside", "kernels", "gates"}
    assert len(report["findings"]) == 3


def test_doctor_tells_the_instruction_set_in_use() -> None:
    report = json.loads(output("doctor", "--json"))
    assert report["engine"]["instructions_in_use"] in {"generic", "avx2", "avx512"}
