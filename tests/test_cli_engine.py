"""Commands that run on the engine: bench, compile, demo, doctor."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from cli_support import error_of
from PIL import Image
from varying import write_varying

import thrifty
from thrifty.benchmarking.subjects import random_images
from thrifty.cli.demo import _networks
from thrifty.cli.options import Several
from thrifty.data.files import SAMPLE, listing, read_files
from thrifty.program_file import save_program
from thrifty.zoo.compilation import program_of
from thrifty.zoo.nets import build
from thrifty.zoo.store import load_model

DENSE, DYNAMIC = "resnet20-cifar10", "resnet20-cifar10-fbs"
PROGRAM = str(thrifty.zoo.record(DENSE).program)
QUICK = ("--seconds", "0.02")
NO_TORCH = "import sys; sys.modules['torch'] = None; from thrifty.cli import main; sys.argv[0] = 'thrifty'; main()"


def run(*arguments: str, code: str | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-m", "thrifty") if code is None else ("-c", code)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def output(*arguments: str, code: str | None = None, cwd: Path | None = None) -> str:
    done = run(*arguments, code=code, cwd=cwd)
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


def test_bench_on_photographs_measures_what_trained_gates_decide() -> None:
    model = "resnet20-cifar10-lcnet"
    report = json.loads(output("bench", model, "--photographs", "sample", "--peers", "none", *QUICK, "--json"))
    (row,) = (row for row in report["rows"] if row["method"])
    assert row["macs"] == pytest.approx(thrifty.zoo.record(model).macs, rel=0.01)
    assert row["ms_p10"] <= row["ms"] <= row["ms_p90"] <= row["ms_p95"] <= row["ms_p99"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "no_such_net"), "no network 'no_such_net'"),
        (("bench", "resnet20", "--photographs", "sample"), "was trained on no photographs, or its gates are random"),
        (("bench", DYNAMIC, "--photographs", "no/such/folder"), "no file or folder no/such/folder"),
        (("bench", DYNAMIC, "--where", "layer1*"), "is a dynamic model already"),
        (("bench", "resnet20", "--peers", "tensorflow"), "no peer 'tensorflow'"),
        (("bench", "resnet20", "--method", "magic"), "no method 'magic'"),
        (("bench", "resnet20", "--density", "2", *QUICK, "--peers", "none"), "density is 2"),
        (("bench", "/nowhere.thrifty"), "/nowhere.thrifty"),
        (("compile", "resnet20", "-o", "model.pt"), "must end in .thrifty or .onnx"),
        (("compile", "resnet20", "-o", "m.thrifty", "--density", "0.5"), "is a dense network"),
        (("compile", DENSE, "-o", "m.thrifty", "--density", "0.5"), "is a dense model"),
        (
            ("compile", DYNAMIC, "-o", "m.thrifty", "--method", "fbs"),
            "leave --image, --channels, --method and --set out",
        ),
        (("compile", DYNAMIC, "-o", "m.thrifty", "--image", "64"), "leave --image, --channels, --method and --set out"),
        (("compile", "resnet20", "-o", "m.thrifty", "--net", "resnet20"), "leave --net out"),
        (("compile", "resnet20", "-o", "m.thrifty", "--method", "lcnet", "--density", "0.4"), "give --set target"),
        (("compile", "resnet20", "-o", "m.thrifty", "--method", "antidote", "--density", "0.4"), "settings of its own"),
        (("compile", "resnet20", "-o", "m.thrifty", "--set", "columns=0.4"), "is a dense network"),
        (
            ("compile", DYNAMIC, "-o", "m.thrifty", "--set", "density=0.4"),
            "leave --image, --channels, --method and --set out",
        ),
        (("bench", "resnet20", "--method", "lcnet", "--density", "0.4"), "give --set target"),
        (("doctor", "resnet20", "--method", "lcnet", "--density", "0.4"), "give --set target"),
        (("compile", "resnet20", "-o", "m.thrifty", "--method", "fbs", "--density", "0"), "density is 0"),
        (("compile", PROGRAM, "-o", "m.onnx"), "A program is for thrifty.load"),
        (("compile", "resnet20", "-o", "m.thrifty", "--method", "none", "--density", "0.5"), "is a dense network"),
        (("bench", "resnet20", "--method", "none", "--density", "0.5"), "measured dense only"),
        (("bench", DYNAMIC, "--method", "none"), "leave --method"),
        (("bench", "resnet20", "--csv", "."), "it is a directory"),
        (("bench", "resnet20", "--seconds", "inf"), "must be finite"),
        (("bench", DYNAMIC, "--channels", "1"), "takes images of 3 channels"),
        (("bench", "resnet20", "--channels", "1"), "does not take an example"),
        (("doctor", "--channels", "1"), "give a MODEL"),
        (("doctor", "resnet20", "--method", "none"), "has no gates"),
        (("doctor", "--density", "0.5"), "give a MODEL"),
        (("doctor", "--threads", "2"), "give a MODEL"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = error_of(arguments, monkeypatch, capsys)
    assert status == 1
    assert words in message


def test_torch_runs_no_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "m.thrifty")
    thrifty.compile(build("resnet8"), torch.zeros(1, 3, 32, 32)).save(file)
    _, message = error_of(("bench", file, "--peers", "torch"), monkeypatch, capsys)
    assert "torch can't run" in message
    assert "torch: left out" in output("bench", file, *QUICK)


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
    dense = {pair[0].name for pair in _networks(list(records.values()))}
    assert {(result["model"], result["engine"]) for result in results} == {
        *((name, "thrifty") for name, record in records.items() if name in dense or record.method is not None),
        *((name, "onnxruntime") for name in dense),
    }
    by_row = {(result["model"], result["engine"]): result for result in results}
    for name in {name for name, _ in by_row}:
        record, result = records[name], by_row[name, "thrifty"]
        spread = (record.accuracy * (1 - record.accuracy) / 1000) ** 0.5
        assert result["photographs"] == 1000
        assert abs(result["accuracy"] - record.accuracy) < 3 * spread
        assert result["macs"] == pytest.approx(record.macs, rel=0.01)
        assert result["ms_p10"] <= result["ms"] <= result["ms_p90"] <= result["ms_p95"] <= result["ms_p99"]
        assert result["constant_cost"] == (result["cheapest"] == [])
    for name in dense:
        assert abs(by_row[name, "onnxruntime"]["accuracy"] - by_row[name, "thrifty"]["accuracy"]) <= 0.002


def test_the_demo_has_one_dense_model_of_each_network() -> None:
    (known, *_) = thrifty.zoo.records()
    entries = [("a", 20, False, 9.0), ("b", 26, False, 9.0), ("c", 26, False, 9.0), ("d", 9, True, 4.0)]
    entries += [("e", 99, True, 5.0)]
    made = [
        replace(known, name=name, net="n", total_epochs=epochs, method={"name": "fbs"} if dynamic else None, macs=macs)
        for name, epochs, dynamic, macs in entries
    ]
    made.append(replace(known, name="f", net="m", method=None))
    found = [(dense.name, [other.name for other in dynamic]) for dense, dynamic in _networks(made)]
    assert found == [("f", []), ("b", ["e", "d"])]


VARYING = """
import sys; sys.modules['torch'] = None
from dataclasses import replace
import thrifty
from thrifty.cli import main
(dense,) = [record for record in thrifty.zoo.records() if record.name == 'resnet20-cifar10']
found = [dense] if '--dense' in sys.argv else [dense, replace(dense, name='varying', method={})]
thrifty.zoo.records = lambda: found
sys.argv = ['thrifty', *[word for word in sys.argv[1:] if word != '--dense']]
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the program of a model of varying cost, under the name of its record."""
    directory = tmp_path_factory.mktemp("demo")
    save_program(program_of(*load_model(write_varying(directory / "model.safetensors"))), directory / "varying")
    return directory


def test_the_demo_draws_the_cheapest_and_the_dearest(place: Path) -> None:
    text = output("demo", *QUICK, code=VARYING, cwd=place)
    assert "as pictures: thrifty-demo.png" in text
    assert max(map(len, text.splitlines())) <= 160
    assert all(column in text for column in ("p50", "p10 – p90", "p95", "p99"))
    with Image.open(place / "thrifty-demo.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    results = json.loads(output("demo", *QUICK, "--json", "--report", "other.png", code=VARYING, cwd=place))
    assert (place / "other.png").read_bytes() == (place / "thrifty-demo.png").read_bytes()
    (result,) = (row for row in results if row["model"] == "varying")
    paths, labels, classes = listing(SAMPLE)
    trace = thrifty.load(place / "varying").trace(read_files(paths, 32))
    costs = dict(zip([str(path.relative_to(SAMPLE)) for path in paths], trace.macs.tolist(), strict=True))
    expected = sorted(costs.values())
    assert [item["macs"] for item in result["cheapest"]] == expected[:8]
    assert [item["macs"] for item in result["dearest"]] == expected[:-9:-1]
    for row, kind in enumerate(("cheapest", "dearest")):
        for column, item in enumerate(result[kind]):
            index = [str(path.relative_to(SAMPLE)) for path in paths].index(item["photograph"])
            assert costs[item["photograph"]] == item["macs"]
            assert classes[labels[index]] == item["class"]
            assert item["prediction"] in classes
            pixels = read_files([paths[index]], 32)[0].repeat(4, 0).repeat(4, 1)
            left = 24 + column * 140
            tops = [
                y for y in range(drawn.shape[0] - 128) if np.array_equal(drawn[y : y + 128, left : left + 128], pixels)
            ]
            assert len(tops) == 1
            assert (tops[0] > drawn.shape[0] // 2) == (row == 1)
    trusted = np.mean(trace.output.argmax(1) == labels)
    assert abs(result["accuracy"] - trusted) < 0.01


def test_the_demo_draws_nothing_where_costs_are_constant(tmp_path: Path) -> None:
    text = output("demo", *QUICK, "--dense", code=VARYING, cwd=tmp_path)
    assert text.count("no report to draw") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_demo_overwrites_nothing_but_its_own_report(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "thrifty-demo.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    before = (tmp_path / "thrifty-demo.png").read_bytes()
    cases = [((), "Choose another --report"), (("--report", "text.png"), "Choose another --report")]
    cases += [(("--report", "a.html"), "must end in .png"), (("--report", "."), "must end in .png")]
    for arguments, words in cases:
        done = run("demo", *QUICK, *arguments, code=VARYING, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert (tmp_path / "thrifty-demo.png").read_bytes() == before
    (tmp_path / "d.png").mkdir()
    assert "Choose another" in run("demo", "--report", "d.png", code=VARYING, cwd=tmp_path).stderr


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


def test_doctor_refuses_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THRIFTY_ISA", "mmx")
    done = run("doctor")
    assert done.returncode == 1
    assert "THRIFTY_ISA is 'mmx'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_tells_the_instruction_set_in_use() -> None:
    report = json.loads(output("doctor", "--json"))
    assert report["engine"]["instructions_in_use"] in {"generic", "avx2", "avx512"}
