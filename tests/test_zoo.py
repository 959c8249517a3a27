"""Shipped models: definitions, records, and that records tell the truth about the weights."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file
from torch import nn

import thrifty
from thrifty.data import sources
from thrifty.data.loader import EvaluationLoader
from thrifty.engine import Engine
from thrifty.errors import CheckpointError, ThriftyError
from thrifty.files import sha256
from thrifty.program_file import load_program, save_program
from thrifty.train.recipe import load_recipe, shipped_recipes
from thrifty.zoo import store
from thrifty.zoo.compilation import program_of
from thrifty.zoo.nets import NETS, build
from thrifty.zoo.programs import read_program
from thrifty.zoo.records import PROGRAMS, WEIGHTS
from thrifty.zoo.resolve import build_net
from thrifty.zoo.store import ModelCard, find_weights, load_model, read_card, save_model

CARD = ModelCard("resnet20", {}, None, tuple("abcdefghij"), 32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize(
    ("name", "millions", "parameters"),
    [
        ("mcifarnet", 174.30, None),
        ("resnet20", 40.55, 269_722),
        ("resnet32", 68.86, 464_154),
        ("resnet56", 125.49, 853_018),
        ("vgg16", 313.20, None),
    ],
)
def test_definitions_have_the_published_size(name: str, millions: float, parameters: int | None) -> None:
    model = build(name)
    count = thrifty.count_macs(model, torch.zeros(1, 3, 32, 32))
    assert count.mean / 1e6 == pytest.approx(millions, abs=0.01)
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_definition_takes_the_number_of_classes() -> None:
    for name in NETS:
        assert build(name, classes=7).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(ThriftyError, match="does not take"):
        build("vgg16", colour="red")
    with pytest.raises(ThriftyError, match="no network 'nix'"):
        build_net("nix")


@pytest.mark.parametrize("record", thrifty.zoo.records(), ids=lambda record: record.name)
def test_a_record_describes_its_weights(record: thrifty.zoo.Record) -> None:
    assert sha256(record.path) == record.sha256
    assert record.path.stat().st_size <= 6 * 2**20
    model = thrifty.zoo.load(record.name)
    assert sum(p.numel() for p in model.parameters()) == record.parameters
    assert isinstance(model, thrifty.Dynamic) == (record.method is not None)
    card = read_card(record.path)
    x = torch.randn(8, 3, card.size, card.size, generator=torch.Generator().manual_seed(0))
    assert int(thrifty.count_macs(build(card.net, **card.arguments), x).total[0]) == record.dense_macs
    assert record.recipe in shipped_recipes()
    assert set(record.lineage) <= set(shipped_recipes())
    recipe = load_recipe(record.recipe)
    assert (recipe.epochs, recipe.seed, recipe.model.net) == (record.epochs, record.seed, record.net)
    assert record.total_epochs == record.epochs + sum(load_recipe(name).epochs for name in record.lineage)


def test_all_that_ships_is_small() -> None:
    files = [file for folder in (WEIGHTS, PROGRAMS) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 40 * 2**20


@pytest.mark.parametrize("record", thrifty.zoo.records(), ids=lambda record: record.name)
def test_a_program_is_that_of_the_weights(record: thrifty.zoo.Record) -> None:
    assert sha256(record.program) == record.program_sha256
    shipped, made = read_program(record.name), program_of(*load_model(record.name))
    assert (shipped.classes, shipped.preprocessing) == (made.classes, made.preprocessing)
    assert str(shipped) == str(made)
    assert sum(shipped.macs().values()) == record.dense_macs
    for name, tensor in made.tensors.items():
        np.testing.assert_allclose(shipped.tensors[name], tensor, rtol=1e-5, atol=1e-7)


def test_load_takes_the_name_of_a_model_and_checks_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert thrifty.load("resnet20-cifar10-fbs").program.gated
    with pytest.raises(ThriftyError, match="nothing"):
        thrifty.load("nothing")
    monkeypatch.setattr(sys.modules["thrifty.zoo.records"], "PROGRAMS", tmp_path)
    with pytest.raises(CheckpointError, match="no compiled program"):
        thrifty.load("resnet20-cifar10")
    (tmp_path / "resnet20-cifar10.thrifty").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="not the file that its record describes"):
        thrifty.load("resnet20-cifar10")


@pytest.mark.parametrize("record", thrifty.zoo.records(), ids=lambda record: record.name)
def test_accuracy_on_the_sample_is_that_of_the_record(record: thrifty.zoo.Record) -> None:
    model, card = load_model(record.name)
    evaluation = thrifty.evaluate(model, EvaluationLoader(sources.load("sample"), card.mean, card.std))
    spread = (record.accuracy * (1 - record.accuracy) / 1000) ** 0.5
    assert abs(evaluation.accuracy - record.accuracy) < 3 * spread
    assert evaluation.macs.mean == pytest.approx(record.macs, rel=0.01)


def test_dynamic_models_are_judged_beside_dense_ones_of_as_many_epochs() -> None:
    records = thrifty.zoo.records()
    dense = {(record.net, record.total_epochs): record for record in records if record.method is None}
    dynamic = [record for record in records if record.method is not None]
    assert {record.method["name"] for record in dynamic if record.method} >= {"fbs", "antidote"}
    for record in dynamic:
        assert record.macs < 0.65 * record.dense_macs
        # One set of weights for all budgets is trained longer than a model for one, and compared with several.
        assert (record.net, record.total_epochs) in dense or (record.method or {}).get("one_for_all")


@pytest.mark.parametrize("record", thrifty.zoo.records(), ids=lambda record: record.name)
def test_a_curve_says_what_lower_budgets_reach(record: thrifty.zoo.Record) -> None:
    adjustable = record.method is not None and (record.method["name"] == "lcnet" or record.method.get("one_for_all"))
    assert bool(record.curve) == bool(adjustable)
    for point, lower in itertools.pairwise(record.curve):
        assert lower["macs"] < point["macs"] <= 1.05 * point["budget"] * record.dense_macs
        assert lower["budget"] < point["budget"]
    assert all(0 < point["accuracy"] < 1 for point in record.curve)


def test_every_file_of_weights_has_its_record() -> None:
    stems = {path.stem for path in WEIGHTS.glob("*.safetensors")}
    assert stems == {record.name for record in thrifty.zoo.records()}


def test_the_sample_is_balanced() -> None:
    images = sources.load("sample")
    assert len(images) == 1000
    assert images.labels.bincount().tolist() == [100] * 10


def test_a_model_survives_the_file(tmp_path: Path) -> None:
    model = build("resnet20")
    path = tmp_path / "m.safetensors"
    save_model(path, model, CARD)
    loaded, card = load_model(path)
    assert card == CARD
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    x = torch.randn(4, 3, 32, 32)
    method = thrifty.FBS(density={"layer1*": 0.5, "layer2*": 0.25}, where="layer[12]*")
    dynamic = thrifty.convert(model, method, x)
    nn.init.normal_(dynamic.gates()["layer1.0.conv1"].predictor.weight)
    settings = json.loads(json.dumps(method.settings()))
    save_model(path, dynamic, ModelCard(**{**CARD.__dict__, "method": settings}))
    loaded, card = load_model(path)
    assert torch.equal(loaded(x), dynamic.eval()(x))
    assert loaded.method == method


def test_filters_and_matrices_may_be_stored_in_half_the_size(tmp_path: Path) -> None:
    model = thrifty.convert(build("resnet20"), thrifty.AntiDote(channels=0.5), torch.zeros(1, 3, 32, 32))
    settings = json.loads(json.dumps(model.method.settings()))
    card = ModelCard(**{**CARD.__dict__, "method": settings})
    whole, path = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_model(whole, model, card)
    save_model(path, model, card, half=True)
    assert path.stat().st_size < 0.6 * whole.stat().st_size
    loaded, _ = load_model(path)
    for name, tensor in model.state_dict().items():
        expected = tensor.half().to(tensor.dtype) if tensor.ndim > 1 else tensor
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, expected)
    program = program_of(loaded, card)
    beside = tmp_path / "p.thrifty"
    save_program(program, beside, load_file(path))
    assert beside.stat().st_size < 0.1 * path.stat().st_size
    x = torch.randn(2, 3, 32, 32)
    answers = [Engine(each)(x) for each in (program, load_program(beside, path))]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = build("resnet20")
    save_model(path, model, CARD)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"damaged|not a model"):
            load_model(path)
    path.write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError):
        load_model(path)
    wrong = {
        "net": ["a"],
        "arguments": {"classes": -5},
        "method": {"name": ["fbs"]},
        "size": "x",
        "mean": (float("nan"),) * 3,
    }
    for field, value in wrong.items():
        save_model(path, model, ModelCard(**{**CARD.__dict__, field: value}))
        with pytest.raises(ThriftyError):
            load_model(path)
    save_model(path, model, ModelCard(**{**CARD.__dict__, "net": "os:system", "arguments": {"command": "true"}}))
    with pytest.raises(CheckpointError, match="code of your own"):
        load_model(path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(path, build("resnet32"))
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    save_model(path, model, CARD)
    with pytest.raises(CheckpointError, match="NaN"):
        load_model(path)
    for number, card in enumerate(("5", '"a"', "[" * 100_000)):
        foreign = tmp_path / f"card{number}.safetensors"
        safetensors.torch.save_file({"a": torch.zeros(1)}, foreign, {"thrifty-model": card})
        with pytest.raises(CheckpointError, match="is not a model file or is damaged"):
            read_card(foreign)
    with pytest.raises(CheckpointError, match="no model nothing"):
        find_weights("nothing")
    with pytest.raises(CheckpointError, match="give its name, resnet20-cifar10, instead of the path"):
        find_weights("runs/resnet20-cifar10/nowhere.safetensors")
    with pytest.raises(CheckpointError, match="no model 'nothing'"):
        thrifty.zoo.load("nothing")


def test_trained_torchvision_and_timm_networks_are_rebuilt_from_their_files(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    x = torch.randn(2, 3, 32, 32)
    for net, key in (("torchvision:resnet18", "num_classes"), ("timm:resnet10t", "num_classes")):
        arguments = {key: 10}
        model = build_net(net, **arguments).eval()
        save_model(path, model, ModelCard(**{**CARD.__dict__, "net": net, "arguments": arguments}))
        loaded, _ = load_model(path)
        assert torch.equal(loaded(x), model(x))
        hostile = arguments | {"weights" if "torchvision" in net else "checkpoint_path": "/etc/passwd"}
        save_model(path, model, ModelCard(**{**CARD.__dict__, "net": net, "arguments": hostile}))
        with pytest.raises(ThriftyError, match="made with fresh weights"):
            load_model(path)
    save_model(path, model, ModelCard(**{**CARD.__dict__, "net": "timm:hf-hub:some/one", "arguments": {}}))
    with pytest.raises(ThriftyError, match="timm has no network"):
        load_model(path)


def test_a_newer_files_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    monkeypatch.setattr(store, "FORMAT", 99)
    save_model(path, build("resnet20"), CARD)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="newer thrifty"):
        read_card(path)
