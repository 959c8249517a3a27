"""Recipes: what is accepted, and what is refused in one clear line."""

from __future__ import annotations

import pytest
import yaml

from thrifty.errors import RecipeError
from thrifty.methods import FBS
from thrifty.train.recipe import Recipe, load_recipe, shipped_recipes

PLAIN = """
name: plain
model: {net: resnet20}
data: {source: folder, root: photographs}
epochs: 3
"""


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN, encoding="utf-8")
    return path


def refusal(source, *changes: str) -> str:
    with pytest.raises(RecipeError) as found:
        load_recipe(source, changes)
    message = str(found.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_named_after_their_files(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert (recipe.method_config() is None) == (recipe.method is None)


def test_there_are_shipped_recipes():
    assert {"resnet20-cifar10-base", "mcifarnet-cifar10-base"} <= set(shipped_recipes())


def test_defaults_and_round_trip(plain, tmp_path):
    recipe = load_recipe(plain)
    assert (recipe.batch_size, recipe.optimiser.nesterov, recipe.data.mean[0]) == (128, True, 0.4914)
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("5E-4", 5e-4), ("1e2", 100.0), ("5.e-1", 0.5), (".5e1", 5.0), ("1", 1.0), ("0.25", 0.25)],
)
def test_numbers(plain, text, value):
    found = load_recipe(plain, [f"optimiser.learning_rate={text}"]).optimiser.learning_rate
    assert (type(found), found) == (float, value)
    plain.write_text(PLAIN + f"optimiser: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert load_recipe(plain).optimiser.learning_rate == value


def test_changes_lie_on_top(plain):
    changes = [
        "epochs=7",
        "optimiser.momentum=0.5",
        "distill.teacher=x",
        "data.mean=[0.1, 0.2, 0.3]",
        "data.flip=false",
    ]
    recipe = load_recipe(plain, [*changes, "method={name: fbs}", "method.density=0.7", "name=a=b".replace("=b", "-b")])
    assert (recipe.epochs, recipe.optimiser.momentum, recipe.distill.teacher) == (7, 0.5, "x")
    assert (recipe.data.mean, recipe.data.flip, recipe.name) == ((0.1, 0.2, 0.3), False, "a-b")
    assert recipe.method_config() == FBS(density=0.7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("learning=1", "unknown key learning (known here: name, model, data,"),
        ("optimiser.rate=1", "unknown key optimiser.rate (known here: learning_rate, momentum"),
        ("model.depth=1", "unknown key model.depth (known here: net, arguments, weights)"),
        ("distill={teacher: x, heat: 2}", "unknown key distill.heat (known here: teacher, weight, temperature)"),
        ("checkpoint.hours=1", "unknown key checkpoint.hours"),
        ("epochs=three", "epochs: input should be a valid integer, not 'three'"),
        ("epochs=2.5", "epochs: "),
        ("epochs=2.0", "epochs: input should be a valid integer, not 2.0"),
        ("epochs=true", "epochs: input should be a valid integer, not True"),
        ("epochs='3'", "epochs: input should be a valid integer, not '3'"),
        ("epochs=", "epochs: input should be a valid integer, not None"),
        ("epochs=0", "epochs: input should be greater than or equal to 1, not 0"),
        ("epochs=[1]", "epochs: "),
        ("name=../up", "name: "),
        ("seed=-1", "seed: "),
        ("batch_size=0", "batch_size: "),
        ("label_smoothing=1", "label_smoothing: input should be less than 1"),
        ("ema=1.0", "ema: "),
        ("optimiser=5", "optimiser: input should be a valid dictionary"),
        ("optimiser.learning_rate=0", "optimiser.learning_rate: input should be greater than 0"),
        ("optimiser.learning_rate=.inf", "optimiser.learning_rate: input should be a finite number"),
        ("optimiser.learning_rate=1e999", "optimiser.learning_rate: input should be a finite number"),
        ("optimiser.weight_decay=.nan", "optimiser.weight_decay: "),
        ("optimiser.nesterov=1", "optimiser.nesterov: "),
        ("optimiser.momentum=0", "optimiser: nesterov needs momentum above 0; set nesterov: false"),
        ("schedule.kind=step", "schedule.kind: input should be 'cosine', 'onecycle' or 'constant', not 'step'"),
        ("precision=half", "precision: input should be 'float32' or 'bfloat16', not 'half'"),
        ("data.source=imagenet", "data.source: "),
        ("data.mean=[1, 2]", "data.mean"),
        ("data.std=[1, 2, 0]", "data.std.2: input should be greater than 0"),
        ("data.validation=1", "data.validation: "),
        ("checkpoint.minutes=0", "checkpoint.minutes: "),
        ("distill.weight=0.5", "distill.teacher: field required"),
        ("method=fbs", "method: input should be a valid dictionary"),
        ("method.density=0.5", "method.name is None; choose one of: fbs"),
        ("method={name: fsb}", "method.name is 'fsb'; choose one of: fbs"),
        ("method={name: [fbs]}", "method.name is ['fbs']; choose one of: fbs"),
        ("method={name: fbs, sparsity: 1}", "has no setting sparsity. It has: where, density"),
        ("method={name: fbs, density: 2}", "density is 2"),
        ("method={name: fbs, density: many}", "method.density: input should be a valid number, not 'many'"),
        ("method={name: fbs, density: {layer1: x}}", "method.density"),
        ("method={name: fbs, step: x}", "method.step: input should be a valid number, not 'x'"),
        ("method={name: fbs, l1: .nan}", "method.l1: input should be a finite number"),
        ("method={name: fbs, descent: 5}", "method.descent: "),
        ("method={name: fbs, descent: [0.9, 0.1]}", "descent"),
        ("method={name: fbs, init: fancy}", "method.init: input should be 'preserve' or 'paper', not 'fancy'"),
        ("method={name: fbs, version: two}", "method.version: input should be a valid integer"),
        ("method={name: fbs, version: 99}", "need a newer thrifty"),
    ],
)
def test_wrong_settings(plain, change, says):
    message = refusal(plain, change)
    assert message.startswith(f"recipe {plain}: ")
    assert says in message


def test_every_problem_is_told(plain):
    message = refusal(plain, "epochs=0", "optimiser.rate=1", "data.root=3")
    assert all(part in message for part in ("epochs: ", "unknown key optimiser.rate", "data.root: "))


@pytest.mark.parametrize("key", ["name", "model", "data", "epochs"])
def test_what_a_recipe_must_have(plain, key):
    lines = [line for line in PLAIN.splitlines() if not line.startswith(key)]
    plain.write_text("\n".join(lines), encoding="utf-8")
    assert f"{key}: field required" in refusal(plain)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epochs", "must have the form key=value"),
        ("=3", "must have the form key=value"),
        ("epochs.count=3", "epochs has no settings inside it"),
        ("data.mean=[1, 2", "is not a valid YAML value"),
        ("data={a: 1, a: 2}", "is not a valid YAML value"),
    ],
)
def test_wrong_changes(plain, change, says):
    assert says in refusal(plain, change)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "must be a mapping of settings, but is a NoneType"),
        (b"- a\n- b\n", "must be a mapping of settings, but is a list"),
        (b"name: [", "is not valid YAML"),
        (b"name: plain\nname: other\n", "is not valid YAML: name is given twice"),
        (b"model: {net: a, net: b}\n", "net is given twice"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"x: !!python/object/apply:os.system [exit]", "is not valid YAML"),
        (b"[" * 1500, "is not valid YAML"),
        (b"1: 2\n", "1"),
    ],
)
def test_files_that_are_no_recipes(plain, content, says):
    plain.write_bytes(content)
    assert says in refusal(plain)


@pytest.mark.parametrize("source", ["nothing", "no/such.yaml", "x" * 5000])
def test_there_is_no_such_recipe(source):
    message = refusal(source)
    assert "resnet20-cifar10-base" in message or "cannot be read" in message


def test_a_recipe_cannot_be_changed():
    recipe = load_recipe("resnet20-cifar10-base")
    with pytest.raises(ValueError, match="frozen"):
        recipe.epochs = 3
    assert isinstance(recipe, Recipe)
