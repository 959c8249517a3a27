// Convolutions: the gate that decides, the kernel that computes what is left, and channels that only a residual fills.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "steps.h"

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

// Marks the k highest saliencies; equal ones go to the lowest index, NaN counts as lowest. `sorted`: [count] to work in.
void mark_winners(const float* saliency, int count, int k, float* sorted, std::uint8_t* computed) {
    const auto score = [&](int c) { return std::isnan(saliency[c]) ? -1.0f : saliency[c]; };
    for (int c = 0; c < count; ++c) sorted[c] = score(c);
    std::nth_element(sorted, sorted + (k - 1), sorted + count, [](float a, float b) { return a > b; });
    const float least = sorted[k - 1];
    int ties = k;
    for (int c = 0; c < count; ++c) ties -= score(c) > least;
    for (int c = 0; c < count; ++c) {
        const float s = score(c);
        const bool tie = s == least && ties > 0;
        ties -= tie;
        computed[c] = s > least || tie;
    }
}

class ConvStep final : public Step {
public:
    ConvStep(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : Step(program, plan, place, kernels), convolution_(kernels.make_convolution(shape(), op_.weight, op_.bias)),
          predictor_(op_.gated ? panels_of(op_.gate_weight, out().shape.channels, in().shape.channels) : Floats()) {}

    Needs needs() const override {
        const auto inputs = static_cast<std::size_t>(in().shape.channels);
        const auto outputs = static_cast<std::size_t>(out().shape.channels);
        return {convolution_->scratch(), op_.gated ? inputs + 2 * outputs : 0, op_.gated ? outputs : 0};
    }

    const char* kernel() const override { return convolution_->kernel(); }

    void run(const Call& call) const override {
        ConvCall conv;
        conv.in = in_map(call);
        conv.out = out_map(call);
        conv.active_in = active_list(call);
        if (op_.inputs.size() == 2) {
            conv.residual = in_map(call, 1);
            conv.residual_active = active(call, 1);
        }
        conv.active_out = {plan_.all.data(), out().shape.channels};
        if (op_.gated) decide(call, conv);
        if (call.trace) call.trace->macs = convolution_->macs(conv);
        compute(call, conv);
    }

private:
    ConvShape shape() const {
        ConvShape s;
        s.in_channels = in().shape.channels, s.out_channels = out().shape.channels, s.groups = op_.groups;
        s.in_height = in().shape.height, s.in_width = in().shape.width;
        s.out_height = out().shape.height, s.out_width = out().shape.width;
        s.kernel_height = op_.kernel_height, s.kernel_width = op_.kernel_width;
        s.stride_height = op_.stride_height, s.stride_width = op_.stride_width;
        s.pad_top = op_.padding.top, s.pad_left = op_.padding.left;
        s.dilation_height = op_.dilation_height, s.dilation_width = op_.dilation_width;
        s.activation = op_.activation, s.slope = op_.slope;
        return s;
    }

    // Chooses the output channels, with their scales, and sets the output's activity.
    void decide(const Call& call, ConvCall& conv) const {
        const auto start = call.trace ? Clock::now() : Clock::time_point{};
        const int inputs = in().shape.channels, outputs = out().shape.channels;
        const Channels read = active_list(call);
        float* const means = call.context.aside.data();  // of the channels that are read, one after the other
        float* const saliency = means + inputs;
        const Map x = in_map(call);
        const auto pixels = static_cast<float>(x.pixels());
        call.team.share_range(read.count, pixels / 4, [&](int first, int last, float*) {
            for (int i = first; i < last; ++i)
                means[i] = kernels_.simple->sum_magnitude({x.channel(read.index[i]), x.row}, extent(in())) / pixels;
        });
        call.team.share_range(outputs, read.count, [&](int first, int last, float*) {
            kernels_.simple->linear_panels(predictor_.data(), op_.gate_bias, means, read.index, read.count, saliency, inputs, first, last);
        }, linear_panel);
        kernels_.simple->activate(saliency, outputs, Activation::relu, 0);
        std::uint8_t* const computed = call.context.computed.data();
        if (call.forced)
            for (int c = 0; c < outputs; ++c) computed[c] = call.forced[c] != 0;
        else
            mark_winners(saliency, outputs, call.context.winners[place_], saliency + outputs, computed);
        int* const index = call.context.indices.data();
        int count = 0;
        for (int c = 0; c < outputs; ++c)
            if (computed[c]) index[count++] = c;
        conv.active_out = {index, count};
        conv.scale = saliency;
        const bool residual = op_.inputs.size() == 2;
        set_activity(call, [&](int c) { return computed[c] || (residual && conv.residual_active[c]); });
        if (call.trace) {
            call.trace->gate_ms = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
            call.trace->gate_macs = in().shape.size() + std::int64_t{inputs} * outputs;
            call.trace->computed = computed;
        }
    }

    void compute(const Call& call, const ConvCall& conv) const {
        const int tasks = conv.active_out.count ? convolution_->tasks(conv, call.team.threads()) : 0;
        // Channels that are not computed but not zero either, and the halo of all.
        const Channels written = out_list(call);
        const bool others = written.count > conv.active_out.count;
        const int cleaners = others || out().halo.any() ? std::min(call.team.threads(), (written.count + 15) / 16) : 0;
        call.team.share(tasks + cleaners, [&](int task, float* scratch) {
            if (task < tasks) return convolution_->run(conv, task, tasks, scratch);
            const auto cut = [&](int t) { return static_cast<int>(std::int64_t{written.count} * t / cleaners); };
            for (int i = cut(task - tasks); i < cut(task - tasks + 1); ++i) {
                const int c = written.index[i];
                clear_halo(out(), conv.out, c);
                if (others && !call.context.computed[static_cast<std::size_t>(c)]) pass(call, conv, c);
            }
        });
    }

    // A channel without its convolution: the activation of the residual, or of zero.
    void pass(const Call& call, const ConvCall& conv, int c) const {
        const ConstPlane from = conv.residual.data ? plane(call, 1, c) : zeros();
        kernels_.simple->affine(from, Plane{conv.out.channel(c), conv.out.row}, extent(out()), 1, 0, op_.activation, op_.slope);
    }

    std::unique_ptr<Convolution> convolution_;
    Floats predictor_;  // by input channel, so that the mean of a channel that is zero need not be multiplied
};

}  // namespace

std::unique_ptr<Step> make_conv_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    return std::make_unique<ConvStep>(program, plan, place, kernels);
}

}  // namespace thrifty
