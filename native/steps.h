// The operators of a program, ready to run.
#pragma once

#include <cstdint>
#include <memory>

#include "context.h"
#include "kernels/dispatch.h"
#include "plan.h"
#include "program.h"

namespace thrifty {

// One image on its way through one operator.
struct Call {
    Context& context;
    Team& team;
    StepTrace* trace = nullptr;                // null: nobody asks
    Marks forced{};                            // decisions that replace the gate's own, on the axes given
};

// The buffers of one operator, for those who work on them.
class Access {
public:
    Access(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels);

protected:
    ~Access() = default;

    const Layout& in(std::size_t i = 0) const { return layout(op_.inputs[i]); }
    const Layout& out() const { return layout(op_.output); }
    const Layout& layout(int buffer) const { return plan_.buffers[static_cast<std::size_t>(buffer)]; }
    Map in_map(const Call& call, std::size_t i = 0) const { return in(i).map(call.context.arena.data()); }
    Map out_map(const Call& call) const { return out().map(call.context.arena.data()); }

    // null: all channels are active.
    const std::uint8_t* active(const Call& call, std::size_t i = 0) const;
    Channels active_list(const Call& call, std::size_t i = 0) const { return list(call, op_.inputs[i]); }
    // For an output that is sparse not only by a guard: writes keep(c) for every channel c as its activity.
    template <class Keep>
    void set_activity(const Call& call, const Keep& keep) const {
        if (!out().whole) write_activity(call, keep);
    }
    template <class Keep>
    void write_activity(const Call& call, const Keep& keep) const {
        Activity& activity = call.context.activities[static_cast<std::size_t>(op_.output)];
        for (int c = 0; c < out().shape.channels; ++c) activity.mask()[c] = keep(c);
        activity.list();
    }
    Channels out_list(const Call& call) const { return list(call, op_.output); }

    ConstPlane zeros() const { return {plan_.zeros.data(), 0}; }

    // A channel of an input, zeros where it is not active.
    ConstPlane plane(const Call& call, std::size_t i, int c) const {
        const std::uint8_t* mask = active(call, i);
        if (mask && !mask[c]) return zeros();
        const Map map = in_map(call, i);
        return {map.channel(c), map.row};
    }

    // Calls use(c, plane of c, scratch) for each active channel of the output, on any thread.
    // `cost`: of one channel, as in Team::share_range.
    template <class Use>
    void write_channels(const Call& call, double cost, const Use& use) const {
        const Channels list = out_list(call);
        const Map map = out_map(call);
        call.team.share_range(list.count, cost, [&](int first, int last, float* scratch) {
            for (int i = first; i < last; ++i) {
                const int c = list.index[i];
                use(c, Plane{map.channel(c), map.row}, scratch);
            }
        });
    }
    // Means of the active channels of the input, one after the other, by a kernel that sums a channel.
    void average(const Call& call, float (*sum)(ConstPlane, Extent), float* means) const;

    Extent extent(const Layout& layout) const { return {layout.shape.height, layout.shape.width}; }

    Channels list(const Call& call, int buffer) const;

    const Operator& op_;
    const Plan& plan_;
    const Kernels& kernels_;
    std::size_t place_;
};

class Step : protected Access {
public:
    using Access::Access;
    virtual ~Step() = default;

    // Writes the output buffer and, where it is sparse not only by a guard, its activity.
    virtual void run(const Call& call) const = 0;

    // In place of `run` where the guard says no, with all channels marked inactive where the output is sparse.
    virtual void skip(const Call&) const {}

    virtual Needs needs() const { return {}; }

    // Name of the kernel, for traces, where it is the same in every call.
    virtual const char* kernel() const { return ""; }
};

// Weights [outputs, features] in the layout that SimpleKernels::linear_panels reads.
Floats panels_of(const float* weight, int outputs, int features);

std::unique_ptr<Step> make_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_conv_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_pointwise_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_moving_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_pool_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_layer_gate_step(const Program&, const Plan&, std::size_t place, const Kernels&);
std::unique_ptr<Step> make_linear_step(const Program&, const Plan&, std::size_t place, const Kernels&);

}  // namespace thrifty
