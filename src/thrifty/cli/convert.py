"""`thrifty convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from thrifty.cli.options import Json, MethodSettings, settings_of
from thrifty.cli.output import console, millions, percent, print_json, table

NAME = "convert"


def run(
    net: Annotated[
        str, typer.Argument(help="torchvision:NAME, timm:NAME, module:function of your own, or a zoo network.")
    ],
    method: Annotated[str, typer.Option(help="The method: fbs, antidote …")] = "fbs",
    density: Annotated[
        float | None, typer.Option(help="Share of channels kept, in (0, 1], for methods that have one. [default: 0.5]")
    ] = None,
    changes: MethodSettings = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Gate only layers whose names fit this pattern, such as 'layer*'; repeatable."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width of the example in pixels; 32 for zoo networks, else 224."),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the example.")] = 3,
    as_json: Json = False,
) -> None:
    """What a method would gate in a network: each convolution, why it stays dense if it does, and the share of MACs.

    The network is made with random weights; the counts are of a random input.
    """
    import torch  # noqa: PLC0415 (only commands that need it import torch)

    from thrifty.converter import convert  # noqa: PLC0415
    from thrifty.macs import count_macs  # noqa: PLC0415
    from thrifty.methods import method_config  # noqa: PLC0415
    from thrifty.zoo.resolve import build_net, usual_size  # noqa: PLC0415

    settings = settings_of(changes or ()) | ({} if density is None else {"density": density})
    config = method_config(method, {"where": tuple(where) if where else None, **settings})
    torch.manual_seed(0)
    pixels = size or usual_size(net)
    example = torch.randn(1, channels, pixels, pixels)
    dynamic = convert(build_net(net), config, example, inplace=True)
    conversion = dynamic.conversion
    macs = count_macs(dynamic, example).mean
    if as_json:
        places = [asdict(place) for place in conversion.places]
        print_json(
            {
                "net": net,
                "method": config.settings(),
                "dense_macs": conversion.total_macs,
                "macs": macs,
                "coverage": conversion.coverage,
                "places": places,
            }
        )
        return
    rows = conversion.rows()
    table(("layer", "gated", "MACs", "gate MACs", "note"), rows, title=net)
    console.print(conversion.summary())
    console.print(f"as it is set: {millions(macs)} MACs, {percent(macs / conversion.total_macs)} of dense")
