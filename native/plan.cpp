#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/conv.h"

namespace thrifty {
namespace {

using std::int64_t;

constexpr int64_t line = 16;   // floats of a cache line
constexpr int64_t front = 64;  // floats before the first buffer, so that reading a little before a plane stays inside

int64_t rounded(int64_t value) { return (value + line - 1) / line * line; }

bool sparse_after(const Operator& op, const std::vector<Layout>& buffers) {
    const auto sparse = [&](int buffer) { return buffers[static_cast<std::size_t>(buffer)].sparse; };
    if (!keeps_zero(op.activation)) return false;
    switch (op.kind) {
        case Kind::conv:
            return (op.gate == Gate::topk || op.gate == Gate::clip) && (op.inputs.size() < 2 || sparse(op.inputs[1]));
        case Kind::linear:
        case Kind::layer_norm: return false;
        case Kind::affine: return !op.shift && sparse(op.inputs[0]);
        case Kind::gather:
            return sparse(op.inputs[0]) || std::find(op.index.begin(), op.index.end(), -1) != op.index.end();
        case Kind::pad: return op.value == 0 && sparse(op.inputs[0]);
        case Kind::add: return sparse(op.inputs[0]) && sparse(op.inputs[1]);
        case Kind::mul:
        case Kind::concat: return std::any_of(op.inputs.begin(), op.inputs.end(), sparse);
        case Kind::layer_gate: return true;
        default: return sparse(op.inputs[0]);
    }
}

// Whether a guard can leave channels inactive: all, or of a convolution with a residual those that are in it.
bool sparse_by_guard(const Operator& op, const std::vector<Layout>& buffers) {
    if (op.guard < 0) return false;
    if (op.kind != Kind::conv || op.inputs.size() < 2) return true;
    return keeps_zero(op.activation) && buffers[static_cast<std::size_t>(op.inputs[1])].sparse;
}

struct Life {
    int first = 0, last = 0;  // operators: written by, read last by
};

// Offsets from `start` on of the buffers `group`, the large ones first, each at the lowest place that is free during its
// life. Returns where they end.
int64_t place(std::vector<std::size_t> group, int64_t start, const std::vector<Life>& lives, const std::vector<int64_t>& sizes,
              std::vector<int64_t>& offsets) {
    std::stable_sort(group.begin(), group.end(), [&](auto a, auto b) { return sizes[a] > sizes[b]; });
    std::vector<std::size_t> placed;  // by offset
    int64_t end = start;
    for (const std::size_t buffer : group) {
        int64_t offset = start;
        for (const std::size_t other : placed) {
            if (lives[other].last < lives[buffer].first || lives[buffer].last < lives[other].first) continue;
            if (offsets[other] >= offset + sizes[buffer]) break;
            offset = std::max(offset, offsets[other] + sizes[other]);
        }
        offsets[buffer] = offset;
        end = std::max(end, offset + sizes[buffer]);
        placed.insert(std::upper_bound(placed.begin(), placed.end(), buffer,
                                       [&](auto a, auto b) { return offsets[a] < offsets[b]; }), buffer);
    }
    return end;
}

// Offsets of all buffers, group after group of those whose halos can lie over each other, so that a halo is never part
// of another plane. Sizes of buffers with halos are multiples of their plane, hence so are their offsets in a group.
int64_t place_by_halo(const std::vector<Layout>& buffers, const std::vector<Life>& lives, const std::vector<int64_t>& sizes,
                      std::vector<int64_t>& offsets) {
    const auto alike = [&](std::size_t i, std::size_t j) {
        const Layout &a = buffers[i], &b = buffers[j];
        return a.halo == b.halo &&
               (!a.halo.any() || (a.shape.height == b.shape.height && a.shape.width == b.shape.width));
    };
    std::vector<std::vector<std::size_t>> groups;
    for (std::size_t b = 0; b < buffers.size(); ++b) {
        const auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return alike(group[0], b); });
        if (found != groups.end()) found->push_back(b);
        else groups.push_back({b});
    }
    int64_t end = 0;
    for (auto& group : groups) end = place(std::move(group), end, lives, sizes, offsets);
    return end;
}

}  // namespace

void Plan::clear_halos(float* arena) const {
    const auto zero = [](float* from, std::ptrdiff_t count) { std::fill_n(from, count, 0.0f); };
    for (const Layout& layout : buffers) {
        const Padding& halo = layout.halo;
        if (!halo.any()) continue;
        const Map map = layout.map(arena);
        for (int c = 0; c < map.channels; ++c) {
            float* const plane = map.channel(c);
            zero(plane - halo.top * map.row - halo.left, halo.top * map.row + halo.left);
            // The right of one row and the left of the next lie side by side.
            for (int h = 0; h < map.height - 1; ++h) zero(plane + h * map.row + map.width, halo.left + halo.right);
            zero(plane + (map.height - 1) * map.row + map.width, halo.right + halo.bottom * map.row);
        }
    }
}

Plan make_plan(const Program& program, const Limits& limits) {
    const std::size_t count = program.buffers.size();
    Plan plan;
    plan.buffers.resize(count);
    std::vector<Life> lives(count);
    for (std::size_t b = 0; b < count; ++b) plan.buffers[b].shape = program.buffers[b];
    for (std::size_t i = 0; i < program.operators.size(); ++i) {
        const Operator& op = program.operators[i];
        Layout& out = plan.buffers[static_cast<std::size_t>(op.output)];
        const Layout& in = plan.buffers[static_cast<std::size_t>(op.inputs[0])];
        out.whole = !sparse_after(op, plan.buffers);
        out.sparse = !out.whole || sparse_by_guard(op, plan.buffers);
        out.granule = op.kind == Kind::flatten ? static_cast<int>(in.shape.pixels()) * in.granule : 1;
        if (op.kind == Kind::activation || op.kind == Kind::affine) out.granule = in.granule;
        lives[static_cast<std::size_t>(op.output)] = {static_cast<int>(i), static_cast<int>(i)};
        for (const int input : op.inputs) lives[static_cast<std::size_t>(input)].last = static_cast<int>(i);
        if (op.guard >= 0) lives[static_cast<std::size_t>(op.guard)].last = static_cast<int>(i);
        if (op.kind == Kind::conv) {
            Padding& halo = plan.buffers[static_cast<std::size_t>(op.inputs[0])].halo;
            halo.top = std::max(halo.top, op.padding.top);
            halo.bottom = std::max(halo.bottom, op.padding.bottom);
            halo.left = std::max(halo.left, op.padding.left);
            halo.right = std::max(halo.right, op.padding.right);
        }
    }
    lives[static_cast<std::size_t>(program.output)].last = static_cast<int>(program.operators.size());

    std::vector<int64_t> sizes(count), offsets(count);
    for (std::size_t b = 0; b < count; ++b) {
        Layout& layout = plan.buffers[b];
        const Shape& shape = layout.shape;
        const Padding& halo = layout.halo;
        layout.row = int64_t{shape.width} + halo.left + halo.right;
        layout.plane = layout.row * (int64_t{shape.height} + halo.top + halo.bottom);  // < 2^53
        int64_t size;
        if (__builtin_mul_overflow(static_cast<int64_t>(layout.plane), int64_t{shape.channels}, &size) ||
            size > limits.memory / 4)
            throw std::invalid_argument("buffer " + std::to_string(b) + " with its padding takes more than the limit of " +
                                        std::to_string(limits.memory) + " bytes.");
        if (halo.any()) layout.plane = rounded(layout.plane);  // so that planes lie over planes
        // Planes a power of two apart would share a few sets of the cache. Vectors stay dense.
        if (layout.plane % 256 == 0) layout.plane += line;
        sizes[b] = rounded(layout.plane * shape.channels);
    }
    int64_t lists = 0;  // bytes of lists of channels, that each buffer or operator has of its own
    for (const Layout& layout : plan.buffers) lists += layout.sparse ? 5 * int64_t{layout.shape.channels} : 0;
    for (const Operator& op : program.operators)
        if (op.kind == Kind::concat || op.kind == Kind::gather)
            lists += 16 * int64_t{program.buffers[static_cast<std::size_t>(op.output)].channels};
    const int64_t total = front + place_by_halo(plan.buffers, lives, sizes, offsets) + static_cast<int64_t>(read_ahead);
    if (total > (limits.memory - lists) / 4)
        throw std::invalid_argument("the activations of one image take " + std::to_string(total * 4 + lists) +
                                    " bytes, more than the limit of " + std::to_string(limits.memory) + ".");
    for (std::size_t b = 0; b < count; ++b) {
        Layout& layout = plan.buffers[b];
        layout.offset = front + offsets[b] + layout.halo.top * layout.row + layout.halo.left;
    }
    plan.arena = static_cast<std::size_t>(rounded(total));
    int channels = 0, width = 0;
    for (const Shape& shape : program.buffers) {
        channels = std::max(channels, shape.channels);
        width = std::max(width, shape.width);
    }
    plan.all.resize(static_cast<std::size_t>(channels));
    std::iota(plan.all.begin(), plan.all.end(), 0);
    plan.zeros.resize(static_cast<std::size_t>(width));
    return plan;
}

}  // namespace thrifty
