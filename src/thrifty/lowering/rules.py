"""From torch's operations to nodes: which rule is for which operation.

A rule takes a call and returns what is known of its output, or a list where there are several outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from thrifty.errors import LoweringError
from thrifty.lowering.call import Call, Rule
from thrifty.lowering.moving import concatenated, identity_if_same_size, moved, padded, reshaped, restrided, same
from thrifty.lowering.pointwise import activation, add, clamp, div, gelu, leaky_relu, mul, neg, power, rsub, square, sub
from thrifty.lowering.pooling import adaptive, avg_pool, max_pool, reduced
from thrifty.lowering.weighted import addmm, batch_norm, convolution, layer_norm, linear, mm

aten = torch.ops.aten


def _value_dependent(_call: Call) -> None:
    raise LoweringError("reads a value that depends on the input: which way the network goes must not depend on values")


def _constant(_call: Call) -> None:
    """The output depends on the input's shape only."""


def _table() -> dict[Any, Rule]:
    groups: dict[Rule, str] = {
        convolution: "convolution",
        linear: "linear",
        addmm: "addmm",
        mm: "mm",
        batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        layer_norm: "native_layer_norm",
        activation("relu"): "relu relu_",
        activation("silu"): "silu silu_",
        activation("hardswish"): "hardswish hardswish_",
        activation("sigmoid", True): "sigmoid sigmoid_",
        activation("hardsigmoid", True): "hardsigmoid hardsigmoid_",
        activation("tanh"): "tanh tanh_",
        leaky_relu: "leaky_relu leaky_relu_",
        gelu: "gelu gelu_",
        clamp: "clamp clamp_ clamp_min clamp_min_ hardtanh hardtanh_",
        add: "add add_",
        sub: "sub sub_",
        rsub: "rsub",
        mul: "mul mul_",
        div: "div div_",
        neg: "neg neg_",
        square: "square square_",
        power: "pow",
        concatenated: "cat stack",
        padded: "constant_pad_nd",
        max_pool: "max_pool2d max_pool2d_with_indices",
        avg_pool: "avg_pool2d",
        adaptive("adaptive_avg_pool"): "_adaptive_avg_pool2d adaptive_avg_pool2d",
        adaptive("adaptive_max_pool"): "adaptive_max_pool2d",
        reduced("adaptive_avg_pool"): "mean",
        reduced("adaptive_avg_pool", True): "sum",
        reduced("adaptive_max_pool"): "amax",
        same: "clone detach alias contiguous _to_copy lift_fresh dropout dropout_ feature_dropout",
        restrided: "as_strided_",
        reshaped: "view _unsafe_view reshape _reshape_alias flatten unflatten squeeze unsqueeze squeeze_ unsqueeze_",
        moved: "permute transpose t slice select split split_with_sizes unsafe_split unsafe_split_with_sizes chunk "
        "unsafe_chunk unbind expand repeat index_select index channel_shuffle native_channel_shuffle flip roll "
        "pixel_shuffle pixel_unshuffle",
        identity_if_same_size: "upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d",
        _constant: "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty sym_size",
        _value_dependent: "_local_scalar_dense item is_nonzero nonzero equal",
    }
    return {
        getattr(aten, name): rule for rule, names in groups.items() for name in names.split() if hasattr(aten, name)
    }


RULES = _table()
"""Operation -> rule."""

SUPPORTED = (
    "conv2d, linear, batch_norm in evaluation mode, layer_norm over channels, relu, relu6, leaky_relu, silu, gelu, "
    "hardswish, sigmoid, hardsigmoid, tanh, add, sub, mul, division by constants, cat, stack, max_pool2d, avg_pool2d, "
    "adaptive pooling, mean, sum and amax over positions, zero padding, flatten, dropout, and views, slices, "
    "permutations and shuffles of channels"
)
"""What networks may be made of, for messages."""
