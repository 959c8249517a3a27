// Convolutions that read chosen columns (positions) and channels of their input and compute all of their output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "conv.h"
#include "map.h"

namespace thrifty {

struct ColumnCall {
    Map in, out;                    // the input's halo is not read
    Map residual;                   // data null: none
    const std::uint8_t* residual_active = nullptr;
    Channels active_in;             // input channels that are read
    const int* columns = nullptr;   // positions y * in_width + x that are read, rising
    int column_count = 0;
    float scale = 1;                // times (sum + bias), before the residual
};

class ColumnConvolution {
public:
    virtual ~ColumnConvolution() = default;

    virtual std::size_t scratch() const = 0;  // floats for each working thread
    virtual std::size_t shared() const = 0;   // floats that all tasks of one call share, 64-byte aligned

    // Phase 1: puts what is read into `shared`.
    virtual int prepare_tasks(const ColumnCall&, int threads) const = 0;
    virtual void prepare(const ColumnCall&, int task, int tasks, float* shared, float* scratch) const = 0;

    // Phase 2, after all tasks of phase 1: writes every output channel and pixel.
    virtual int tasks(const ColumnCall&, int threads) const = 0;
    virtual void run(const ColumnCall&, int task, int tasks, const float* shared, float* scratch) const = 0;

    virtual std::int64_t macs(const ColumnCall&) const = 0;
    virtual const char* kernel() const = 0;
};

using MakeColumnConvolution = std::unique_ptr<ColumnConvolution> (*)(const ConvShape&, const float* weight, const float* bias);

namespace generic { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx2 { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }
namespace avx512 { std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape&, const float* weight, const float* bias); }

}  // namespace thrifty
