"""Conversion of whole libraries: every torchvision classification CNN, and timm families of many styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from randomised import TORCHVISION_CNNS, no_initialisation, randomise, torchvision_cnn
from torch import Tensor, nn

from thrifty.converter import convert
from thrifty.dynamic import Dynamic
from thrifty.gates import GatedConv
from thrifty.macs import count_macs
from thrifty.methods.fbs import FBS

MAX_PARAMETERS = 200e6
SIZES = {"inception_v3": 299, "inception_v4": 96, "inception_resnet_v2": 96}
"""Side in px of the smallest photograph that a network takes, its training heads included, where 64 does not do."""

TIMM = [
    "seresnet18", "ecaresnet26t", "skresnet18", "resnest14d", "resnetv2_50", "resnetaa34d", "resnetblur18",
    "res2net50_26w_4s",
    "tf_efficientnet_b0", "mobilenetv3_small_100", "mobilenetv4_conv_small", "mixnet_s", "fbnetc_100",
    "regnety_002", "regnetz_b16", "repvgg_a0", "mobileone_s0", "gernet_s", "dla34", "dla60_res2net", "hrnet_w18_small",
    "ghostnet_100", "ghostnetv2_100", "repghostnet_050", "cspresnet50", "cspdarknet53", "cs3darknet_s", "rexnet_100",
    "nf_resnet26", "nf_regnet_b0", "eca_nfnet_l0", "densenet121", "densenetblur121d", "dpn48b", "xception41",
    "inception_v4", "inception_resnet_v2", "convnext_atto", "convnextv2_atto", "edgenext_xx_small", "fastvit_t8",
    "ese_vovnet19b_dw", "selecsls42", "hardcorenas_a", "hgnetv2_b0", "inception_next_atto", "rdnet_tiny", "starnet_s1",
    "repvit_m0_9", "tresnet_m", "legacy_seresnet18", "gcresnext26ts",
]  # fmt: skip


def torchvision_net(name: str) -> nn.Module:
    model = torchvision_cnn(name)
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        pytest.skip(
            f"{name} has over {MAX_PARAMETERS / 1e6:.0f} M parameters: its conversion takes gigabytes of memory"
        )
    return model


def timm_net(name: str) -> nn.Module:
    with no_initialisation():
        return timm.create_model(name)


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", name) for name in TORCHVISION_CNNS] + [("timm", name) for name in TIMM],
)
def test_converted_network(library: str, name: str, report_coverage: Callable[[str, str], None]) -> None:
    """Equal logits at density 1; at density 0.5 other logits, exact zeros, and no operator that is unknown."""
    size = SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size)
    model = randomise(torchvision_net(name) if library == "torchvision" else timm_net(name), x)
    with torch.no_grad():
        dense = model(x)
        assert_depends_on_input(dense)
        dynamic = convert(model, FBS(density=1.0), x, inplace=True)
        error = normalised_error(dynamic(x), dense)
        report_coverage(f"{library} {name}", f"{dynamic.conversion.coverage:6.1%}   normalised error {error:.1e}")
        assert error <= 1e-5
        assert dynamic.conversion.coverage > 0
        assert_every_gate_counts(dynamic, x, dense)


def assert_depends_on_input(logits: Tensor) -> None:
    """Were the logits the same for every input, an error on the way to them would not show."""
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).abs().max() > 1e-3 * logits.abs().max()


def assert_every_gate_counts(dynamic: Dynamic, x: Tensor, dense: Tensor) -> None:
    dynamic.set_density(0.5)
    checked = check_zeros(dynamic)
    cost = count_macs(dynamic, x)
    assert set(checked) == set(dynamic.gates())
    assert (cost.total < dynamic.conversion.total_macs + cost.gate_overhead).all()
    assert normalised_error(dynamic(x), dense) > 1e-2
    checked.clear()
    dynamic.train()(x)
    assert set(checked) == set(dynamic.gates())


def check_zeros(dynamic: nn.Module) -> list[str]:
    """From now on, every pass checks each gated layer's output; the list tells which layers were checked."""
    checked: list[str] = []

    def note(name: str) -> Any:
        def hook(gated: GatedConv, _inputs: object, output: Tensor) -> None:
            decision = decided[name]
            assert (decision.sum(1) == (gated.gate.channels + 1) // 2).all()
            assert (output[~decision] == 0).all(), f"{name} has values where its gate decided to skip"
            checked.append(name)

        return hook

    decided: dict[str, Tensor] = {}
    for name, module in dynamic.named_modules():
        if isinstance(module, GatedConv):
            module.gate.register_forward_hook(lambda _m, _i, out, name=name: decided.__setitem__(name, out[1]))
            module.register_forward_hook(note(name))
    return checked


def normalised_error(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()
