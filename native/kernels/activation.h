// What a layer applies to its sums before it writes them.
#pragma once

#include <cstdint>

namespace thrifty {

enum class Activation : std::uint8_t {
    none, relu, relu6, leaky_relu, silu, gelu, gelu_tanh, hardswish, sigmoid, hardsigmoid, tanh,
};

}  // namespace thrifty
