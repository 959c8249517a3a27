"""One training run in one process: losses, groups, average, schedule, what is written, and how it fails."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_support
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from train_support import (
    CLASSES,
    FBS,
    Watcher,
    everything,
    make_recipe,
    result,
    steady,
    tiny,
    write_folder,
)

from thrifty.dynamic import Dynamic
from thrifty.errors import CheckpointError, DataError, NonFiniteError, RecipeError, ThriftyError
from thrifty.gates import Gate
from thrifty.train import checkpoint
from thrifty.train.finite import first_non_finite
from thrifty.train.losses import classification_loss, distillation_loss
from thrifty.train.optimiser import make_average, make_optimiser
from thrifty.train.recipe import OptimiserSection, load_recipe
from thrifty.train.schedule import START, LearningRate
from thrifty.train.trainer import Trainer
from thrifty.zoo.nets import build
from thrifty.zoo.store import load_model, save_model


@pytest.fixture(autouse=True)
def _threads_and_denormals_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert torch.tensor(2e-38).div(4) != 0, "flushing of denormals was left on"


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_run_learns_and_writes_its_files(root, tmp_path):
    watcher = Watcher()
    recipe = make_recipe(root, epochs=6)
    outcome = Trainer(recipe, tmp_path / "run", observer=watcher).run()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "log.csv",
        "model.safetensors",
        "recipe.yaml",
        "tensorboard",
    ]
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    assert outcome.last == watcher.rows[-1]
    assert watcher.rows[-1]["loss"] < watcher.rows[0]["loss"]
    assert watcher.rows[-1]["accuracy"] > 0.8
    assert [row["epoch"] for row in watcher.rows] == [1, 2, 3, 4, 5, 6]
    assert [(at.epoch, at.step) for at, _ in watcher.steps] == [(e, s) for e in range(6) for s in range(1, 6)]
    last, status = watcher.steps[-1]
    assert last.seen == 40
    assert status == {"loss": watcher.rows[-1]["loss"], "accuracy": watcher.rows[-1]["accuracy"]}
    first, status = watcher.steps[0]
    assert (first.seen, status["loss"]) == (8, first.loss_sum)


def test_curves_are_those_of_the_log(root, tmp_path):
    recipe = make_recipe(root, checkpoint={"epochs": 1})

    def stop(position):
        if (position.epoch, position.step) == (2, 1):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        Trainer(recipe, tmp_path / "run", observer=Watcher(stop)).run()
    Trainer(recipe, tmp_path / "run", resume=True).run()
    rows = result(tmp_path / "run")[1]
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for key in ("loss", "validation_accuracy", "learning_rate"):
        points = curves.Scalars(key)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx([float(row[key]) for row in rows])


def test_the_weights_written_are_the_model_evaluated(root, teacher, tmp_path):
    trainer = Trainer(everything(root, teacher), tmp_path / "run")
    outcome = trainer.run()
    model, card = load_model(outcome.weights, net=tiny())
    assert card.classes == CLASSES
    assert (card.size, card.method["name"]) == (8, "fbs")
    assert isinstance(model, Dynamic)
    average = trainer.average.module.eval()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x), average(x), rtol=1e-5, atol=1e-6)
    assert model.density == outcome.last["density"] == 0.5
    assert not torch.allclose(trainer.model.eval()(x), average(x))


@pytest.mark.parametrize("share", [0.0, 0.03])
def test_validation_of_no_and_of_one_photograph(root, tmp_path, share):
    outcome = Trainer(make_recipe(root, epochs=1, data={"validation": share}), tmp_path / "run").run()
    assert ("validation_accuracy" in outcome.last) == ("validation_macs" in outcome.last) == (share > 0)


def test_a_descent_over_the_whole_run_arrives(root, tmp_path):
    method = FBS | {"descent": [0.0, 1.0]}
    outcome = Trainer(make_recipe(root, method=method), tmp_path / "run").run()
    assert outcome.last["density"] == 0.5


def test_a_dynamic_run_starts_where_the_dense_one_ended(teacher, tmp_path):
    root = write_folder(tmp_path / "photographs", size=8)
    model = {"net": "resnet20", "arguments": {"classes": 3}, "weights": str(teacher)}
    method = {"name": "fbs", "density": 1.0}
    trainer = Trainer(make_recipe(root, model=model, method=method), tmp_path / "run")
    dense, _ = load_model(teacher)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(trainer.model.eval()(x), dense(x), rtol=1e-4, atol=1e-4)
    assert trainer.model.gates()


def test_a_full_disk_leaves_the_last_checkpoint(root, tmp_path, monkeypatch):
    recipe = make_recipe(root)
    path = tmp_path / "run" / "checkpoint.safetensors"

    def fill(_tensors, target, metadata):
        del metadata
        if path.exists():
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return save(_tensors, target, {"thrifty-run": "{}"})

    save = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(ThriftyError, match=r"cannot write .*checkpoint\.safetensors: No space left"):
        Trainer(recipe, tmp_path / "run").run()
    assert path.stat().st_size > 100
    assert not list((tmp_path / "run").glob(".*"))


# --------------------------------------------------------------------------------------------------------- failures


def poisoned(layer: int, when: int) -> nn.Module:
    """`tiny` whose layer gives NaN from its call `when` in training on."""
    net = tiny()
    calls = []

    def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if module.training:
            calls.append(0)
        return output * math.nan if module.training and len(calls) > when else output

    net[layer].register_forward_hook(hook)
    return net


def exploding() -> nn.Module:
    """`tiny` with an infinite gradient in its tenth step, whose loss is finite."""
    net = tiny()
    calls = []

    def hook(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.extend([0] * module.training)
        if module.training and len(calls) == 10:
            output.register_hook(lambda grad: grad * math.inf)
        return output

    net[0].register_forward_hook(hook)
    return net


@pytest.fixture(autouse=True)
def _nets(monkeypatch):
    for net in (poisoned, exploding):
        monkeypatch.setattr(train_support, net.__name__, net, raising=False)


@pytest.mark.parametrize("layer", [0, 4, 11])
def test_nan_names_step_and_layer_and_leaves_the_checkpoint(root, tmp_path, layer):
    model = {"net": "train_support:poisoned", "arguments": {"layer": layer, "when": 7}}
    path = tmp_path / "run" / "checkpoint.safetensors"
    with pytest.raises(NonFiniteError, match=rf"loss is nan at epoch 2, step 3: .*output of {layer}\. The last"):
        Trainer(make_recipe(root, model=model, checkpoint={"minutes": 1e-9}), tmp_path / "run").run()
    _, position, _ = checkpoint.peek(path)
    assert (position.epoch, position.step) == (1, 2)
    assert all(tensor.isfinite().all() for tensor in train_support.load_file(path).values())


def test_weights_that_broke_in_the_last_step_are_not_saved(root, tmp_path):
    trainer = Trainer(make_recipe(root, epochs=2, model={"net": "train_support:exploding"}), tmp_path / "run")
    with pytest.raises(NonFiniteError, match=r"^0\.weight has NaN or infinite values after epoch 2, step 5\."):
        trainer.run()
    _, position, rows = checkpoint.peek(tmp_path / "run" / "checkpoint.safetensors")
    assert (position.epoch, len(rows)) == (1, 1)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_where_nan_comes_from():
    net = tiny()
    x = torch.randn(4, 3, 8, 8)
    assert "loss is not" in first_non_finite(net, x)
    assert first_non_finite(net, x * math.inf) == "the input has it already"
    net[3].bias.data[2] = math.nan
    assert first_non_finite(net, x) == "3.bias has it"
    assert not net[0]._forward_hooks


def test_a_photograph_that_breaks_stops_the_run_with_its_name(root, tmp_path, monkeypatch):
    monkeypatch.setattr("thrifty.data.images.MEMORY_LIMIT", 0)
    root = write_folder(tmp_path / "photographs")
    trainer = Trainer(make_recipe(root, data={"validation": 0.0}), tmp_path / "run")
    victim = root / "train" / "red" / "003.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(DataError, match=r"red/003\.png cannot be read"):
        trainer.run()


def two_outputs() -> nn.Module:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny()

        def forward(self, x: torch.Tensor) -> object:
            return (self.net(x), x) if self.training else self.net(x)

    return Two()


def maps() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def picky() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("net", "error", "says"),
    [
        ("two_outputs", RecipeError, "must return logits .* but returns a tuple"),
        ("maps", RecipeError, r"must return logits .* but returns \(1, 3, 8, 8\)"),
        ("picky", RecipeError, "does not take photographs of 8 px: .*Set data.size"),
    ],
)
def test_networks_that_do_not_fit(root, tmp_path, monkeypatch, net, error, says):
    monkeypatch.setattr(train_support, net, globals()[net], raising=False)
    with pytest.raises(error, match=says):
        Trainer(make_recipe(root, model={"net": f"train_support:{net}"}), tmp_path / "run").run()


def test_too_many_logits(root, tmp_path):
    model = {"arguments": {"classes": 5}}
    with pytest.raises(CheckpointError, match="gives 5 logits, the data has 3 classes"):
        Trainer(make_recipe(root, model={"net": "train_support:tiny"} | model), tmp_path / "run")


def test_a_teacher_of_other_data_is_refused(root, teacher, tmp_path):
    _, card = load_model(teacher)
    other = tmp_path / "other.safetensors"
    for changed in (
        {"classes": tuple("abcd"), "arguments": {"classes": 4}},
        {"classes": card.classes[::-1]},
        {"mean": (0.1, 0.2, 0.3)},
    ):
        changed_card = type(card)(**(vars(card) | changed))
        save_model(other, build("resnet20", **changed_card.arguments), changed_card)
        with pytest.raises(CheckpointError, match="Choose a teacher that was trained"):
            Trainer(make_recipe(root, distill={"teacher": str(other)}), tmp_path / "run")


def test_fewer_photographs_than_a_batch(root, tmp_path):
    with pytest.raises(DataError, match="40 photographs don't fill one batch of 41"):
        Trainer(make_recipe(root, batch_size=41), tmp_path / "run")


# ---------------------------------------------------------------------------------------------------- optimiser, loss


def test_no_weight_decay_on_norms_biases_and_gates(root, tmp_path):
    section = {"learning_rate": 0.05, "weight_decay": 0.01, "gate_learning_rate": 0.25}
    trainer = Trainer(make_recipe(root, method=FBS, optimiser=section), tmp_path / "run")
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = {}
    for group in trainer.optimiser.param_groups:
        for parameter in group["params"]:
            groups[names[id(parameter)]] = (group["weight_decay"], group["scale"])
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert groups.keys() | frozen == set(names.values())
    gates = {n for n, m in trainer.model.named_modules() if isinstance(m, Gate)}
    assert len(gates) == 3
    decayed = {name for name, (decay, _) in groups.items() if decay}
    assert decayed == {"0.conv.weight", "3.conv.weight", "7.conv.weight", "11.weight"}
    for name, (decay, scale) in groups.items():
        gated = any(name.startswith(f"{gate}.") for gate in gates)
        assert (decay, scale) == (0.01 if name in decayed else 0.0, 0.25 if gated else 1.0)


def test_sgd_steps_as_its_formula_says():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    optimiser = make_optimiser(model, OptimiserSection(learning_rate=0.1, momentum=0.5, weight_decay=0.01))
    velocity = torch.zeros_like(weight)
    for _ in range(3):
        optimiser.zero_grad()
        model[0].weight.sum().backward()
        optimiser.step()
        gradient = 1 + 0.01 * weight
        velocity = 0.5 * velocity + gradient
        weight = weight - 0.1 * (gradient + 0.5 * velocity)
    torch.testing.assert_close(model[0].weight.detach(), weight)
    assert torch.equal(model[0].bias.detach(), bias)


def test_the_average_follows_weights_and_copies_counts():
    model = nn.BatchNorm2d(3)
    model.register_buffer("winners", torch.tensor(8))
    average = make_average(model, 0.9)
    expected = None
    for step in range(4):
        with torch.no_grad():
            model.weight += 1
            model.running_mean.fill_(step)
            model.winners.fill_(8 - step)
        average.update_parameters(model)
        now = torch.tensor([model.weight[0].item(), float(step)])
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        assert average.module.winners == 8 - step
    torch.testing.assert_close(average.module.weight.detach(), expected[0].expand(3))
    torch.testing.assert_close(average.module.running_mean, expected[1].expand(3))


@steady
@given(st.integers(0, 5), st.integers(2, 6), st.integers(1, 5), st.floats(0, 0.9), st.floats(0.5, 8))
def test_losses_are_those_of_their_formulas(seed, classes, count, smoothing, temperature):
    random = np.random.default_rng(seed)
    logits, taught = random.normal(0, 3, (2, count, classes))
    labels = random.integers(0, classes, count)

    def log_softmax(z):
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    target = np.full((count, classes), smoothing / classes)
    target[np.arange(count), labels] += 1 - smoothing
    expected = -(target * log_softmax(logits)).sum(1).mean()
    given_logits = torch.from_numpy(logits)
    found = classification_loss(given_logits, torch.from_numpy(labels), smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    teacher, student = log_softmax(taught / temperature), log_softmax(logits / temperature)
    expected = temperature**2 * (np.exp(teacher) * (teacher - student)).sum(1).mean()
    found = distillation_loss(given_logits, torch.from_numpy(taught), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_the_first_loss_of_a_run_is_the_sum_of_its_parts(root, teacher, tmp_path):
    recipe = everything(root, teacher, model={"net": "train_support:tiny", "arguments": {"dropout": 0.0}})
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"weight": 0.3})})
    watcher = Watcher()
    trainer = Trainer(recipe, tmp_path / "run", observer=watcher)
    x, y = next(iter(trainer.loader.epoch(0)))
    taught, _ = load_model(teacher)
    trainer.method.advance(trainer.model, 0.0)
    logits = trainer.model(x)
    hard = F.cross_entropy(logits, y, label_smoothing=0.1)
    soft = 4 * F.kl_div((logits / 2).log_softmax(1), (taught(x) / 2).softmax(1), reduction="batchmean")
    expected = 0.7 * hard + 0.3 * soft + trainer.model.regularization()
    assert trainer.model.regularization() > 0
    trainer.run()
    assert watcher.steps[0][1]["loss"] == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ learning rate


@steady
@given(st.sampled_from(["cosine", "onecycle", "constant"]), st.integers(1, 400), st.integers(0, 500))
def test_the_rate_rises_to_its_peak_and_falls(kind, steps, warmup):
    rate = LearningRate(kind, steps, warmup)
    rates = [rate(step) for step in range(steps)]
    assert all(0 <= value <= 1 + 1e-12 for value in rates)
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    if 0 < warmup <= steps:
        assert rates[warmup - 1] == pytest.approx(1)
        assert rates[0] > START or warmup == 1
    if fall:
        assert fall[0] == pytest.approx(1)
        assert fall[-1] == pytest.approx(1 if kind == "constant" else (1 - math.cos(math.pi / len(fall))) / 2)


def test_the_rate_reaches_the_log(root, tmp_path):
    recipe = make_recipe(root, schedule={"kind": "cosine", "warmup": 0.0}, optimiser={"learning_rate": 0.2})
    Trainer(recipe, tmp_path / "run").run()
    rows = result(tmp_path / "run")[1]
    found = [float(row["learning_rate"]) for row in rows]
    assert found == pytest.approx([0.1 * (1 + math.cos(math.pi * step / 15)) for step in (4, 9, 14)])


# -------------------------------------------------------------------------------------------------------- checkpoints


class TestCheckpointFiles:
    def saved(self, directory: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
        model = tiny()
        optimiser = make_optimiser(model, OptimiserSection())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        optimiser.step()
        path = directory / "checkpoint.safetensors"
        parts = {"recipe": {"name": "x"}, "position": checkpoint.Position(1, 2, 3.5, 0.1 + 0.2, 4, 5)}
        checkpoint.save(path, **parts, rows=[{"epoch": 1}], modules={"model": model}, optimiser=optimiser)
        return path, model, optimiser

    def test_everything_comes_back(self, tmp_path):
        path, model, optimiser = self.saved(tmp_path)
        recipe, position, rows = checkpoint.peek(path)
        assert (recipe, rows) == ({"name": "x"}, [{"epoch": 1}])
        assert position == checkpoint.Position(1, 2, 3.5, 0.1 + 0.2, 4, 5)
        other = tiny().to(memory_format=torch.channels_last)
        other_optimiser = make_optimiser(other, OptimiserSection())
        checkpoint.restore(path, {"model": other}, other_optimiser)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
        assert other[0].weight.is_contiguous(memory_format=torch.channels_last)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            found = other_optimiser.state[q]["momentum_buffer"]
            assert torch.equal(found, optimiser.state[p]["momentum_buffer"])
            assert found.stride() == q.stride()

    def test_any_truncation_is_an_error(self, tmp_path):
        path, model, optimiser = self.saved(tmp_path)
        whole = path.read_bytes()
        for length in (0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"damaged.*Remove it"):
                checkpoint.peek(path)
            with pytest.raises(CheckpointError, match="damaged"):
                checkpoint.restore(path, {"model": model}, optimiser)

    @settings(steady, max_examples=25)
    @given(data=st.data())
    def test_a_changed_byte_is_an_error_or_harmless(self, tmp_path_factory, data):
        directory = tmp_path_factory.mktemp("changed")
        path, model, optimiser = self.saved(directory)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, min(len(content), 3000) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            _, position, rows = checkpoint.peek(path)
            checkpoint.restore(path, {"model": model}, optimiser)
        except CheckpointError:
            return
        assert isinstance(position, checkpoint.Position)
        assert all(isinstance(row, dict) for row in rows)

    @pytest.mark.parametrize(
        "state",
        [
            "nonsense",
            "[]",
            "5",
            "[" * 100_000,
            '{"format": 1}',
            '{"format": "1", "recipe": {}, "position": {}, "rows": []}',
            '{"format": 1, "recipe": [], "position": {}, "rows": []}',
            '{"format": 1, "recipe": {}, "position": {"epoch": "1"}, "rows": []}',
            '{"format": 1, "recipe": {}, "position": {"epoch": -1}, "rows": []}',
            '{"format": 1, "recipe": {}, "position": {"step": 1.5}, "rows": []}',
            '{"format": 1, "recipe": {}, "position": {"other": 1}, "rows": []}',
            '{"format": 1, "recipe": {}, "position": {}, "rows": [1]}',
            '{"format": 1, "recipe": {}, "position": {}, "rows": 3}',
        ],
    )
    def test_hostile_states(self, tmp_path, state):
        path = tmp_path / "checkpoint.safetensors"
        checkpoint.save_file({"a": torch.zeros(1)}, path, {"thrifty-run": state})
        with pytest.raises(CheckpointError, match="not a checkpoint or is damaged"):
            checkpoint.peek(path)

    def test_newer_formats_say_so(self, tmp_path):
        path = tmp_path / "checkpoint.safetensors"
        checkpoint.save_file({"a": torch.zeros(1)}, path, {"thrifty-run": '{"format": 99}'})
        with pytest.raises(CheckpointError, match=r"newer thrifty \(format 99\)"):
            checkpoint.peek(path)

    def test_hostile_tensors(self, tmp_path):
        path, model, optimiser = self.saved(tmp_path)
        whole = train_support.load_file(path)
        for changes, says in (
            ({"model.0.weight": torch.full((8, 3, 3, 3), math.nan)}, "NaN"),
            ({"model.0.weight": torch.zeros(1)}, "belongs to another model: .*0.weight"),
            ({"model.extra": torch.zeros(1)}, "belongs to another model: .*extra"),
            ({"momentum.0": torch.zeros(1)}, "momentum 0 has shape"),
            ({"momentum.99": torch.zeros(1)}, "momentum 99 of no parameter"),
        ):
            checkpoint.save_file(whole | changes, path)
            with pytest.raises(CheckpointError, match=says):
                checkpoint.restore(path, {"model": model}, optimiser)


def test_a_run_of_another_net_is_not_resumed(root, tmp_path):
    recipe = make_recipe(root, epochs=1)
    Trainer(recipe, tmp_path / "run").run()
    path = tmp_path / "run" / "checkpoint.safetensors"
    tensors = train_support.load_file(path)
    tensors["model.0.weight"] = torch.zeros(4, 3, 3, 3)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    checkpoint.save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        Trainer(recipe, tmp_path / "run", resume=True)


def test_user_photographs_of_all_sizes_train(tmp_path):
    random = np.random.default_rng(1)
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            height, width = random.integers(9, 40, 2)
            pixels = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.jpg")
    recipe = make_recipe(tmp_path, epochs=1, data={"size": 12, "validation": 0.2})
    outcome = Trainer(recipe, tmp_path / "run").run()
    assert load_model(outcome.weights, net=tiny())[1].size == 12
