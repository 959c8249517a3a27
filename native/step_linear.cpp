// Linear layers. Of a sparse input only the active features are read, and so are their weights: as runs of neighbours
// where whole maps were flattened, else through weights that lie feature by feature.

#include "steps.h"

namespace thrifty {
namespace {

constexpr int long_run = 16;  // features from which on runs are worth it

class LinearStep final : public Step {
public:
    LinearStep(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
        : Step(program, plan, place, kernels), runs_(in().sparse && in().granule >= long_run),
          panels_(in().sparse && !runs_) {
        if (panels_) weights_ = panels_of(op_.weight, out().shape.channels, in().shape.channels);
    }

    Needs needs() const override {
        const auto features = static_cast<std::size_t>(in().shape.channels);
        return {0, features + static_cast<std::size_t>(out().shape.channels), in().sparse ? features : 0};
    }

    const char* kernel() const override { return panels_ ? "panels" : runs_ ? "runs" : "rows"; }

    void run(const Call& call) const override {
        const Map from = in_map(call), to = out_map(call);
        const int features = from.channels, outputs = to.channels;
        const Channels list = active_list(call);
        const auto& k = *kernels_.simple;
        float* const aside = call.context.aside.data();
        float* const y = to.plane == 1 ? to.data : aside + features;
        const float* x = aside;
        if (panels_)
            for (int i = 0; i < list.count; ++i) aside[i] = *from.channel(list.index[i]);
        else if (from.plane == 1) x = from.data;
        else
            for (int i = 0; i < list.count; ++i) aside[list.index[i]] = *from.channel(list.index[i]);
        const int runs = runs_ ? find_runs(list, call.context.runs.data()) : 0;
        call.team.share_range(outputs, list.count, [&](int first, int last, float*) {
            if (panels_) k.linear_panels(weights_.data(), op_.bias, x, list.index, list.count, y, features, first, last);
            else if (runs_) k.linear_runs(op_.weight, op_.bias, x, y, features, call.context.runs.data(), runs, first, last);
            else k.linear_rows(op_.weight, op_.bias, x, y, features, first, last);
            k.activate(y + first, last - first, op_.activation, op_.slope);
        }, panels_ ? linear_panel : linear_block);
        if (to.plane != 1)
            for (int o = 0; o < outputs; ++o) *to.channel(o) = y[o];
        if (call.trace) {
            std::int64_t read = list.count;
            if (runs_) {
                read = 0;
                for (int r = 0; r < runs; ++r) read += call.context.runs[static_cast<std::size_t>(r)].count;
            }
            call.trace->macs = read * outputs;
        }
    }

private:
    static int find_runs(Channels list, Run* runs) {
        int count = 0;
        for (int i = 0; i < list.count; ++i) {
            if (i && list.index[i] == list.index[i - 1] + 1) ++runs[count - 1].count;
            else runs[count++] = {list.index[i], 1};
        }
        return count;
    }

    bool runs_, panels_;
    Floats weights_;
};

}  // namespace

Floats panels_of(const float* weight, int outputs, int features) {
    const int panels = (outputs + linear_panel - 1) / linear_panel;
    Floats result(static_cast<std::size_t>(panels) * linear_panel * static_cast<std::size_t>(features));
    for (int o = 0; o < outputs; ++o) {
        const float* row = weight + static_cast<std::ptrdiff_t>(o) * features;
        float* panel = result.data() + static_cast<std::ptrdiff_t>(o / linear_panel) * linear_panel * features + o % linear_panel;
        for (int f = 0; f < features; ++f) panel[static_cast<std::ptrdiff_t>(f) * linear_panel] = row[f];
    }
    return result;
}

std::unique_ptr<Step> make_linear_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    return std::make_unique<LinearStep>(program, plan, place, kernels);
}

}  // namespace thrifty
