// Convolutions that read chosen positions of chosen input channels of a map, and compute all of its output.
//
// A call has two phases. In the first, what is read is gathered into memory that all tasks of the call share; the
// second multiplies and writes. Tasks of a phase may run in any order and on any number of threads: they write
// disjoint memory, and the order of additions for one output value is always the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "conv.h"

namespace thrifty {

struct ColumnCall {
    Map in;                       // its halo is not read
    Map out;
    Map residual;                 // data null: none. Added after bias and scale, before the activation
    const std::uint8_t* residual_active = nullptr;  // [out_channels], null: all channels of the residual are active
    Channels active_in;           // input channels that are read
    const int* columns = nullptr; // positions y * in_width + x that are read, in rising order
    int column_count = 0;
    float scale = 1;              // times sum and bias
};

class ColumnConvolution {
public:
    virtual ~ColumnConvolution() = default;

    // Floats of scratch that each working thread needs, and those that all tasks of one call share. 64-byte aligned.
    virtual std::size_t scratch() const = 0;
    virtual std::size_t shared() const = 0;

    // First phase. 0 tasks: nothing to prepare.
    virtual int prepare_tasks(const ColumnCall& call, int threads) const = 0;
    virtual void prepare(const ColumnCall& call, int task, int tasks, float* shared, float* scratch) const = 0;

    // Second phase, after all tasks of the first.
    virtual int tasks(const ColumnCall& call, int threads) const = 0;
    virtual void run(const ColumnCall& call, int task, int tasks, const float* shared, float* scratch) const = 0;

    // Multiply-accumulates that `run` does over all tasks, by the loops that it runs.
    virtual std::int64_t macs(const ColumnCall& call) const = 0;

    // Name of the kernel, for traces.
    virtual const char* kernel() const = 0;
};

// Weights [out_channels, in_per_group, kernel_height, kernel_width] and bias [out_channels] are copied.
// Rows of the residual may be read up to `read_ahead` floats past their end, as in `Convolution`.
using MakeColumnConvolution = std::unique_ptr<ColumnConvolution> (*)(const ConvShape&, const float* weight,
                                                                     const float* bias);

namespace generic { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx2 { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx512 { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }

}  // namespace thrifty
