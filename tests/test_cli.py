"""The commands as a user types them: what they print, and how they fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
from cli_support import error_of
from PIL import Image
from varying import write_varying

import thrifty
from thrifty.data.files import SAMPLE

COMMANDS = ("demo", "train", "eval", "convert", "compile", "predict", "show", "tune", "bench", "zoo", "doctor")
FBS_MODEL = "resnet20-cifar10-fbs"
DENSE_MODEL = "resnet20-cifar10"
FOLDER = str(SAMPLE)
PHOTOGRAPH = str(min((SAMPLE / "horse").iterdir()))


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thrifty", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def output(*arguments: str, cwd: Path | None = None) -> str:
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_what_a_command_does(command: str) -> None:
    text = output(command, "--help")
    assert "Usage: thrifty" in text or f"thrifty {command}" in text
    assert len(text) > 200


def test_version() -> None:
    assert output("--version").strip() == f"thrifty {thrifty.__version__}"
    assert metadata.version("thrifty") == thrifty.__version__


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("eval", "no-such-model"), 1, "no model no-such-model"),
        (("eval", DENSE_MODEL, "--data", "nowhere"), 1, "no data source 'nowhere'"),
        (("eval", DENSE_MODEL, "--data", "folder", "--root", "/nowhere"), 1, "no directory /nowhere"),
        (("eval", DENSE_MODEL, "--root", "/nowhere"), 1, "no directory /nowhere"),
        (("eval", DENSE_MODEL, "--data", "sample", "--root", "/nowhere"), 1, "the sample ships with thrifty"),
        (("eval", DENSE_MODEL, "--net", "torchvision:resnet18"), 1, "leave --net out"),
        (("eval", DENSE_MODEL, "--density", "0.5"), 1, "is a dense model"),
        (("eval", FBS_MODEL, "--density", "1.5"), 1, "density is 1.5"),
        (("eval", FBS_MODEL, "--no-such-option"), 2, "--no-such-option"),
        (("eval",), 2, "thrifty eval --help"),
        (("no-such-command",), 2, "no-such-command"),
        (("predict", DENSE_MODEL, "/nowhere.jpg"), 1, "no file or folder /nowhere.jpg"),
        (("predict", DENSE_MODEL, __file__), 1, "cannot be read as an image"),
        (("convert", "torchvision:no_such_net"), 1, "no_such_net"),
        (("convert", "no_such_module:function"), 1, "no_such_module"),
        (("convert", "resnet20", "--method", "none"), 1, "no method 'none'"),
        (("convert", "resnet20", "--size", "0"), 2, "--size"),
        (("convert", "resnet20", "--set", "l1=abc"), 1, "l1 is 'abc'"),
        (("convert", "resnet20", "--set", "where=5"), 1, "where"),
        (("show", "/nowhere.jpg", "--model", FBS_MODEL), 1, "no file /nowhere.jpg"),
        (("show", PHOTOGRAPH, "--model", DENSE_MODEL), 1, "is a dense model"),
        (("show", PHOTOGRAPH, "--model", FBS_MODEL, "--output", "a.jpg"), 1, "must end in .png"),
        (("show", PHOTOGRAPH, "--model", FBS_MODEL, "--layers", "conv9"), 1, "no layer fits conv9"),
        (("tune", FBS_MODEL), 2, "--target-macs"),
        (("tune", FBS_MODEL, "--target-macs", "2"), 1, "target is 2.0"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--floor", "-1"), 1, "floor is -1.0"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--data", "sample"), 1, "test photographs"),
        (("tune", FBS_MODEL, "--target-macs", "0.5"), 1, "needs a root directory"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--axis", "rows"), 1, "--axis is 'rows'"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--axis", "both", "--root", FOLDER), 1, "does not prune columns"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--ratios", "1.5", "--root", FOLDER), 1, "a ratio is 1.5"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--by", "row"), 1, "by 'row'"),
        (("tune", FBS_MODEL, "--target-macs", "0.5", "--method", "antidote"), 1, "dynamic already, by fbs"),
        (("tune", DENSE_MODEL, "--target-macs", "0.5"), 1, "give --method antidote"),
        (("tune", DENSE_MODEL, "--target-macs", "0.5", "--method", "none"), 1, "no method 'none'"),
        (("tune", DENSE_MODEL, "--target-macs", "0.5", "--method", "lcnet"), 1, "no ratios to tune"),
        (("convert", ":x"), 1, "names no function of a module"),
        (("convert", "resnet20", "--where", "layr*"), 1, "leaves no layer gated"),
        (("train", "no-such-recipe"), 1, "no recipe no-such-recipe"),
        (("train", "resnet20-cifar10-base", "--set", "epochs=two"), 1, "epochs"),
        (("train", "resnet20-cifar10-base", "--set", "colour=red"), 1, "unknown key colour"),
        (("train", "resnet20-cifar10-base", "--set", "data.root=/nowhere"), 1, "no directory /nowhere"),
    ],
)
def test_errors_are_one_line_and_say_what_was_wrong(
    arguments: tuple[str, ...],
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, message = error_of(arguments, monkeypatch, capsys)
    assert found == status, message
    assert words in message
    assert list(tmp_path.iterdir()) == [] or words != "no recipe"


def test_a_recipe_is_trained_resumed_and_evaluated(root: Path, tmp_path: Path) -> None:
    settings = {
        "name": "small",
        "model": {"net": "resnet8", "arguments": {"classes": 3}},
        "data": {"source": "folder", "root": str(root), "validation": 0.2},
        "method": {"name": "fbs", "density": 0.5, "schedule": "none"},
        "epochs": 2,
        "batch_size": 16,
        "optimiser": {"learning_rate": 0.01},
    }
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(settings), encoding="utf-8")
    options = ("--set", "threads=1", "--output", "run")
    lines = output("train", str(recipe), *options, cwd=tmp_path).splitlines()
    for epoch, line in enumerate(lines[:2], 1):
        assert line.startswith(f"epoch {epoch}/2")
        assert "density 0.5" in line
        assert "validation" in line
    assert lines[2:] == ["weights: run/model.safetensors"]
    again = run("train", str(recipe), *options, cwd=tmp_path)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    assert output("train", str(recipe), *options, "--resume", cwd=tmp_path) == "weights: run/model.safetensors\n"
    os.symlink(root / "train", tmp_path / "test")
    model = str(tmp_path / "run" / "model.safetensors")
    found = json.loads(output("eval", model, "--data", "folder", "--root", str(tmp_path), "--json"))
    assert found["photographs"] == 42


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.partition("## On your own network")[2].partition("```python\n")[2].partition("```")[0]
    small = code.replace('weights="DEFAULT"', "").replace("8, 3, 224, 224", "8, 3, 64, 64")
    assert len(small) < len(code)
    done = subprocess.run([sys.executable, "-c", small], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "MACs per input" in done.stdout
    assert (tmp_path / "resnet18.thrifty").stat().st_size > 1e6


def test_zoo_shows_what_one_model_reaches_at_other_budgets() -> None:
    text = output("zoo", "resnet20-cifar10-any")
    for point in thrifty.zoo.record("resnet20-cifar10-any").curve:
        assert f"{100 * point['accuracy']:.2f} %" in text
    assert "resnet56" not in text
    assert [row["name"] for row in json.loads(output("zoo", "resnet20-cifar10", "--json"))] == ["resnet20-cifar10"]


def test_zoo_lists_every_record() -> None:
    listed = json.loads(output("zoo", "--json"))
    assert {entry["name"] for entry in listed} >= {
        "resnet20-cifar10",
        "resnet20-cifar10-fbs",
        "mcifarnet-cifar10",
        "mcifarnet-cifar10-fbs",
    }
    table = output("zoo")
    for entry in listed:
        assert entry["name"] in table
        assert f"{100 * entry['accuracy']:.2f}" in table


def test_doctor_names_versions_and_missing_extras(tmp_path: Path) -> None:
    report = json.loads(output("doctor", "--json"))
    assert report["versions"]["thrifty"] == thrifty.__version__
    assert "torch" in report["extras"]["torch"]["found"]
    hidden = "import sys, importlib.util as u; f = u.find_spec\n"
    hidden += "u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)\n"
    hidden += "from thrifty.cli import main; sys.argv = ['thrifty', 'doctor']; main()"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True)
    assert "missing torch" in done.stdout
    assert "pip install 'thrifty[torch]'" in done.stdout


def test_convert_reports_places_and_coverage() -> None:
    report = json.loads(output("convert", "torchvision:mobilenet_v3_small", "--size", "64", "--json"))
    gated = [place for place in report["places"] if place["gated"]]
    dense = [place for place in report["places"] if not place["gated"]]
    assert gated
    assert dense
    assert all(place["note"] for place in dense)
    assert report["coverage"] == pytest.approx(sum(p["macs"] for p in gated) / report["dense_macs"])
    assert report["macs"] < report["dense_macs"]
    text = output("convert", "resnet20", "--size", "32", "--where", "layer1*")
    assert "not selected by where=" in text
    assert "6 of 19 layers gated" in text


def test_convert_takes_a_users_own_network(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    (tmp_path / "mine2.py").write_text("def net(): return 'no module'\n")
    assert "2 of 2 layers gated" in output("convert", "mine:net", "--size", "16", cwd=tmp_path)
    done = run("convert", "mine2:net", cwd=tmp_path)
    assert "must return a torch.nn.Module" in done.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def net(:", "cannot import 'broken': SyntaxError"),
        ("raise KeyError('weights')", "cannot import 'broken': KeyError: 'weights'"),
        ("def net(): return {}['weights']", "network 'broken:net' could not be made: KeyError: 'weights'"),
        ("", "module 'broken' has no 'net'"),
    ],
)
def test_a_users_own_network_that_fails_is_told_in_one_line(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("broken", None)
    importlib.invalidate_caches()
    _, message = error_of(("convert", "broken:net"), monkeypatch, capsys)
    assert words in message


def test_predict_agrees_with_python_and_tells_the_cost(tmp_path: Path) -> None:
    folder = SAMPLE / "frog"
    lines = [json.loads(line) for line in output("predict", FBS_MODEL, str(folder), "--json").splitlines()]
    assert [Path(line["picture"]).name for line in lines] == sorted(path.name for path in folder.iterdir())
    report = json.loads(output("eval", FBS_MODEL, "--json"))
    share = sum(line["class"] == "frog" for line in lines) / len(lines)
    assert share == pytest.approx(report["classes"]["frog"])
    assert all(report["macs"]["min"] <= line["macs"] <= report["macs"]["max"] for line in lines)
    assert all(0 < line["confidence"] <= 1 for line in lines)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no pictures in" in run("predict", FBS_MODEL, str(empty)).stderr


def test_eval_at_another_density_costs_less() -> None:
    own = json.loads(output("eval", FBS_MODEL, "--json"))
    lower = json.loads(output("eval", FBS_MODEL, "--density", "0.3", "--json"))
    assert lower["macs"]["mean"] < own["macs"]["mean"]
    assert own["macs"]["mean"] == pytest.approx(sum(own["layers"].values()) + sum(own["gates"].values()))
    text = output("eval", FBS_MODEL, "--layers")
    assert "layer1.0.conv1" in text


@pytest.fixture(scope="module")
def varying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_varying(tmp_path_factory.mktemp("varying") / "model.safetensors")


def test_eval_tells_accuracy_by_cost_and_what_ran(varying: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in SAMPLE.iterdir() if path.is_dir()):
        (tmp_path / name).mkdir()
        for photograph in sorted((SAMPLE / name).iterdir())[:6]:
            (tmp_path / name / photograph.name).symlink_to(photograph)
    arguments = ("eval", str(varying), "--data", "folder", "--root", str(tmp_path))
    report = json.loads(output(*arguments, "--json"))
    groups = report["by_cost"]
    assert not report["constant_cost"]
    assert 2 <= len(groups) <= 5
    assert sum(group["photographs"] for group in groups) == 60
    assert sum(g["accuracy"] * g["photographs"] for g in groups) == pytest.approx(60 * report["accuracy"])
    assert sum(g["macs"] * g["photographs"] for g in groups) == pytest.approx(60 * report["macs"]["mean"])
    assert (groups[0]["lowest"], groups[-1]["highest"]) == (report["macs"]["min"], report["macs"]["max"])
    assert sum(report["class_macs"].values()) / 10 == pytest.approx(report["macs"]["mean"])
    assert report["shares"]["layer2.1"].keys() == {"ran"}
    assert report["shares"]["layer2.1.conv1"].keys() == {"ran", "channels"}
    assert report["shares"]["layer2.1.conv2"] == report["shares"]["layer2.1"]
    text = output(*arguments, "--layers")
    for shown in ("from the cheapest photographs to the dearest", "channels kept", "MACs, mean"):
        assert shown in text
    lines = [line.split() for line in text.splitlines()]
    for name, own in report["shares"].items():
        (line,) = (line for line in lines if line and line[0] == name)
        shares = [cell for cell, unit in pairwise(line) if unit == "%"]
        assert shares == [f"{100 * share:.2f}" for share in own.values()]
    names = [line[0] for line in lines if line]
    assert names.index("layer2.1.conv1") - names.index("layer2.1") == 1
    groups_shown = [line for line in lines if "–" in line]
    assert [line[-2] for line in groups_shown] == [f"{100 * group['accuracy']:.2f}" for group in groups]


def test_eval_says_that_a_cost_is_constant() -> None:
    text = output("eval", DENSE_MODEL, "--layers")
    assert text.count("every photograph costs the same") == 1
    assert "cheapest" not in text
    assert "kept" not in text


def test_show_draws_one_photograph(tmp_path: Path) -> None:
    line = output("show", PHOTOGRAPH, "--model", FBS_MODEL, cwd=tmp_path)
    predicted = json.loads(output("predict", FBS_MODEL, PHOTOGRAPH, "--json"))
    name = f"{Path(PHOTOGRAPH).stem}-{FBS_MODEL}.png"
    assert line.count("\n") == 1
    for part in (
        predicted["class"],
        f"{100 * predicted['confidence']:.2f} %",
        f"{predicted['macs'] / 1e6:.2f} M",
        name,
    ):
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == [name]
    first = (tmp_path / name).read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    output("show", PHOTOGRAPH, "--model", FBS_MODEL, "--density", "0.3", cwd=tmp_path)  # an own picture is replaced
    assert (tmp_path / name).read_bytes() != first
    photograph = tmp_path / "mine.png"
    Image.open(PHOTOGRAPH).save(photograph)
    before = photograph.read_bytes()
    done = run("show", str(photograph), "--model", FBS_MODEL, "--output", str(photograph))
    assert done.returncode == 1
    assert "Choose another --output" in done.stderr
    assert photograph.read_bytes() == before


def test_tune_proposes_ratios_and_draws_curves(tmp_path: Path) -> None:
    arguments = ("--root", FOLDER, "--images", "20", "--ratios", "0.3", "0.6", "--floor", "1")
    text = output("tune", DENSE_MODEL, "--method", "antidote", "--target-macs", "0.9", *arguments, cwd=tmp_path)
    assert "method: {name: antidote, channels: {" in text
    directory = tmp_path / "runs" / f"tune-{DENSE_MODEL}-antidote"
    assert sorted(path.name for path in directory.iterdir()) == ["sensitivity.csv", "sensitivity.png"]
    assert len((directory / "sensitivity.csv").read_text().splitlines()) == 1 + 3 * 2
    assert "out of reach" not in text
    text = output("tune", DENSE_MODEL, "--method", "antidote", "--target-macs", "0.2", *arguments, cwd=tmp_path)
    assert "out of reach with all that was tried: give higher --ratios" in text
    out = tmp_path / "out"
    report = json.loads(
        output("tune", FBS_MODEL, "--target-macs", "0.6", *arguments, "--by", "layer", "--output", str(out), "--json")
    )
    assert report["photographs"] == 20
    assert len(report["rows"]) == 2 * len(report["groups"]) == 2 * 18
    proposal = report["proposal"]
    assert proposal["reached"]
    assert proposal["share_of_dense"] <= 0.62  # counted on the same few photographs
    assert proposal["method"]["density"].keys() <= report["groups"].keys()
    assert proposal["recipe"].startswith("method: {name: fbs, ")
    assert sorted(path.name for path in out.iterdir()) == ["sensitivity.csv", "sensitivity.png"]
