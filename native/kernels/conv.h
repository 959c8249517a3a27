// Convolutions that compute chosen output channels from chosen input channels and touch nothing else.
//
// The executor makes one `Convolution` per operator when the program is loaded. For each image it fills a `ConvCall`
// and runs all tasks of the call, in any order and on any number of threads: tasks write disjoint outputs, and the
// order of additions for one output value is always the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "activation.h"
#include "map.h"

namespace thrifty {

struct ConvShape {
    int in_channels = 0, out_channels = 0, groups = 1;
    int in_height = 0, in_width = 0, out_height = 0, out_width = 0;
    int kernel_height = 1, kernel_width = 1, stride_height = 1, stride_width = 1;
    int pad_top = 0, pad_left = 0;  // the input's halo must cover the padding, bottom and right included
    int dilation_height = 1, dilation_width = 1;
    Activation activation = Activation::none;
    float slope = 0;
    bool chooses_inputs = false;  // a gate chooses input channels, and all outputs are computed in every call

    int taps() const { return kernel_height * kernel_width; }
    int in_per_group() const { return in_channels / groups; }
    int out_per_group() const { return out_channels / groups; }
};

struct ConvCall {
    Map in;
    Map out;
    Map residual;                          // data null: none. Added after bias and scale, before the activation
    const std::uint8_t* residual_active = nullptr;  // [out_channels], null: all channels of the residual are active
    Channels active_in;                    // input channels that are read
    Channels active_out;                   // output channels that are computed and written; the others are not touched
    const float* scale = nullptr;          // [out_channels], null: 1
};

class Convolution {
public:
    virtual ~Convolution() = default;

    // Floats of scratch that each working thread needs in `run`, 64-byte aligned.
    virtual std::size_t scratch() const = 0;

    // Number of tasks of a call when `threads` share it; 1 thread may get one task for everything.
    virtual int tasks(const ConvCall& call, int threads) const = 0;

    // Does task `task` of `tasks`. Thread-safe: several calls may run at once, each with its own scratch.
    virtual void run(const ConvCall& call, int task, int tasks, float* scratch) const = 0;

    // Multiply-accumulates that `run` does over all tasks, by the loops that it runs.
    virtual std::int64_t macs(const ConvCall& call) const = 0;

    // Name of the kernel that does a call, for traces.
    virtual const char* kernel(const ConvCall& call) const = 0;
};

// Weights [out_channels, in_per_group, kernel_height, kernel_width] and bias [out_channels] must outlive the result.
// Input rows may be read up to `read_ahead` floats past the last pixel of the last plane's halo: arenas leave that much.
inline constexpr std::size_t read_ahead = 64;

using MakeConvolution = std::unique_ptr<Convolution> (*)(const ConvShape&, const float* weight, const float* bias);

// One per instruction set, each in a source file compiled for it (see dispatch.h).
namespace generic { std::unique_ptr<Convolution> make_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx2 { std::unique_ptr<Convolution> make_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx512 { std::unique_ptr<Convolution> make_convolution(const ConvShape&, const float* weight, const float* bias); }

}  // namespace thrifty
