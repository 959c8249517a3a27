// Convolutions: the kernel that computes what a gate has left, and channels that only a residual fills.

#include <algorithm>

#include "gates.h"

namespace thrifty {
namespace {

class ConvStep final : public Step {
public:
    ConvStep(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : Step(program, plan, place, kernels), gate_(make_gate(program, plan, place, kernels)),
          convolution_(kernels.make_convolution(shape(), op_.weight, op_.bias)) {
        if (op_.gate == Gate::attention) columns_ = kernels.make_column_convolution(shape(), op_.weight, op_.bias);
    }

    Needs needs() const override {
        Needs needs = gate_ ? gate_->needs() : Needs{};
        needs.scratch = std::max(convolution_->scratch(), columns_ ? columns_->scratch() : 0);
        const std::size_t scales = op_.scaled ? static_cast<std::size_t>(out().shape.channels) : 0;
        needs.aside = behind_gate() + std::max(scales, columns_ ? columns_->shared() : 0);
        return needs;
    }

    void run(const Call& call) const override {
        Choice choice;
        choice.read = active_list(call);
        choice.computed = {plan_.all.data(), out().shape.channels};
        if (gate_) gate_->decide(call, choice);
        const std::uint8_t* const residual = op_.inputs.size() == 2 ? active(call, 1) : nullptr;
        set_activity(call, [&](int c) { return choice.is_computed[c] || (residual && residual[c]); });
        if (choice.by_column) run_columns(call, choice);
        else run_channels(call, choice);
    }

    // act(residual), if there is one.
    void skip(const Call& call) const override {
        if (op_.inputs.size() < 2) return;
        const std::uint8_t* const residual = active(call, 1);
        if (out().sparse) write_activity(call, [&](int c) { return residual[c]; });
        write_channels(call, 2.0 * static_cast<double>(out().shape.pixels()),
                       [&](int c, Plane, float*) { pass(call, c, 0, out().shape.height); });
    }

private:
    ConvShape shape() const {
        ConvShape s;
        s.in_channels = in().shape.channels, s.out_channels = out().shape.channels, s.groups = op_.groups;
        s.in_height = in().shape.height, s.in_width = in().shape.width;
        s.out_height = out().shape.height, s.out_width = out().shape.width;
        s.kernel_height = op_.kernel_height, s.kernel_width = op_.kernel_width;
        // A stride that is never taken may be of any size.
        s.stride_height = s.out_height > 1 ? op_.stride_height : 1, s.stride_width = s.out_width > 1 ? op_.stride_width : 1;
        s.pad_top = op_.padding.top, s.pad_left = op_.padding.left;
        s.dilation_height = op_.dilation_height, s.dilation_width = op_.dilation_width;
        s.activation = op_.activation, s.slope = op_.slope;
        s.chooses_inputs = op_.gate == Gate::attention;
        return s;
    }

    // Where the context's `aside` is free for the step itself, at the start of a cache line.
    std::size_t behind_gate() const { return gate_ ? (gate_->needs().aside + 15) / 16 * 16 : 0; }

    float guard_value(const Call& call) const { return *layout(op_.guard).map(call.context.arena.data()).data; }

    template <class ConvolutionCall>
    ConvolutionCall call_of(const Call& call, const Choice& choice) const {
        ConvolutionCall conv;
        conv.in = in_map(call);
        conv.out = out_map(call);
        conv.active_in = choice.read;
        if (op_.inputs.size() == 2) {
            conv.residual = in_map(call, 1);
            conv.residual_active = active(call, 1);
        }
        return conv;
    }

    void run_channels(const Call& call, const Choice& choice) const {
        auto conv = call_of<ConvCall>(call, choice);
        conv.active_out = choice.computed;
        conv.scale = op_.scaled ? scaled(call, choice) : choice.scale;
        if (call.trace) {
            call.trace->macs = convolution_->macs(conv);
            call.trace->kernel = convolution_->kernel(conv);
        }
        const int tasks = conv.active_out.count ? convolution_->tasks(conv, call.team.threads()) : 0;
        share(call, choice, tasks, [&](int task, float* scratch) { convolution_->run(conv, task, tasks, scratch); });
    }

    void run_columns(const Call& call, const Choice& choice) const {
        auto conv = call_of<ColumnCall>(call, choice);
        conv.columns = choice.columns;
        conv.column_count = choice.column_count;
        if (op_.scaled) conv.scale = guard_value(call);
        if (call.trace) {
            call.trace->macs = columns_->macs(conv);
            call.trace->kernel = columns_->kernel();
        }
        float* const shared = call.context.aside.data() + behind_gate();
        const int threads = call.team.threads(), pieces = columns_->prepare_tasks(conv, threads);
        call.team.share(pieces, [&](int task, float* scratch) { columns_->prepare(conv, task, pieces, shared, scratch); });
        const int tasks = columns_->tasks(conv, threads);
        share(call, choice, tasks, [&](int task, float* scratch) { columns_->run(conv, task, tasks, shared, scratch); });
    }

    // The scales of the gate, or 1, times the guard's value.
    const float* scaled(const Call& call, const Choice& choice) const {
        const float value = guard_value(call);
        float* const own = call.context.aside.data() + behind_gate();
        float* const scale = choice.scale ? choice.scale : own;
        for (int c = 0; c < out().shape.channels; ++c) scale[c] = choice.scale ? scale[c] * value : value;
        return scale;
    }

    // Calls use(task, scratch) for each task; besides, channels that are not computed but not zero either are filled:
    // rows of theirs by each task, about those that it computes of the others.
    template <class Use>
    void share(const Call& call, const Choice& choice, int tasks, const Use& use) const {
        const Channels written = out_list(call);
        if (written.count == choice.computed.count) return call.team.share(tasks, use);
        const int pieces = tasks ? tasks : call.team.threads();
        call.team.share(pieces, [&](int task, float* scratch) {
            if (tasks) use(task, scratch);
            const auto cut = [&](int t) { return static_cast<int>(std::int64_t{out().shape.height} * t / pieces); };
            for (int i = 0; i < written.count; ++i)
                if (const int c = written.index[i]; !choice.is_computed[c]) pass(call, c, cut(task), cut(task + 1));
        });
    }

    // Rows of a channel without its convolution: the activation of the residual, or of zero.
    void pass(const Call& call, int c, int first, int last) const {
        ConstPlane from = op_.inputs.size() == 2 ? plane(call, 1, c) : zeros();
        from.data += first * from.row;
        const Map y = out_map(call);
        const Plane to{y.channel(c) + first * y.row, y.row};
        kernels_.simple->affine(from, to, {last - first, y.width}, 1, 0, op_.activation, op_.slope);
    }

    std::unique_ptr<ConvGate> gate_;
    std::unique_ptr<Convolution> convolution_;
    std::unique_ptr<ColumnConvolution> columns_;  // of an attention gate
};

}  // namespace

std::unique_ptr<Step> make_conv_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    return std::make_unique<ConvStep>(program, plan, place, kernels);
}

}  // namespace thrifty
