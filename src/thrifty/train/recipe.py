"""Recipes: everything that decides what a training run computes, in one YAML file, checked before it starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from thrifty.errors import RecipeError, ThriftyError
from thrifty.methods import METHODS, MethodConfig, method_config

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice and 5e-4 is a number, as YAML 1.2 has it (1.1, which PyYAML reads, has not)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The node's mapping; a key that comes twice is an error."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def parse_value(text: str) -> Any:
    """A value as recipes hold it: a number, a text, a list or a mapping in YAML.

    Raises:
        RecipeError: it is no YAML.
    """
    try:
        return _parse(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set: {text!r} is not a valid YAML value.") from None


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The network: a zoo definition or a user's own `module:function`, and what to start from."""

    net: str
    arguments: dict[str, Any] = {}
    weights: str | None = Field(
        None, description="zoo name or safetensors file of a dense or dynamic model to start from"
    )


class DataSection(_Section):
    """The photographs and how they are prepared."""

    source: Literal["folder", "cifar10", "cifar100"]
    root: str
    size: int | None = Field(None, ge=1, description="pixels to bring photographs to; none keeps their size")
    validation: Share = Field(0.05, description="share of the training photographs held out")
    padding: int = Field(4, ge=0, description="pixels around a photograph before its random crop")
    flip: bool = True
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    std: tuple[Positive, Positive, Positive] = (0.2470, 0.2435, 0.2616)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, data: Any) -> Any:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()} if isinstance(data, dict) else data


class OptimiserSection(_Section):
    """SGD with momentum; norms, biases and gates get no weight decay."""

    learning_rate: Positive = 0.1
    momentum: Share = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    gate_learning_rate: NonNegative = Field(
        default=1.0, description="learning rate of gates, as a multiple of the others'"
    )
    clip_norm: Positive | None = None

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> OptimiserSection:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0; set nesterov: false")
        return self


class ScheduleSection(_Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup: NonNegative = Field(default=0.0, description="epochs in which the rate rises from a 25th of its peak")


class DistillSection(_Section):
    """Loss = (1 - weight) * cross-entropy + weight * T² * KL(teacher || student), both softened by temperature T."""

    teacher: str = Field(description="zoo name or safetensors file of a model of the same classes")
    weight: float = Field(0.5, ge=0, le=1)
    temperature: Positive = 2.0


class CheckpointSection(_Section):
    """When the state of the run is saved; whichever comes first."""

    epochs: int = Field(default=1, ge=1)
    minutes: Positive = 10.0


class Recipe(_Section):
    """One training run. `method` holds the settings of a method's config under its `name`, or none for a dense run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelSection
    data: DataSection
    epochs: int = Field(ge=1)
    batch_size: int = Field(128, ge=1, description="photographs in a step, over all processes")
    seed: int = Field(0, ge=0)
    method: dict[str, Any] | None = None
    optimiser: OptimiserSection = OptimiserSection()
    schedule: ScheduleSection = ScheduleSection()
    label_smoothing: Share = 0.0
    distill: DistillSection | None = None
    ema: Share | None = Field(None, description="decay of the moving average of weights that is evaluated and kept")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of layers in a training step; weights, gates and the loss are float32 in either"
    )
    compile: bool = Field(False, description="compile the training step with torch.compile (needs a C++ compiler)")
    threads: int | None = Field(None, ge=1, description="CPU threads of a process; none takes torch's choice")
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _method_is_known(self) -> Recipe:
        if self.method is not None:
            self.method_config()
        return self

    def method_config(self) -> MethodConfig | None:
        """The method's config, or None for a dense run."""
        if self.method is None:
            return None
        settings = dict(self.method)
        name = settings.pop("name", None)
        if not isinstance(name, str) or name not in METHODS:
            raise ValueError(f"method.name is {name!r}; choose one of: {', '.join(METHODS)}")
        _check_types(METHODS[name], settings)
        try:
            return method_config(name, settings)
        except ThriftyError as error:
            raise ValueError(f"method: {str(error).removesuffix('.')}") from error


def load_recipe(source: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the name of a shipped one or a YAML file, with `key.key=value` changes on top.

    Raises:
        RecipeError: there is no such recipe, or it has unknown keys, wrong types or values out of range.
    """
    settings = _read(source)
    for change in changes:
        _apply(settings, change)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
        raise RecipeError(f"recipe {source}: {problems}") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    directory = resources.files("thrifty") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in directory.iterdir() if entry.name.endswith(".yaml"))


def _check_types(kind: type[MethodConfig], settings: Mapping[str, Any]) -> None:
    """Compare settings with the types of the config's fields; unknown settings are left to the config to name."""
    hints = get_type_hints(kind) | {"version": int}
    for key, value in settings.items():
        if key not in hints:
            continue
        given = tuple(value) if isinstance(value, list) else value
        try:
            TypeAdapter(hints[key], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(given)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ValueError(f"method.{key}: {message[0].lower()}{message[1:]}, not {value!r}") from None


def _read(source: str | Path) -> dict[str, Any]:
    path: Any = Path(source)
    try:
        if not path.is_file():
            path = resources.files("thrifty") / "recipes" / f"{source}.yaml"
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe {source}: neither a file nor one of the shipped: {', '.join(shipped_recipes())}."
            )
        settings = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {source} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {source} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise RecipeError(f"recipe {source} must be a mapping of settings, but is a {type(settings).__name__}.")
    return settings


def _apply(settings: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {change!r} must have the form key=value or section.key=value.")
    *sections, key = path.split(".")
    target = settings
    for section in sections:
        inner = target.setdefault(section, {})
        if inner is None:
            inner = target[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {change!r}: {section} has no settings inside it.")
        target = inner
    target[key] = parse_value(value)


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        section = _section_of(item["loc"])
        return f"unknown key {place} (known here: {', '.join(section.model_fields)})"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if item["type"] in ("missing", "value_error") else f", not {item['input']!r}"
    return f"{place}: {message[0].lower()}{message[1:]}{shown}"


def _section_of(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        annotation = section.model_fields[str(part)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return section
