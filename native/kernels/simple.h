// Everything but convolutions: small kernels that know pointers and sizes only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activation.h"
#include "map.h"

namespace thrifty {

// One channel. A row distance of 0 reads the same row again and again: that is how a channel of zeros is given.
struct Plane {
    float* data = nullptr;
    std::ptrdiff_t row = 0;
};

struct ConstPlane {
    const float* data = nullptr;
    std::ptrdiff_t row = 0;
    ConstPlane(const float* first, std::ptrdiff_t distance) : data(first), row(distance) {}
    ConstPlane(const Plane& plane) : data(plane.data), row(plane.row) {}
};

struct Extent {
    int height = 0, width = 0;
};

struct Window {
    Extent in, out;
    int kernel_height = 1, kernel_width = 1, stride_height = 1, stride_width = 1;
    int dilation_height = 1, dilation_width = 1;
    int pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
    bool count_include_pad = true;
    int divisor = 0;  // 0: what the window covers
};

// Neighbouring features that are all active.
struct Run {
    int first = 0, count = 0;
};

inline constexpr int linear_block = 4;   // outputs that `linear_rows` works on together
inline constexpr int linear_panel = 64;  // outputs of one panel in `linear_panels`

struct SimpleKernels {
    // y = activation(x * scale + shift)
    void (*affine)(ConstPlane x, Plane y, Extent extent, float scale, float shift, Activation activation, float slope);
    void (*add)(ConstPlane a, ConstPlane b, Plane y, Extent extent, Activation activation, float slope);
    void (*multiply)(ConstPlane a, ConstPlane b, Plane y, Extent extent, Activation activation, float slope);
    // In place, on a row.
    void (*activate)(float* y, std::ptrdiff_t count, Activation activation, float slope);

    float (*sum)(ConstPlane x, Extent extent);
    float (*sum_magnitude)(ConstPlane x, Extent extent);
    // y[h * width + w] = sum of |x| at (h, w), over the channels in their order, for rows [first, last).
    void (*sum_columns)(const Map& x, Channels channels, int first, int last, float* y);
    // Marks the k highest of `count` scores, none negative; equal ones go to the lowest index, NaN comes last. `keys`:
    // [count] to work in.
    void (*mark_highest)(const float* scores, int count, int k, int* keys, std::uint8_t* marks);

    // `scratch` takes pool_scratch(window) floats. Padding never wins the maximum; NaN does.
    void (*max_pool)(ConstPlane x, Plane y, const Window& window, float* scratch);
    void (*avg_pool)(ConstPlane x, Plane y, const Window& window, float* scratch);
    void (*adaptive_avg_pool)(ConstPlane x, Plane y, Extent in, Extent out);
    void (*adaptive_max_pool)(ConstPlane x, Plane y, Extent in, Extent out);

    // Over the channels at each position of rows [first, last). `active` null: all; others are zero.
    void (*layer_norm)(const Map& x, const std::uint8_t* active, const Map& y, const float* weight, const float* bias,
                       float epsilon, int first, int last);

    // Outputs [first, last) of y = W x + bias; `first` is a multiple of linear_block (linear_panel for panels).
    void (*linear_rows)(const float* weight, const float* bias, const float* x, float* y, int features, int first,
                        int last);
    // The same over the features of `runs` only.
    void (*linear_runs)(const float* weight, const float* bias, const float* x, float* y, int features,
                        const Run* runs, int count, int first, int last);
    // The same over `count` features index[i] with values x[i]; the weights lie in panels, [outputs / linear_panel,
    // features, linear_panel], zeros at the end.
    void (*linear_panels)(const float* panels, const float* bias, const float* x, const int* index, int count,
                          float* y, int features, int first, int last);

    // A row of the network's input, `step` elements from one to the next: y = x * scale + shift.
    void (*input_bytes)(const std::uint8_t* x, std::ptrdiff_t step, float* y, int count, float scale, float shift);
    void (*input_floats)(const float* x, std::ptrdiff_t step, float* y, int count);
};

// Floats of scratch that pooling by this window takes.
constexpr std::size_t pool_scratch(const Window& w) {
    const std::size_t reach = (static_cast<std::size_t>(w.out.width) - 1) * static_cast<std::size_t>(w.stride_width) +
                              static_cast<std::size_t>(w.dilation_width) * (static_cast<std::size_t>(w.kernel_width) - 1) + 1;
    const std::size_t row = static_cast<std::size_t>(w.in.width) + static_cast<std::size_t>(w.pad_left);
    return (reach > row ? reach : row) + 64;
}

// One per instruction set, each in a source file compiled for it (see dispatch.h).
namespace generic { const SimpleKernels& simple_kernels(); }
namespace avx2 { const SimpleKernels& simple_kernels(); }
namespace avx512 { const SimpleKernels& simple_kernels(); }

}  // namespace thrifty
