// Pooling: windows, adaptive windows and the mean of a whole map.

#include "steps.h"

namespace thrifty {
namespace {

class PoolStep final : public Step {
public:
    PoolStep(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : Step(program, plan, place, kernels) {
        window_.in = extent(in()), window_.out = extent(out());
        window_.kernel_height = op_.kernel_height, window_.kernel_width = op_.kernel_width;
        window_.stride_height = op_.stride_height, window_.stride_width = op_.stride_width;
        window_.dilation_height = op_.dilation_height, window_.dilation_width = op_.dilation_width;
        window_.pad_top = op_.padding.top, window_.pad_bottom = op_.padding.bottom;
        window_.pad_left = op_.padding.left, window_.pad_right = op_.padding.right;
        window_.count_include_pad = op_.count_include_pad, window_.divisor = op_.divisor;
    }

    Needs needs() const override { return {windowed() ? pool_scratch(window_) : 0, 0, 0}; }

    void run(const Call& call) const override {
        const std::uint8_t* mask = active(call);
        set_activity(call, [&](int c) { return mask[c]; });
        const auto& k = *kernels_.simple;
        const double reads = windowed() ? static_cast<double>(op_.kernel_height + op_.kernel_width) * static_cast<double>(out().shape.pixels())
                                        : static_cast<double>(in().shape.pixels());
        write_channels(call, reads, [&](int c, Plane y, float* scratch) {
            const ConstPlane x = plane(call, 0, c);
            switch (op_.kind) {
                case Kind::max_pool: return k.max_pool(x, y, window_, scratch);
                case Kind::avg_pool: return k.avg_pool(x, y, window_, scratch);
                case Kind::adaptive_max_pool: return k.adaptive_max_pool(x, y, window_.in, window_.out);
                default: return k.adaptive_avg_pool(x, y, window_.in, window_.out);
            }
        });
    }

private:
    bool windowed() const { return op_.kind == Kind::max_pool || op_.kind == Kind::avg_pool; }

    Window window_;
};

}  // namespace

std::unique_ptr<Step> make_pool_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    return std::make_unique<PoolStep>(program, plan, place, kernels);
}

}  // namespace thrifty
