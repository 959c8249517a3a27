// What the forms of convolution share: how work is cut, and what happens to a sum before it is written.

struct Range {
    int first, last;

    bool empty() const { return first >= last; }
};

inline Range share(int count, int part, int parts) {
    return {static_cast<int>(std::int64_t{count} * part / parts),
            static_cast<int>(std::int64_t{count} * (part + 1) / parts)};
}

// Heights of tiles: six, or what lets the last ones be of a height that has enough sums to keep the adders busy.
inline int next_rows(int left) {
    if (left <= 6) return left;
    return left == 7 || left == 8 ? 4 : 6;
}

inline std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Calls visit(active inputs, active outputs) for each group that has outputs to compute.
template <class Visit>
void each_group(const ConvShape& shape, const ConvCall& call, Visit visit) {
    const int ins = shape.in_per_group(), outs = shape.out_per_group();
    int i = 0, o = 0;
    for (int g = 0; g < shape.groups && o < call.active_out.count; ++g) {
        const int first_in = i, first_out = o;
        while (i < call.active_in.count && call.active_in.index[i] < (g + 1) * ins) ++i;
        while (o < call.active_out.count && call.active_out.index[o] < (g + 1) * outs) ++o;
        if (o > first_out) {
            visit(Channels{call.active_in.index + first_in, i - first_in},
                  Channels{call.active_out.index + first_out, o - first_out});
        }
    }
}

inline std::int64_t macs_of(const ConvShape& shape, const ConvCall& call) {
    std::int64_t pairs = 0;
    each_group(shape, call, [&](Channels in, Channels out) { pairs += std::int64_t{in.count} * out.count; });
    return pairs * shape.taps() * shape.out_height * shape.out_width;
}

inline constexpr int tasks_of_thread = 4;  // at most: a thread that the system holds up leaves its tasks to the others

// How many tasks a call is worth.
inline int tasks_for(std::int64_t macs, int threads) {
    constexpr std::int64_t smallest = 1 << 18;  // MACs: some five microseconds
    return threads == 1 ? 1 : static_cast<int>(std::clamp<std::int64_t>(macs / smallest, 1, tasks_of_thread * threads));
}

// The work is a rectangle, columns by output channels. Tasks share the columns; where there are few, channels too, but
// no more than it takes to give every thread as much: what is made ready for a column is made by each of its tasks.
struct Cut {
    int across, down = 1;

    Cut(int columns, int tasks, int least_columns) : across(std::clamp(columns / least_columns, 1, tasks)) {
        const int threads = std::max(2, (tasks + tasks_of_thread - 1) / tasks_of_thread);
        const auto even = [&] { return across * down % threads == 0 || across * down >= tasks_of_thread * threads; };
        while (!even() && across * (down + 1) <= tasks) ++down;
    }

    Range columns(int task, int count) const { return share(count, task % across, across); }
    Range channels(int task, int count) const {
        return task < across * down ? share(count, task / across, down) : Range{0, 0};
    }
};

// The activations that need more than a few instructions: a call, so that every tile stays small.
__attribute__((noinline)) V activate_lanes(V x, Activation activation, float slope) {
    with_activation(activation, [&](auto chosen) {
        for (int i = 0; i < lanes; ++i) x[i] = activated<chosen.activation>(x[i], slope);
    });
    return x;
}

inline V activate(V x, Activation activation, float slope) {
    switch (activation) {
        case Activation::none: return x;
        case Activation::relu: return max(V{}, x);
        case Activation::relu6: return min(broadcast(6.0f), max(V{}, x));
        default: return activate_lanes(x, activation, slope);
    }
}

// Scale, residual and activation of one output channel.
struct Finish {
    float* out;
    const float* residual;  // null: none
    V bias, scale;
    Activation activation;
    float slope;

    Finish() = default;
    Finish(const ConvCall& call, int o, const float* biases, const ConvShape& shape)
        : out(call.out.channel(o)),
          residual(call.residual.data && (!call.residual_active || call.residual_active[o]) ? call.residual.channel(o)
                                                                                            : nullptr),
          bias(broadcast(biases[o])),
          scale(broadcast(call.scale ? call.scale[o] : 1.0f)), activation(shape.activation), slope(shape.slope) {}

    // `at` and `residual_at`: floats from the first pixel of a plane to the first of these.
    void write(V sum, std::ptrdiff_t at, std::ptrdiff_t residual_at, int pixels) const {
        V v = (sum + bias) * scale;
        if (residual) v += load(residual + residual_at);
        store_part(out + at, activate(v, activation, slope), pixels);
    }
};
