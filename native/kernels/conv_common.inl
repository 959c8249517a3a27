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

// Floats of scratch that `count` values of T take, in whole cache lines.
template <class T>
std::size_t floats_of(std::size_t count) {
    return round_up(count * sizeof(T) / sizeof(float), 16);
}

// Calls visit(row, column, count, place) for each stretch of `number` values from row y, column x on that lies in one
// row, where values follow each other row after row.
template <class Visit>
void each_stretch(int y, int x, int number, int width, Visit visit) {
    for (int at = 0; at < number; ++y, x = 0) {
        const int count = std::min(width - x, number - at);
        visit(y, x, count, at);
        at += count;
    }
}

// The same for a range of values, which are numbered row after row.
template <class Visit>
void each_stretch(Range range, int width, Visit visit) {
    each_stretch(range.first / width, range.first % width, range.last - range.first, width, visit);
}

template <int NUMBER>
struct Number {
    static constexpr int value = NUMBER;
};

// Calls use(Number<n>) for 1 <= n <= MOST.
template <int MOST, class Use>
void with_number(int n, Use use) {
    if constexpr (MOST > 1) {
        if (n < MOST) return with_number<MOST - 1>(n, use);
    }
    use(Number<MOST>{});
}

// A row of the input without its stride: every stride-th value for each phase that a tap reads, so that the values
// under a tap are neighbours. Phases are `plane` floats apart and take whole vectors, phase_row() floats, of memory.
inline int reach_right(const ConvShape& s) { return (s.kernel_width - 1) * s.dilation_width; }
inline int reach_down(const ConvShape& s) { return (s.kernel_height - 1) * s.dilation_height; }

inline int phase_row(const ConvShape& s) {
    return static_cast<int>(round_up(s.out_width, lanes) + round_up(reach_right(s) / s.stride_width + 1, lanes));
}

inline void split_row(const ConvShape& s, const float* from, float* to, std::ptrdiff_t plane) {
    const int stride = s.stride_width, reach = reach_right(s);
    if (stride == 2) {
        const int number = s.out_width + reach / stride;
        for (int x = 0; x < number; x += lanes) {
            const V a = load(from + 2 * x), b = load(from + 2 * x + lanes);
            store(to + x, evens(a, b));
            if (reach > 0) store(to + plane + x, odds(a, b));
        }
        return;
    }
    for (int px = 0; px < std::min(stride, reach + 1); ++px) {
        const int number = s.out_width + (reach - px) / stride;
        for (int x = 0; x < number; ++x) to[px * plane + x] = from[px + stride * x];
    }
}

// Whether the output has a row of as many pixels for each of the input's first rows, and each reads its own alone.
inline bool is_pixelwise(const ConvShape& s) {
    return s.taps() == 1 && s.stride_height == 1 && s.stride_width == 1 && s.pad_top == 0 && s.pad_left == 0 &&
           s.in_width == s.out_width;  // one column may be left of several: a stride that is never taken counts as 1
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

inline constexpr std::int64_t far_weights = 256 << 10;  // floats that the second cache no longer holds

inline constexpr int tasks_of_thread = 4;  // at most: a thread that the system holds up leaves its tasks to the others

// How many tasks a call is worth: as many for every thread, if it is worth one for each.
inline int tasks_for(std::int64_t macs, int threads) {
    constexpr std::int64_t smallest = 1 << 17;  // MACs: some three microseconds
    if (threads == 1) return 1;
    const int worth = static_cast<int>(std::clamp<std::int64_t>(macs / smallest, 1, tasks_of_thread * threads));
    return worth > threads ? worth / threads * threads : worth;
}

// The work is a rectangle, columns by output channels. Tasks share the columns; where there are few, channels too, but
// no more than it takes to give every thread as much: what is made ready for a column is made by each of its tasks.
struct Cut {
    int across, down;

    // For a number of tasks that tasks() has given: each has columns.
    Cut(int columns, int tasks, int least_columns)
        : across(std::clamp(columns / least_columns, 1, tasks)), down(tasks / across) {}

    // At most `worth`, see tasks_for().
    static int tasks(int columns, int worth, int threads, int least_columns) {
        const int across = std::clamp(columns / least_columns, 1, worth);
        int tasks = across;
        while (tasks % threads && tasks < tasks_of_thread * threads && tasks + across <= worth) tasks += across;
        return tasks;
    }

    // Tasks that follow each other share columns, so that a thread which does them in a row leaves few.
    Range columns(int task, int count) const { return share(count, task / down, across); }
    Range channels(int task, int count) const { return share(count, task % down, down); }
};

// Asks for what a task reads of other threads' rows, layer after layer the same: waited for one by one they would take
// longer than all at once. `rows`: of the output that are the task's.
inline void ask_for_rows(const ConvShape& shape, const ConvCall& call, const Cut& cut, Range rows) {
    if (cut.across * cut.down == 1) return;
    const int first = rows.first * shape.stride_height, last = rows.last * shape.stride_height;  // own, but for padding
    const int top = std::max(first - shape.pad_top, 0);
    const int bottom = std::min(last - shape.stride_height - shape.pad_top + reach_down(shape) + 1, shape.in_height);
    for (int a = 0; a < call.active_in.count; ++a) {
        const float* const plane = call.in.channel(call.active_in.index[a]);
        const auto ask = [&](int from, int to) {
            for (int y = from; y < to; ++y) {
                for (int x = 0; x < shape.in_width; x += 16) __builtin_prefetch(plane + y * call.in.row + x);
            }
        };
        if (cut.down > 1) {
            ask(top, bottom);
        } else {
            ask(top, std::min(first, bottom));
            ask(std::max(last, top), bottom);
        }
    }
}

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

// Writes a range of an output channel's pixels, row after row. Sums are read up to a vector past the last of them.
inline void write_pixels(const ConvShape& shape, const ConvCall& call, const Finish& finish, Range pixels,
                         const float* sums) {
    const bool flat = gapless(call.out) && gapless(call.residual);
    each_stretch(pixels, flat ? pixels.last : shape.out_width, [&](int y, int x, int number, int at) {
        for (int v = 0; v < number; v += lanes) {
            finish.write(load(sums + at + v), y * call.out.row + x + v, y * call.residual.row + x + v,
                         std::min(lanes, number - v));
        }
    });
}
