"""`thrifty demo`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import thrifty
from thrifty.cli.options import Json, Threads, photographs, set_threads
from thrifty.cli.show import console, millions, percent, print_json, table
from thrifty.errors import ThriftyError

if TYPE_CHECKING:
    from thrifty.data.loader import EvaluationLoader
    from thrifty.evaluation import Evaluation

NAME = "demo"
EXTREMES = 3


def run(as_json: Json = False, threads: Threads = None) -> None:
    """Classify the 1,000 photographs that ship with thrifty, with every model of the zoo.

    Prints accuracy and the MACs of each photograph: mean, spread, and which photographs cost least and most.
    """
    set_threads(threads)
    from thrifty.evaluation import evaluate  # noqa: PLC0415 (needs torch)
    from thrifty.zoo.store import load_model  # noqa: PLC0415

    records = thrifty.zoo.records()
    if not records:
        raise ThriftyError("this copy of thrifty has no zoo models. Install it anew.")
    results: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda record: (record.net, record.method is not None, -record.macs)):
        model, card = load_model(record.name)
        loader = photographs(card, "sample", None)
        start = time.perf_counter()
        evaluation = evaluate(model, loader)
        seconds = time.perf_counter() - start
        results.append(_result(record, evaluation, loader, seconds))
        if not as_json:
            console.print(f"{record.name}: {len(loader.images):,} photographs in {seconds:.1f} s")
    if as_json:
        print_json(results)
        return
    _print(results)


def _result(record: Any, evaluation: Evaluation, loader: EvaluationLoader, seconds: float) -> dict[str, Any]:
    order = evaluation.macs.total.argsort(stable=True).tolist()
    names, total = loader.images.names, evaluation.macs.total
    constant = bool(total.min() == total.max())

    def costs(indices: list[int]) -> list[dict[str, Any]]:
        return [] if constant else [{"photograph": names[i], "macs": int(total[i])} for i in indices]

    return {
        "model": record.name,
        "photographs": len(names),
        "accuracy": evaluation.accuracy,
        "macs": evaluation.macs.mean,
        "macs_p5": evaluation.macs.percentile(5),
        "macs_p95": evaluation.macs.percentile(95),
        "dense_macs": record.dense_macs,
        "seconds": seconds,
        "constant_cost": constant,
        "cheapest": costs(order[:EXTREMES]),
        "dearest": costs(order[: -EXTREMES - 1 : -1]),
    }


def _spread(result: dict[str, Any]) -> str:
    if result["constant_cost"]:
        return "constant"
    return f"{millions(result['macs_p5'])} – {millions(result['macs_p95'])}"


def _print(results: list[dict[str, Any]]) -> None:
    rows = [
        (
            result["model"],
            percent(result["accuracy"]),
            millions(result["macs"]),
            "constant"
            if result["constant_cost"]
            else f"{millions(result['macs_p5'])} – {millions(result['macs_p95'])}",
            f"{result['macs'] / result['dense_macs']:.3f}",
        )
        for result in results
    ]
    console.print()
    table(("model", "accuracy", "MACs, mean", "5th – 95th percentile", "of dense"), rows)
    for result in results:
        if result["constant_cost"]:
            console.print(f"{result['model']}: every photograph costs the same, {millions(result['macs'])} MACs.")
            continue
        for kind in ("cheapest", "dearest"):
            shown = ", ".join(f"{item['photograph']} ({millions(item['macs'])})" for item in result[kind])
            console.print(f"{result['model']}, {kind}: {shown}", highlight=False)
    console.print(
        "\nThe sample is a tenth of the test photographs; `thrifty zoo` has the figures on all 10,000.\n"
        "Skipped channels are still computed and multiplied by zero here, so a dynamic model takes no less time yet.",
        highlight=False,
    )
