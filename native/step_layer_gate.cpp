// L-Net: whether the operators run whose guard its output is. The output is active where they do.

#include "gates.h"

namespace thrifty {
namespace {

class LayerGateStep final : public Step {
public:
    using Step::Step;

    Needs needs() const override { return {0, static_cast<std::size_t>(in().shape.channels), 0}; }

    void run(const Call& call) const override {
        constexpr auto layer = static_cast<std::size_t>(Axis::layer);
        const GateTimer timer(call.trace);
        float* const means = call.context.aside.data();
        average(call, kernels_.simple->sum, means);
        const Channels read = active_list(call);
        float score = *op_.bias;
        for (int i = 0; i < read.count; ++i) score += op_.weight[read.index[i]] * means[i];
        score = score < 0 ? 0 : score > 1 ? 1 : score;
        const std::uint8_t* const forced = call.forced[layer];
        const bool runs = forced ? *forced != 0 : static_cast<double>(score) > call.context.settings[place_].threshold;
        Activity& activity = call.context.activities[static_cast<std::size_t>(op_.output)];
        activity.fill(runs);
        *out_map(call).data = runs ? score : 0;
        if (call.trace) {
            call.trace->gate_macs = in().shape.size() + in().shape.channels;
            call.trace->decisions[layer] = activity.mask();
        }
    }
};

}  // namespace

std::unique_ptr<Step> make_layer_gate_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    return std::make_unique<LayerGateStep>(program, plan, place, kernels);
}

}  // namespace thrifty
