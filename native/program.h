// A program: what one image goes through, checked once so that nothing after has to check again.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "kernels/activation.h"

namespace thrifty {

struct Shape {
    int channels = 0, height = 0, width = 0;

    std::int64_t pixels() const { return std::int64_t{height} * width; }
    std::int64_t size() const { return channels * pixels(); }
    bool vector() const { return height == 1 && width == 1; }
    bool operator==(const Shape&) const = default;
};

struct Padding {
    int top = 0, bottom = 0, left = 0, right = 0;

    bool any() const { return top || bottom || left || right; }
    bool operator==(const Padding&) const = default;
};

enum class Kind : std::uint8_t {
    conv, linear, affine, activation, add, mul, concat, gather, max_pool, avg_pool, adaptive_avg_pool,
    adaptive_max_pool, pad, layer_norm, flatten, layer_gate,
};

// What decides, for each image, what is computed (thrifty/program.py has their formulas).
enum class Gate : std::uint8_t { none, topk, clip, attention, layer };

// What gates decide on.
enum class Axis : std::uint8_t { channels, columns, layer };
inline constexpr std::size_t axes = 3;

// What may change of a gate from call to call.
struct GateSettings {
    int channels = 0;      // topk: winners; attention: kept_channels
    int columns = 0;       // attention: kept_columns
    double threshold = 0;  // clip, layer_gate
};

// ---- as it comes from outside

struct TensorSource {
    enum class Type : std::uint8_t { float32, int32, other };
    const void* data = nullptr;
    std::vector<std::int64_t> shape;
    Type type = Type::other;
    bool contiguous = false;  // in C order
};

using Attribute = std::variant<std::int64_t, double, std::string, std::vector<std::int64_t>>;

struct OperatorSource {
    std::string kind, name;
    std::vector<std::int64_t> inputs;
    std::int64_t output = -1;
    std::map<std::string, Attribute> attributes;
    std::map<std::string, TensorSource> tensors;
    std::int64_t guard = -1;  // buffer of a layer_gate; -1: none
};

struct Source {
    std::vector<std::vector<std::int64_t>> buffers;  // each (channels, height, width)
    std::vector<OperatorSource> operators;
    std::int64_t output = -1;
};

struct Limits {
    std::int64_t memory = std::int64_t{1} << 30;      // bytes of one image's activations
    std::int64_t macs = std::int64_t{10'000'000'000'000};  // multiply-accumulates (in pooling: elements) of one image
};

// ---- as it is run

struct Operator {
    Kind kind = Kind::activation;
    std::string name;
    std::vector<int> inputs;
    int output = -1;

    Activation activation = Activation::none;
    float slope = 0.01f;

    int kernel_height = 1, kernel_width = 1, stride_height = 1, stride_width = 1;
    int dilation_height = 1, dilation_width = 1, groups = 1;
    Padding padding;
    bool count_include_pad = true;
    int divisor = 0;
    float value = 0, epsilon = 0;

    Gate gate = Gate::none;
    GateSettings settings;
    int guard = -1;       // buffer whose activity says whether the operator runs; -1: it always does
    bool scaled = false;  // the sums of a convolution are multiplied by the guard's value

    const float* weight = nullptr;
    const float* bias = nullptr;
    const float* scale = nullptr;
    const float* shift = nullptr;
    const float* gate_weight = nullptr;
    const float* gate_bias = nullptr;
    std::span<const std::int32_t> index;  // -1: a channel of zeros

    std::int64_t work = 0;  // multiply-accumulates with everything active, or elements that are read; gates included
};

struct Program {
    std::vector<Shape> buffers;
    std::vector<Operator> operators;
    int output = 0;
};

// The program of a source whose tensors outlive it. Throws std::invalid_argument with one sentence that names the
// operator where anything is wrong.
Program validate(const Source& source, const Limits& limits);

// How many marks of each axis an operator's decision has for one image, by Axis; 0: its gate does not decide on it.
// With settings of zero: of all axes that it can decide on.
std::array<int, axes> decided(const Program& program, const Operator& op, const GateSettings& settings);

// Changes one setting by its name in programs. Throws std::invalid_argument where the gate has no such setting, or the
// value is out of range.
void set(GateSettings& settings, const Program& program, const Operator& op, const std::string& name, double value);

// Whether an activation leaves zero as it is.
constexpr bool keeps_zero(Activation activation) {
    return activation != Activation::sigmoid && activation != Activation::hardsigmoid;
}

}  // namespace thrifty
