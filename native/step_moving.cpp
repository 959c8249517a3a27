// Operators that move values and change none: concat, gather, pad, flatten.

#include <algorithm>
#include <cstring>

#include "steps.h"

namespace thrifty {
namespace {

void copy_rows(ConstPlane x, Plane y, Extent e) {
    if (x.row == e.width && y.row == e.width) e = {1, e.height * e.width};
    for (int h = 0; h < e.height; ++h)
        std::memcpy(y.data + h * y.row, x.data + h * x.row, static_cast<std::size_t>(e.width) * sizeof(float));
}

// Concat and gather: each output channel is one channel of one input.
class CopyStep final : public Step {
public:
    CopyStep(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : Step(program, plan, place, kernels) {
        sources_.reserve(static_cast<std::size_t>(out().shape.channels));
        if (op_.kind == Kind::gather)
            for (const int c : op_.index) sources_.push_back({0, c});
        else
            for (std::size_t i = 0; i < op_.inputs.size(); ++i)
                for (int c = 0; c < in(i).shape.channels; ++c) sources_.push_back({i, c});
    }

    void run(const Call& call) const override {
        set_activity(call, [&](int c) {
            const Source& from = source(c);
            if (from.channel < 0) return false;
            const std::uint8_t* mask = active(call, from.input);
            return !mask || mask[from.channel];
        });
        write_channels(call, 2.0 * static_cast<double>(out().shape.pixels()), [&](int c, Plane y, float*) {
            const Source& from = source(c);
            copy_rows(from.channel < 0 ? zeros() : plane(call, from.input, from.channel), y, extent(out()));
        });
    }

private:
    struct Source {
        std::size_t input;
        int channel;
    };
    const Source& source(int c) const { return sources_[static_cast<std::size_t>(c)]; }

    std::vector<Source> sources_;
};

class PadStep final : public Step {
public:
    using Step::Step;

    void run(const Call& call) const override {
        const std::uint8_t* mask = active(call);
        set_activity(call, [&](int c) { return mask[c]; });
        const Padding& p = op_.padding;
        const Extent inner = extent(in());
        write_channels(call, 2.0 * static_cast<double>(out().shape.pixels()), [&](int c, Plane y, float*) {
            const int height = out().shape.height, width = out().shape.width;
            for (int h = 0; h < height; ++h) {
                float* const row = y.data + h * y.row;
                const bool inside = h >= p.top && h < p.top + inner.height;
                std::fill_n(row, inside ? p.left : width, op_.value);
                if (inside) std::fill_n(row + p.left + inner.width, p.right, op_.value);
            }
            copy_rows(plane(call, 0, c), Plane{y.data + p.top * y.row + p.left, y.row}, inner);
        });
    }
};

class FlattenStep final : public Step {
public:
    using Step::Step;

    void run(const Call& call) const override {
        const Map from = in_map(call), to = out_map(call);
        const int pixels = from.pixels();
        const std::uint8_t* mask = active(call);
        set_activity(call, [&](int f) { return mask[f / pixels]; });
        const Channels list = active_list(call);
        call.team.share_range(list.count, 2.0 * pixels, [&](int first, int last, float*) {
            for (int i = first; i < last; ++i) {
                const int c = list.index[i];
                for (int h = 0; h < from.height; ++h) {
                    const float* row = from.channel(c) + h * from.row;
                    const int feature = c * pixels + h * from.width;
                    if (to.plane == 1) {
                        std::memcpy(to.channel(feature), row, static_cast<std::size_t>(from.width) * sizeof(float));
                        continue;
                    }
                    for (int w = 0; w < from.width; ++w) *to.channel(feature + w) = row[w];
                }
            }
        });
    }
};

}  // namespace

std::unique_ptr<Step> make_moving_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    switch (program.operators[place].kind) {
        case Kind::pad: return std::make_unique<PadStep>(program, plan, place, kernels);
        case Kind::flatten: return std::make_unique<FlattenStep>(program, plan, place, kernels);
        default: return std::make_unique<CopyStep>(program, plan, place, kernels);
    }
}

}  // namespace thrifty
