// Column convolutions, value by value.

#include <algorithm>
#include <cstdint>

#include "columns.h"

namespace thrifty {
namespace generic {

#include "activate.inl"

namespace {

class ScalarColumns final : public ColumnConvolution {
public:
    ScalarColumns(const ConvShape& shape, const float* weight, const float* bias) : s_(shape), weight_(weight), bias_(bias) {}

    std::size_t scratch() const override { return 0; }
    std::size_t shared() const override { return static_cast<std::size_t>(s_.in_channels) * static_cast<std::size_t>(s_.in_height * s_.in_width); }

    int prepare_tasks(const ColumnCall& call, int) const override { return call.active_in.count; }

    void prepare(const ColumnCall& call, int task, int, float* shared, float*) const override {
        const float* const from = call.in.channel(call.active_in.index[task]);
        float* const to = shared + static_cast<std::ptrdiff_t>(task) * call.column_count;
        for (int i = 0; i < call.column_count; ++i)
            to[i] = from[call.columns[i] / s_.in_width * call.in.row + call.columns[i] % s_.in_width];
    }

    int tasks(const ColumnCall&, int threads) const override { return std::min(s_.out_channels, 3 * threads); }

    void run(const ColumnCall& call, int task, int tasks, const float* shared, float*) const override {
        const auto cut = [&](int t) { return static_cast<int>(std::int64_t{s_.out_channels} * t / tasks); };
        for (int o = cut(task); o < cut(task + 1); ++o) {
            float* const out = call.out.channel(o);
            for (int h = 0; h < s_.out_height; ++h) std::fill_n(out + h * call.out.row, s_.out_width, 0.0f);
            const int per_in = s_.in_per_group(), group = o / s_.out_per_group();
            for (int i = 0; i < call.active_in.count; ++i) {
                const int c = call.active_in.index[i] - group * per_in;
                if (c < 0 || c >= per_in) continue;
                const float* const w = weight_ + (static_cast<std::ptrdiff_t>(o) * per_in + c) * s_.taps();
                const float* const x = shared + static_cast<std::ptrdiff_t>(i) * call.column_count;
                for (int j = 0; j < call.column_count; ++j)
                    reach(call.columns[j], [&](int tap, int h, int v) { out[h * call.out.row + v] += w[tap] * x[j]; });
            }
            const bool residual = call.residual.data && (!call.residual_active || call.residual_active[o]);
            with_activation(s_.activation, [&](auto chosen) {
                for (int h = 0; h < s_.out_height; ++h)
                    for (int v = 0; v < s_.out_width; ++v) {
                        float& y = out[h * call.out.row + v];
                        y = call.scale * (y + bias_[o]);
                        if (residual) y += call.residual.channel(o)[h * call.residual.row + v];
                        y = activated<chosen.activation>(y, s_.slope);
                    }
            });
        }
    }

    std::int64_t macs(const ColumnCall& call) const override {
        std::int64_t pairs = 0;
        for (int j = 0; j < call.column_count; ++j) reach(call.columns[j], [&](int, int, int) { ++pairs; });
        return pairs * call.active_in.count * s_.out_per_group();
    }

    const char* kernel() const override { return "columns"; }

private:
    // Calls use(tap, row, column of the output) for each product that an input position takes part in.
    template <class Use>
    void reach(int position, const Use& use) const {
        for (int ky = 0; ky < s_.kernel_height; ++ky) {
            const int y = position / s_.in_width + s_.pad_top - ky * s_.dilation_height;
            if (y < 0 || y % s_.stride_height || y / s_.stride_height >= s_.out_height) continue;
            for (int kx = 0; kx < s_.kernel_width; ++kx) {
                const int x = position % s_.in_width + s_.pad_left - kx * s_.dilation_width;
                if (x < 0 || x % s_.stride_width || x / s_.stride_width >= s_.out_width) continue;
                use(ky * s_.kernel_width + kx, y / s_.stride_height, x / s_.stride_width);
            }
        }
    }

    ConvShape s_;
    const float* weight_;
    const float* bias_;
};

}  // namespace

std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape& shape, const float* weight, const float* bias) {
    return std::make_unique<ScalarColumns>(shape, weight, bias);
}

}  // namespace generic

namespace avx2 {
std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape& shape, const float* weight, const float* bias) {
    return generic::make_column_convolution(shape, weight, bias);
}
}  // namespace avx2

namespace avx512 {
std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape& shape, const float* weight, const float* bias) {
    return generic::make_column_convolution(shape, weight, bias);
}
}  // namespace avx512

}  // namespace thrifty
