#include "gates.h"

#include <algorithm>

namespace thrifty {
namespace {

constexpr auto channels_axis = static_cast<std::size_t>(Axis::channels);
constexpr auto columns_axis = static_cast<std::size_t>(Axis::columns);

void copy_marks(const std::uint8_t* from, int count, std::uint8_t* to) {
    for (int i = 0; i < count; ++i) to[i] = from[i] != 0;
}

// Writes the marked numbers of 0 .. count - 1 in rising order, and returns how many they are.
int list_marked(const std::uint8_t* marks, int count, int* index) {
    int found = 0;
    for (int i = 0; i < count; ++i) {
        index[found] = i;
        found += marks[i];
    }
    return found;
}

// FBS and C-Net: output channels, by a linear function of the means of input channels.
class OutputGate final : public ConvGate {
public:
    OutputGate(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : ConvGate(program, plan, place, kernels),
          predictor_(panels_of(op_.gate_weight, out().shape.channels, in().shape.channels)) {}

    Needs needs() const override {
        const auto inputs = static_cast<std::size_t>(in().shape.channels);
        const auto outputs = static_cast<std::size_t>(out().shape.channels);
        return {0, inputs + outputs, 2 * outputs + 1};
    }

    void decide(const Call& call, Choice& choice) const override {
        const GateTimer timer(call.trace);
        const auto& kernels = *kernels_.simple;
        const bool topk = op_.gate == Gate::topk;
        const int inputs = in().shape.channels, outputs = out().shape.channels;
        float* const means = call.context.aside.data();
        float* const saliency = means + inputs;
        average(call, topk ? kernels.sum_magnitude : kernels.sum, means);
        const Channels read = choice.read;
        call.team.share_range(outputs, read.count, [&](int first, int last, float*) {
            kernels.linear_panels(predictor_.data(), op_.gate_bias, means, read.index, read.count, saliency, inputs, first, last);
        }, linear_panel);
        kernels.activate(saliency, outputs, Activation::relu, 0);
        if (!topk)
            for (int c = 0; c < outputs; ++c) saliency[c] = saliency[c] > 1 ? 1 : saliency[c];
        std::uint8_t* const marks = call.context.marks.data();
        const GateSettings& settings = call.context.settings[place_];
        if (const std::uint8_t* forced = call.forced[channels_axis]) copy_marks(forced, outputs, marks);
        else if (topk) kernels.mark_highest(saliency, outputs, settings.channels, call.context.indices.data() + outputs + 1, marks);
        else
            for (int c = 0; c < outputs; ++c) marks[c] = static_cast<double>(saliency[c]) > settings.threshold;
        int* const index = call.context.indices.data();
        choice.computed = {index, list_marked(marks, outputs, index)};
        choice.is_computed = marks;
        choice.scale = saliency;
        if (call.trace) {
            call.trace->gate_macs = in().shape.size() + std::int64_t{inputs} * outputs;
            call.trace->decisions[channels_axis] = marks;
        }
    }

private:
    Floats predictor_;  // by input channel, so that the mean of a channel that is zero need not be multiplied
};

// AntiDote: input channels and positions, by their mean magnitude. Sums rank as means do.
class AttentionGate final : public ConvGate {
public:
    using ConvGate::ConvGate;

    Needs needs() const override {
        const auto channels = static_cast<std::size_t>(in().shape.channels);
        const auto pixels = static_cast<std::size_t>(in().shape.pixels());
        return {0, std::max(channels, pixels), channels + pixels + 2 + std::max(channels, pixels)};
    }

    void decide(const Call& call, Choice& choice) const override {
        const GateSettings& settings = call.context.settings[place_];
        const int channels = in().shape.channels, pixels = static_cast<int>(in().shape.pixels());
        const std::uint8_t *forced_channels = call.forced[channels_axis], *forced_columns = call.forced[columns_axis];
        const bool by_channel = forced_channels || settings.channels < channels;
        choice.by_column = forced_columns || settings.columns < pixels;
        if (!by_channel && !choice.by_column) return;

        const GateTimer timer(call.trace);
        std::uint8_t* const channel_marks = call.context.marks.data();
        std::uint8_t* const column_marks = channel_marks + channels;
        int* const index = call.context.indices.data();
        float* const scores = call.context.aside.data();
        int* const keys = index + channels + pixels + 2;
        const Channels active = choice.read;
        if (by_channel) {
            score_channels(call, active, scores);
            if (forced_channels) copy_marks(forced_channels, channels, channel_marks);
            else kernels_.simple->mark_highest(scores, channels, settings.channels, keys, channel_marks);
            int count = 0;
            for (int i = 0; i < active.count; ++i)
                if (channel_marks[active.index[i]]) index[count++] = active.index[i];
            choice.read = {index, count};
        }
        if (choice.by_column) {
            score_columns(call, active, scores);
            if (forced_columns) copy_marks(forced_columns, pixels, column_marks);
            else kernels_.simple->mark_highest(scores, pixels, settings.columns, keys, column_marks);
            choice.columns = index + channels;
            choice.column_count = list_marked(column_marks, pixels, index + channels);
        }
        if (call.trace) {
            call.trace->gate_macs = in().shape.size() * (by_channel + choice.by_column);
            if (by_channel) call.trace->decisions[channels_axis] = channel_marks;
            if (choice.by_column) call.trace->decisions[columns_axis] = column_marks;
        }
    }

private:
    void score_channels(const Call& call, Channels active, float* scores) const {
        const Map x = in_map(call);
        std::fill_n(scores, x.channels, 0.0f);
        call.team.share_range(active.count, x.pixels() / 4.0, [&](int first, int last, float*) {
            for (int i = first; i < last; ++i) {
                const int c = active.index[i];
                scores[c] = kernels_.simple->sum_magnitude({x.channel(c), x.row}, extent(in()));
            }
        });
    }

    void score_columns(const Call& call, Channels active, float* scores) const {
        const Map x = in_map(call);
        call.team.share_range(x.height, active.count * x.width / 4.0, [&](int first, int last, float*) {
            kernels_.simple->sum_columns(x, active, first, last, scores);
        });
    }
};

}  // namespace

std::unique_ptr<ConvGate> make_gate(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    switch (program.operators[place].gate) {
        case Gate::topk:
        case Gate::clip: return std::make_unique<OutputGate>(program, plan, place, kernels);
        case Gate::attention: return std::make_unique<AttentionGate>(program, plan, place, kernels);
        default: return nullptr;
    }
}

}  // namespace thrifty
