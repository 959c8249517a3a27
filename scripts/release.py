"""Put a finished run's weights, program and record into the zoo. The test photographs are looked at here, and once.

Usage: python scripts/release.py RUN --root DATA [--name NAME] [--half]
RUN is the directory of a finished `thrifty train`; DATA holds test/<class>/*.jpg, and train/<class>/*.jpg, of which the
part that was held out of training shows what models reach that can be set to several budgets. With --half filters and
matrices are rounded to float16, as which they ship, before anything is measured.
"""

from __future__ import annotations

import argparse
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from thrifty import Dynamic, count_macs, set_budget
from thrifty.cli.options import photographs
from thrifty.data.loader import EvaluationLoader
from thrifty.errors import ThriftyError
from thrifty.evaluation import evaluate
from thrifty.files import replacing, sha256
from thrifty.machine import machine
from thrifty.methods.budget import budgeted
from thrifty.train import checkpoint
from thrifty.train.build import load_data
from thrifty.train.recipe import Recipe
from thrifty.zoo.compilation import compile_record
from thrifty.zoo.nets import build
from thrifty.zoo.records import WEIGHTS, Record, records
from thrifty.zoo.store import load_model, save_model

DESCRIPTION = (
    "CIFAR-10 with the standard split, as JPEG of quality 75 with subsampled chroma: figures lie a little under "
    "those on the original bytes, and compare only with models of the same files."
)

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the dense MACs at which a record tells what a model reaches that can be set to them."""

MEASURED_ON = 256
"""Photographs held out of training by which a budget is set."""


def main() -> None:
    """Evaluate, copy the weights, compile, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--name")
    parser.add_argument("--half", action="store_true")
    arguments = parser.parse_args()
    recipe = yaml.safe_load((arguments.run / "recipe.yaml").read_text(encoding="utf-8"))
    name = arguments.name or recipe["name"]
    _, position, rows = checkpoint.peek(arguments.run / "checkpoint.safetensors")
    if position.epoch < recipe["epochs"]:
        raise ThriftyError(f"{arguments.run} has {position.epoch} of {recipe['epochs']} epochs: finish it first.")
    if recipe["data"]["source"] != "folder" or not recipe["data"]["validation"]:
        raise ThriftyError(f"{arguments.run} was trained on other files than the zoo's, or held none out.")
    lineage, epochs = _lineage(recipe)
    source = arguments.run / "model.safetensors"
    if arguments.half:
        model, card = load_model(source)
        source = arguments.run / "model-half.safetensors"
        save_model(source, model, card, half=True)
    model, card = load_model(source)
    loader = photographs(card, "folder", arguments.root)
    result = evaluate(model, loader)
    x = torch.zeros(1, 3, card.size, card.size)
    record = Record(
        name=name,
        net=card.net,
        method=card.method,
        recipe=recipe["name"],
        lineage=lineage,
        data={
            "description": DESCRIPTION,
            "source": recipe["data"]["source"],
            "validation_share": recipe["data"]["validation"],
            "test": len(result.labels),
        },
        seed=recipe["seed"],
        epochs=recipe["epochs"],
        total_epochs=epochs + recipe["epochs"],
        accuracy=result.accuracy,
        validation_accuracy=rows[-1]["validation_accuracy"],
        macs=result.macs.mean,
        macs_percentiles=(result.macs.percentile(5), result.macs.percentile(95)),
        dense_macs=int(count_macs(build(card.net, **card.arguments), x).total[0]),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        made_with=_environment(recipe),
        sha256=sha256(source),
        curve=_curve(model, recipe, arguments.root),
    )
    with replacing(WEIGHTS / f"{name}.safetensors") as temporary:
        shutil.copyfile(source, temporary)
    compile_record(record)
    print(f"{name}: {record.accuracy:.4f} on {record.data['test']} photographs, {result.macs}")


def _lineage(recipe: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Names of the runs that the recipe's weights come from, oldest first, and the sum of their epochs."""
    weights = recipe["model"].get("weights")
    if weights is None:
        return (), 0
    shipped = {record.name: record for record in records()}
    if weights in shipped:
        return (*shipped[weights].lineage, weights), shipped[weights].total_epochs
    parent = yaml.safe_load((Path(weights).parent / "recipe.yaml").read_text(encoding="utf-8"))
    names, epochs = _lineage(parent)
    return (*names, parent["name"]), epochs + parent["epochs"]


def _curve(model: Any, recipe: dict[str, Any], root: Path) -> tuple[dict[str, float], ...]:
    """Accuracy and cost on the photographs held out, at each budget that the model can be set to; it stays at the last.

    Empty for a model that was trained for one density.
    """
    if not isinstance(model, Dynamic) or not (budgeted(model) or getattr(model.method, "one_for_all", False)):
        return ()
    settings = Recipe.model_validate(recipe | {"data": recipe["data"] | {"root": str(root)}})
    _, held = load_data(settings)
    loader = EvaluationLoader(held, settings.data.mean, settings.data.std, batch_size=MEASURED_ON)
    few, _ = next(iter(loader))
    rows: list[dict[str, float]] = []
    costs: list[float] = []
    for budget in BUDGETS:
        try:
            costs.append(set_budget(model, budget, few))
        except ThriftyError as error:
            print(f"no budget under {budget}: {error}")
            break
        if len(costs) > 1 and costs[-1] == costs[-2]:  # the most that it can cost
            rows[-1]["budget"] = budget
            continue
        found = evaluate(model, loader)
        rows.append({"budget": budget, "accuracy": found.accuracy, "macs": found.macs.mean})
    return tuple(rows)


def _environment(recipe: dict[str, Any]) -> dict[str, Any]:
    found = machine()
    return {
        "CPU": f"{found['CPU']} ({', '.join(found['features'])})",
        "threads": recipe["threads"],
        "precision": recipe.get("precision", "float32"),
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
    }


if __name__ == "__main__":
    main()
