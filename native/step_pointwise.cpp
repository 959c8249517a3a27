// Operators that work position by position: affine, activation, add, mul, layer_norm.

#include "steps.h"

namespace thrifty {
namespace {

class AffineStep final : public Step {
public:
    using Step::Step;

    void run(const Call& call) const override {
        const std::uint8_t* mask = active(call);
        set_activity(call, [&](int c) { return mask[c]; });
        write_channels(call, 2.0 * static_cast<double>(out().shape.pixels()), [&](int c, Plane y, float*) {
            kernels_.simple->affine(plane(call, 0, c), y, extent(out()), op_.scale ? op_.scale[c] : 1,
                                    op_.shift ? op_.shift[c] : 0, op_.activation, op_.slope);
        });
    }
};

class BinaryStep final : public Step {
public:
    using Step::Step;

    void run(const Call& call) const override {
        const std::uint8_t *a = active(call, 0), *b = active(call, 1);
        const bool single = in(1).shape.channels == 1 && out().shape.channels > 1;  // (1, H, W)
        const auto left = [&](int c) { return !a || a[c]; };
        const auto right = [&](int c) { return !b || b[single ? 0 : c]; };
        const bool sum = op_.kind == Kind::add;
        set_activity(call, [&](int c) { return sum ? left(c) || right(c) : left(c) && right(c); });
        const Map other = in_map(call, 1);
        const bool constant = in(1).shape.vector();
        write_channels(call, 3.0 * static_cast<double>(out().shape.pixels()), [&](int c, Plane y, float*) {
            const auto& k = *kernels_.simple;
            if (!sum && !(left(c) && right(c)))
                k.affine(zeros(), y, extent(out()), 1, 0, op_.activation, op_.slope);
            else if (constant) {
                const float value = right(c) ? *other.channel(single ? 0 : c) : 0;
                k.affine(plane(call, 0, c), y, extent(out()), sum ? 1 : value, sum ? value : 0, op_.activation, op_.slope);
            } else {
                (sum ? k.add : k.multiply)(plane(call, 0, c), plane(call, 1, single ? 0 : c), y, extent(out()),
                                           op_.activation, op_.slope);
            }
        });
    }
};

class LayerNormStep final : public Step {
public:
    using Step::Step;

    void run(const Call& call) const override {
        const Map x = in_map(call), y = out_map(call);
        const std::uint8_t* mask = active(call);
        const double channels = x.channels;
        const auto norm = [&](const Map& from, const Map& to, int first, int last) {
            kernels_.simple->layer_norm(from, mask, to, op_.weight, op_.bias, op_.epsilon, first, last);
        };
        if (x.row == x.width && y.row == y.width) {  // no gaps: pieces of one long row
            constexpr int piece = 64;
            const int pixels = x.pixels();
            call.team.share_range(pixels, 6 * channels, [&](int first, int last, float*) {
                Map from = x, to = y;
                from.data += first, to.data += first;
                from.height = to.height = 1;
                from.width = to.width = last - first;
                norm(from, to, 0, 1);
            }, piece);
        } else {
            call.team.share_range(x.height, 6 * channels * x.width, [&](int first, int last, float*) { norm(x, y, first, last); });
        }
    }
};

}  // namespace

std::unique_ptr<Step> make_pointwise_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    switch (program.operators[place].kind) {
        case Kind::add:
        case Kind::mul: return std::make_unique<BinaryStep>(program, plan, place, kernels);
        case Kind::layer_norm: return std::make_unique<LayerNormStep>(program, plan, place, kernels);
        default: return std::make_unique<AffineStep>(program, plan, place, kernels);
    }
}

}  // namespace thrifty
