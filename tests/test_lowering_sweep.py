"""Lowering and engine on whole libraries: every torchvision classification CNN, and timm families of many styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_gates import randomly_gated
from randomised import TORCHVISION_CNNS, randomise
from test_converter_sweep import assert_depends_on_input, timm_net, torchvision_net
from torch import Tensor, nn

from thrifty.dynamic import Dynamic, decisions
from thrifty.engine import Engine
from thrifty.errors import LoweringError
from thrifty.lowering import lower
from thrifty.macs import MacCount, count_macs

BOUND = 1e-4
"""Largest error over the largest logit."""

SIZES = {"inception_v3": (75, 96), "inception_v4": (75, 96), "dla34": (64, 96)}
"""Sides in px of the photographs, where (64, 71) does not do."""

TIMM = [
    "seresnet18", "resnetv2_50", "resnet26d", "res2net50_26w_4s", "tf_efficientnet_b0", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "mixnet_s", "fbnetc_100", "regnety_002", "repvgg_a0", "mobileone_s0", "dla34",
    "ghostnet_100", "cspresnet50", "rexnet_100", "nf_regnet_b0", "densenet121", "dpn48b", "xception41",
    "inception_v4", "convnext_atto", "fastvit_t8", "ese_vovnet19b_dw", "selecsls42", "hardcorenas_a", "hgnetv2_b0",
    "inception_next_atto", "starnet_s1", "repvit_m0_9",
]  # fmt: skip
"""Families of many styles; regnetz, gernet, dla60_res2net, repghostnet, cspdarknet, rdnet and others lower as well."""

LARGE = {
    *(name for name in TORCHVISION_CNNS if name.startswith("vgg") and name not in {"vgg11", "vgg16_bn"}),
    *(name for name in TORCHVISION_CNNS if name.startswith("efficientnet") and name[-2:] not in {"b0", "b3", "_s"}),
    *(name for name in TORCHVISION_CNNS if name.startswith("regnet") and name.endswith(("8gf", "16gf", "32gf"))),
    *(name for name in TORCHVISION_CNNS if name.startswith("densenet") and name != "densenet121"),
    "convnext_base", "convnext_large", "convnext_small", "resnet101", "resnet152", "resnext101_32x8d",
    "resnext101_64x4d", "wide_resnet101_2", "wide_resnet50_2",
}  # fmt: skip
"""Tested by `make check` only, like every second family of timm: smaller ones of their kind are tested always."""

TIMM_REFUSED = {
    "ecaresnet26t": "is a 1-d convolution",
    "skresnet18": "moved between channels and positions",
    "resnetblur18": "reflection_pad2d",
    "hrnet_w18_small": r"resizes a map from \[8, 8\] to \[16, 16\]",
    "convnextv2_atto": "linalg_vector_norm",
    "gcresnext26ts": "softmax",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small images: the threads of torch would wait for each other more than they work."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("library", "name"),
    [pytest.param("torchvision", n, marks=pytest.mark.large if n in LARGE else ()) for n in TORCHVISION_CNNS]
    + [pytest.param("timm", n, marks=() if n in TIMM[::2] else pytest.mark.large) for n in TIMM],
)
def test_network(library: str, name: str, report_parity: Callable[[str, str], None]) -> None:
    """Dense, and gated at density 0.5 with forced decisions: torch's answer, and exactly the MACs that are counted."""
    model = torchvision_net(name) if library == "torchvision" else timm_net(name)
    columns = []
    for size in SIZES.get(name, (64, 71)):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        randomise(model, x)
        dense = parity(model, x)
        gated = parity(randomly_gated(model, x), x)
        columns.append(f"{size:3} px: dense {dense:.1e}, FBS {gated:.1e}")
        report_parity(f"{library} {name}", "   ".join(columns))
        assert dense <= BOUND
        assert gated <= BOUND


@pytest.mark.parametrize("name", TIMM_REFUSED)
def test_what_programs_cannot_express_is_refused_by_name(name: str) -> None:
    with pytest.raises(LoweringError, match=f"{TIMM_REFUSED[name]}(.|\n)*Supported are: conv2d") as caught:
        lower(timm_net(name), torch.randn(1, 3, 64, 64))
    assert "timm/" in str(caught.value)  # the place in the model's code


@torch.no_grad()
def parity(model: nn.Module, x: Tensor) -> float:
    """Normalised error of the engine, at the model's decisions."""
    expected = model(x)
    assert_depends_on_input(expected)
    forced = decisions(model, x) if isinstance(model, Dynamic) else {}
    assert not forced or any((d.channels[0] != d.channels[1]).any() for d in forced.values())
    trace = Engine(lower(model, x[:1])).trace(x, forced)
    assert_counted(trace.layers, count_macs(model, x))
    difference = torch.from_numpy(trace.output) - expected
    return (difference.abs().max() / expected.abs().max()).item()


def assert_counted(layers: Any, count: MacCount) -> None:
    """Executed are exactly the MACs that are counted, layer by layer; '#2' marks a layer's second execution."""
    executed: dict[str, Any] = {}
    for layer in layers:
        if layer.kind in {"conv", "linear"}:
            name = layer.name.split("#")[0]
            executed[name] = executed.get(name, 0) + layer.macs
    assert set(executed) == set(count.layers)
    for name, macs in count.layers.items():
        assert np.array_equal(executed[name], macs.numpy()), name
    gates = {layer.name: layer.gate_macs for layer in layers if layer.gate_macs.any()}
    assert set(gates) == set(count.gates)
    for name, macs in count.gates.items():
        assert np.array_equal(gates[name], macs.numpy()), name
