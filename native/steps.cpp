#include "steps.h"

namespace thrifty {

Context::Context(const Plan& plan, const Needs& needs)
    : arena(plan.arena), aside(needs.aside), indices(needs.entries), marks(needs.entries),
      runs(needs.entries) {
    activities.reserve(plan.buffers.size());
    for (const Layout& layout : plan.buffers) activities.emplace_back(layout.sparse ? layout.shape.channels : 0);
}

Access::Access(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels)
    : op_(program.operators[place]), plan_(plan), kernels_(kernels), place_(place) {}

const std::uint8_t* Access::active(const Call& call, std::size_t i) const {
    return in(i).sparse ? call.context.activities[static_cast<std::size_t>(op_.inputs[i])].mask() : nullptr;
}

Channels Access::list(const Call& call, int buffer) const {
    const Layout& found = layout(buffer);
    return found.sparse ? call.context.activities[static_cast<std::size_t>(buffer)].channels()
                        : Channels{plan_.all.data(), found.shape.channels};
}

void Access::average(const Call& call, float (*sum)(ConstPlane, Extent), float* means) const {
    const Channels read = active_list(call);
    const Map x = in_map(call);
    const auto pixels = static_cast<float>(x.pixels());
    call.team.share_range(read.count, pixels / 4, [&](int first, int last, float*) {
        for (int i = first; i < last; ++i) means[i] = sum({x.channel(read.index[i]), x.row}, extent(in())) / pixels;
    });
}

std::unique_ptr<Step> make_step(const Program& program, const Plan& plan, std::size_t place, const Kernels& kernels) {
    switch (program.operators[place].kind) {
        case Kind::conv: return make_conv_step(program, plan, place, kernels);
        case Kind::layer_gate: return make_layer_gate_step(program, plan, place, kernels);
        case Kind::linear: return make_linear_step(program, plan, place, kernels);
        case Kind::affine:
        case Kind::activation:
        case Kind::add:
        case Kind::mul:
        case Kind::layer_norm: return make_pointwise_step(program, plan, place, kernels);
        case Kind::concat:
        case Kind::gather:
        case Kind::pad:
        case Kind::flatten: return make_moving_step(program, plan, place, kernels);
        case Kind::max_pool:
        case Kind::avg_pool:
        case Kind::adaptive_avg_pool:
        case Kind::adaptive_max_pool: return make_pool_step(program, plan, place, kernels);
    }
    return nullptr;
}

}  // namespace thrifty
