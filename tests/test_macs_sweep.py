"""Dense counts against torch's own counter, on every torchvision CNN at the size of its photographs."""

from __future__ import annotations

import pytest
import torch
from randomised import TORCHVISION_CNNS, torchvision_cnn
from torch.utils.flop_counter import FlopCounterMode

from thrifty.macs import count_macs

SIZES = {"inception_v3": 299}


@pytest.mark.parametrize("name", TORCHVISION_CNNS)
def test_dense_count_equals_torch(name: str) -> None:
    """On the meta device, where shapes are all that there is: counting needs no more."""
    size = SIZES.get(name, 224)
    model = torchvision_cnn(name).eval().to("meta")
    x = torch.empty(2, 3, size, size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    count = count_macs(model, x)
    assert count.total.tolist() == [counter.get_total_flops() // 2] * 2
    assert sum(part[0].item() for part in count.layers.values()) == count.total[0]
    assert not count.gates
