// Convolution that reads only chosen columns (positions) of chosen input channels.
//
// A kept column is read by one output pixel under each tap, so that whatever the set of columns, one tap is a matrix
// product: kept columns by output channels over the active input channels. Its sums are added to those of the output
// pixels that the columns reach. Sums stand channels-last, lanes are output channels, and a block of them stays in the
// first cache while all taps pass over it. Only then are they turned into planes and finished.
//
// For one output value, products are added in the order of taps and input channels, starting from the bias.

// One kept column under the taps of one kernel column.
struct Reach {
    int from;  // floats from the first value that was gathered to the column's first
    int to;    // pixel that it adds to where rows are counted as if the tap were the filter's first
};

inline constexpr int tile_vectors = 2;  // of output channels
inline constexpr int tile_columns = lanes == 16 ? 8 : 6;

// `tiles` tiles of so many columns, one after the other. AHEAD: meanwhile, the next tap's weights for the same channels
// are fetched. Large layers wait for their weights otherwise, whose gaps the processor doesn't foresee.
template <int VECTORS, int COLUMNS, bool AHEAD>
void add_columns(const float* values, const float* weight, const float* next, const int* channel, int channels,
                 const Reach* reach, int tiles, float* sums) {
    constexpr int width = VECTORS * lanes, line = 16;
    for (int t = 0; t < tiles; ++t, reach += COLUMNS) {
        const float* in[COLUMNS];
        V sum[COLUMNS][VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) {
            in[c] = values + reach[c].from;
            const float* const start = sums + std::ptrdiff_t{reach[c].to} * width;
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sum[c][v] = load(start + v * lanes);
        }
        const float* const ahead = next + (width > line ? t * line % width : 0);
        for (std::ptrdiff_t a = 0; a < channels; ++a) {
            const std::ptrdiff_t row = std::ptrdiff_t{channel[a]} * width;
            if (AHEAD) __builtin_prefetch(ahead + row);
            V w[VECTORS];
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) w[v] = load(weight + row + v * lanes);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) {
                const V value = broadcast(in[c][a]);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; ++v) sum[c][v] += value * w[v];
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) {
            float* const end = sums + std::ptrdiff_t{reach[c].to} * width;
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) store(end + v * lanes, sum[c][v]);
        }
    }
}

using AddColumns = void (*)(const float*, const float*, const float*, const int*, int, const Reach*, int, float*);

template <int VECTORS, bool AHEAD>
inline constexpr AddColumns add_tiles[] = {
    add_columns<VECTORS, 1, AHEAD>, add_columns<VECTORS, 2, AHEAD>, add_columns<VECTORS, 3, AHEAD>,
    add_columns<VECTORS, 4, AHEAD>, add_columns<VECTORS, 5, AHEAD>, add_columns<VECTORS, 6, AHEAD>,
#if THRIFTY_VECTOR == 16
    add_columns<VECTORS, 7, AHEAD>, add_columns<VECTORS, 8, AHEAD>,
#endif
};

// Rows and columns of a square of vectors change places: each of log2(lanes) steps zips its halves.
inline void transpose(V (&square)[lanes]) {
#pragma GCC unroll 4
    for (int step = 1; step < lanes; step *= 2) {
        V next[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes / 2; ++i) {
            next[2 * i] = zip_low(square[i], square[i + lanes / 2]);
            next[2 * i + 1] = zip_high(square[i], square[i + lanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = next[i];
    }
}

class ColumnsConvolution final : public ColumnConvolution {
public:
    ColumnsConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), vectors_((shape.out_per_group() + lanes - 1) / lanes),
          tiles_((vectors_ + tile_vectors - 1) / tile_vectors),
          classes_((shape.in_height - 1 + shape.pad_top) / shape.stride_height + 1),
          block_rows_(std::clamp(block_pixels / shape.out_width, 1, shape.out_height)),
          far_(std::size_t(shape.taps()) * shape.in_per_group() * tile_vectors * lanes * sizeof(float) > far_bytes),
          memory_(new float[weight_floats() + bias_floats() + alignment]),
          across_(new int[std::size_t(shape.kernel_width) * shape.in_width]), pairs_x_(new int[shape.in_width]),
          pairs_y_(new int[shape.in_height]) {
        const std::size_t past = reinterpret_cast<std::uintptr_t>(memory_.get()) / sizeof(float) % alignment;
        weight_ = memory_.get() + (past ? alignment - past : 0);
        bias_ = weight_ + weight_floats();
        pack(weight, bias);
        for (int x = 0; x < shape.in_width; ++x) pairs_x_[x] = 0;
        for (int k = 0; k < shape.kernel_width; ++k) {
            for (int x = 0; x < shape.in_width; ++x) {
                const int place = x + shape.pad_left - k * shape.dilation_width;
                const int to = target(place, shape.stride_width, shape.out_width);
                across_[std::ptrdiff_t{k} * shape.in_width + x] = to;
                pairs_x_[x] += to >= 0;
            }
        }
        for (int y = 0; y < shape.in_height; ++y) {
            pairs_y_[y] = 0;
            for (int k = 0; k < shape.kernel_height; ++k) {
                pairs_y_[y] += target(y + shape.pad_top - k * shape.dilation_height, shape.stride_height,
                                      shape.out_height) >= 0;
            }
        }
    }

    std::size_t scratch() const override {
        return sum_floats() + std::size_t(lanes) * plane_floats();
    }

    std::size_t shared() const override {
        return channel_floats() + group_floats() + start_floats() + shape_.kernel_width * reach_floats() +
               round_up(std::size_t(shape_.in_height) * shape_.in_width * shape_.in_channels, 16);
    }

    int prepare_tasks(const ColumnCall& call, int threads) const override {
        constexpr std::int64_t smallest = 1 << 14;  // values: some five microseconds
        const std::int64_t values = std::int64_t{call.column_count} * (call.active_in.count + shape_.kernel_width);
        return threads == 1 ? 1 : static_cast<int>(std::clamp<std::int64_t>(values / smallest, 1, 2 * threads));
    }

    void prepare(const ColumnCall& call, int task, int tasks, float* shared, float*) const override {
        const Parts parts = parts_of(shared);
        if (task == 0) list_channels(call, parts);
        for (int k = task; k < shape_.kernel_width; k += tasks) list_columns(call, k, parts);
        gather(call, share(call.column_count, task, tasks), parts.values);
    }

    int tasks(const ColumnCall& call, int threads) const override {
        if (threads == 1) return 1;
        const std::int64_t outputs = std::int64_t{shape_.out_height} * shape_.out_width * shape_.out_channels;
        return Cut::tasks(shape_.out_height, tasks_for(macs(call) + 8 * outputs, threads), threads, least_rows());
    }

    void run(const ColumnCall& call, int task, int tasks, const float* shared, float* scratch) const override {
        const Parts parts = parts_of(const_cast<float*>(shared));
        const Cut cut(shape_.out_height, tasks, least_rows());
        const Range rows = cut.columns(task, shape_.out_height);
        const Range tiles = cut.channels(task, tiles_ * shape_.groups);
        const int blocks = (rows.last - rows.first + block_rows_ - 1) / block_rows_;
        for (int t = tiles.first; t < tiles.last; ++t) {
            for (int b = 0; b < blocks; ++b) {
                const Range part = share(rows.last - rows.first, b, blocks);
                const Range block{rows.first + part.first, rows.first + part.last};
                if (vectors_ - t % tiles_ * tile_vectors == 1) run_block<1>(call, t, block, parts, scratch);
                else run_block<tile_vectors>(call, t, block, parts, scratch);
            }
        }
    }

    std::int64_t macs(const ColumnCall& call) const override {
        std::int64_t pairs = 0;
        each_row(call, [&](int y, Range columns) {
            for (int i = columns.first; i < columns.last; ++i) {
                pairs += pairs_y_[y] * pairs_x_[call.columns[i] - y * shape_.in_width];
            }
        });
        return pairs * call.active_in.count * shape_.out_per_group();
    }

    const char* kernel() const override { return "columns"; }

private:
    static constexpr int alignment = 16;       // floats
    static constexpr std::size_t far_bytes = 256 << 10;
    static constexpr int block_pixels = 256;   // whose sums stay in the first cache
    static constexpr int least_pixels = 128;   // that are worth reading all weights of a task

    int least_rows() const { return (least_pixels + shape_.out_width - 1) / shape_.out_width; }

    // What the tasks of a call share.
    struct Parts {
        int* channel;   // [in_channels]: of each active input channel, its place in its group
        int* group;     // [groups + 1]: active input channels before each group
        int* start;     // [kernel_width][stride_height][classes + 1]: columns before each row, see list_columns
        Reach* reach;   // [kernel_width][columns]
        float* values;  // [columns][active input channels]
    };

    std::size_t channel_floats() const { return floats_of<int>(shape_.in_channels); }
    std::size_t group_floats() const { return floats_of<int>(shape_.groups + 1); }
    std::size_t start_floats() const {
        return floats_of<int>(std::size_t(shape_.kernel_width) * shape_.stride_height * (classes_ + 1));
    }
    // One more than columns: where a column without a target is written, to be overwritten.
    std::size_t reach_floats() const { return floats_of<Reach>(std::size_t(shape_.in_height) * shape_.in_width + 1); }
    std::size_t weight_floats() const {
        return std::size_t(shape_.groups) * shape_.taps() * shape_.in_per_group() * vectors_ * lanes;
    }
    std::size_t bias_floats() const { return std::size_t(shape_.groups) * vectors_ * lanes; }

    std::size_t sum_floats() const {
        return std::size_t(block_rows_ * shape_.out_width + lanes) * tile_vectors * lanes;
    }
    // Rows are read up to a vector past their end. Not a power of two, whose multiples share few places in a cache.
    std::ptrdiff_t plane_floats() const {
        return static_cast<std::ptrdiff_t>(round_up(block_rows_ * shape_.out_width + lanes, 32) + 16);
    }

    Parts parts_of(float* shared) const {
        Parts parts;
        parts.channel = reinterpret_cast<int*>(shared);
        parts.group = reinterpret_cast<int*>(shared += channel_floats());
        parts.start = reinterpret_cast<int*>(shared += group_floats());
        parts.reach = reinterpret_cast<Reach*>(shared += start_floats());
        parts.values = shared + shape_.kernel_width * reach_floats();
        return parts;
    }

    Reach* reach_of(const Parts& parts, int k) const {
        return reinterpret_cast<Reach*>(reinterpret_cast<float*>(parts.reach) + k * reach_floats());
    }
    int* start_of(const Parts& parts, int k, int remainder) const {
        return parts.start + std::ptrdiff_t{k * shape_.stride_height + remainder} * (classes_ + 1);
    }

    // The output that reads `place`, an input's distance from where the first output begins; -1: none.
    static int target(int place, int stride, int outputs) {
        return place >= 0 && place % stride == 0 && place / stride < outputs ? place / stride : -1;
    }

    // [group][tile of outputs][tap][input][output], zeros for outputs that a vector has too many.
    void pack(const float* weight, const float* bias) {
        const int ins = shape_.in_per_group(), outs = shape_.out_per_group(), taps = shape_.taps();
        float* to = weight_;
        for (int g = 0; g < shape_.groups; ++g) {
            for (int first = 0; first < vectors_ * lanes; first += tile_vectors * lanes) {
                const int last = std::min(first + tile_vectors * lanes, vectors_ * lanes);
                for (int t = 0; t < taps; ++t) {
                    for (int i = 0; i < ins; ++i) {
                        for (int o = first; o < last; ++o) {
                            *to++ = o < outs ? weight[((std::ptrdiff_t{g} * outs + o) * ins + i) * taps + t] : 0;
                        }
                    }
                }
            }
            for (int o = 0; o < vectors_ * lanes; ++o) {
                bias_[g * vectors_ * lanes + o] = o < outs ? bias[g * outs + o] : 0;
            }
        }
    }

    // Calls visit(row, columns in it) for each row that has kept columns.
    template <class Visit>
    void each_row(const ColumnCall& call, Visit visit) const {
        for (int i = 0; i < call.column_count;) {
            const int y = call.columns[i] / shape_.in_width, end = (y + 1) * shape_.in_width;
            const int first = i;
            while (i < call.column_count && call.columns[i] < end) ++i;
            visit(y, Range{first, i});
        }
    }

    void list_channels(const ColumnCall& call, const Parts& parts) const {
        const int ins = shape_.in_per_group();
        int a = 0;
        for (int g = 0; g < shape_.groups; ++g) {
            parts.group[g] = a;
            for (; a < call.active_in.count && call.active_in.index[a] < (g + 1) * ins; ++a) {
                parts.channel[a] = call.active_in.index[a] - g * ins;
            }
        }
        parts.group[shape_.groups] = a;
    }

    // Columns that some output reads under kernel column k. Input rows are ordered by the remainder of their distance
    // from the first output row, then by the quotient: a tap reads rows of one remainder, and their outputs are
    // neighbours. What stands before each quotient is counted, so that the columns of a block of output rows lie in
    // one piece under each tap.
    __attribute__((noinline)) void list_columns(const ColumnCall& call, int k, const Parts& parts) const {
        Reach* reach = reach_of(parts, k);
        const Reach* const begin = reach;
        const int* const across = across_.get() + std::ptrdiff_t{k} * shape_.in_width;
        const int stride = shape_.stride_height, width = shape_.in_width, channels = call.active_in.count;
        const int* const last = call.columns + call.column_count;
        for (int remainder = 0; remainder < stride; ++remainder) {
            int* const start = start_of(parts, k, remainder);
            const int* column = call.columns;
            int from = 0;
            for (int row = 0; row < classes_; ++row) {
                start[row] = static_cast<int>(reach - begin);
                const int y = row * stride + remainder - shape_.pad_top;
                if (y < 0 || y >= shape_.in_height) continue;
                const int first = y * width, end = first + width, to = row * shape_.out_width;
                for (; column < last && *column < first; ++column) from += channels;
                for (; column < last && *column < end; ++column, from += channels) {
                    const int x = across[*column - first];
                    *reach = {from, to + x};
                    reach += x >= 0;
                }
            }
            start[classes_] = static_cast<int>(reach - begin);
        }
    }

    __attribute__((noinline)) void gather(const ColumnCall& call, Range part, float* values) const {
        constexpr int most = 64;
        const int channels = call.active_in.count;
        std::ptrdiff_t place[most];
        for (int first = part.first; first < part.last; first += most) {
            const Range some{first, std::min(first + most, part.last)};
            find(call, some, place);
            float* const to = values + std::ptrdiff_t{first} * channels;
            int a = 0;
            for (; a + 4 <= channels; a += 4) gather_channels<4>(call, a, place, some.last - first, to + a);
            for (; a < channels; ++a) gather_channels<1>(call, a, place, some.last - first, to + a);
        }
    }

    // Where columns lie in the planes of the input.
    void find(const ColumnCall& call, Range columns, std::ptrdiff_t* place) const {
        const int width = shape_.in_width;
        int y = call.columns[columns.first] / width;
        for (int i = columns.first; i < columns.last; ++y) {
            const std::ptrdiff_t skip = y * (call.in.row - width);
            for (const int end = (y + 1) * width; i < columns.last && call.columns[i] < end; ++i) {
                *place++ = call.columns[i] + skip;
            }
        }
    }

    // Copied as whole numbers: more of them can be read and written at once.
    template <int NUMBER>
    static void gather_channels(const ColumnCall& call, int first, const std::ptrdiff_t* place, int columns,
                                float* values) {
        typedef std::uint32_t Bits __attribute__((may_alias));
        const Bits* from[NUMBER];
        for (int c = 0; c < NUMBER; ++c) {
            from[c] = reinterpret_cast<const Bits*>(call.in.channel(call.active_in.index[first + c]));
        }
        Bits* to = reinterpret_cast<Bits*>(values);
        const std::ptrdiff_t step = call.active_in.count;
        for (int i = 0; i < columns; ++i, to += step) {
            const std::ptrdiff_t p = place[i];
#pragma GCC unroll 4
            for (int c = 0; c < NUMBER; ++c) to[c] = from[c][p];
        }
    }

    template <int VECTORS>
    void run_block(const ColumnCall& call, int tile, Range rows, const Parts& parts, float* sums) const {
        constexpr int width = VECTORS * lanes;
        const int group = tile / tiles_, vector = tile % tiles_ * tile_vectors, ins = shape_.in_per_group();
        const int pixels = (rows.last - rows.first) * shape_.out_width;
        const float* const bias = bias_ + (group * vectors_ + vector) * lanes;
        for (int p = 0; p < pixels; ++p) {
            for (int v = 0; v < VECTORS; ++v) store(sums + p * width + v * lanes, load(bias + v * lanes));
        }
        const int first = parts.group[group], channels = parts.group[group + 1] - first;
        const float* const values = parts.values + first;
        const float* weight = weight_ + (std::ptrdiff_t{group} * vectors_ + vector) * shape_.taps() * ins * lanes;
        for (int ky = 0; ky < shape_.kernel_height; ++ky) {
            const int down = ky * shape_.dilation_height / shape_.stride_height;
            const int remainder = ky * shape_.dilation_height % shape_.stride_height;
            float* const target = sums - std::ptrdiff_t{rows.first + down} * shape_.out_width * width;
            for (int kx = 0; kx < shape_.kernel_width; ++kx, weight += std::ptrdiff_t{ins} * width) {
                const int* const start = start_of(parts, kx, remainder);
                const int end = start[std::min(rows.last + down, classes_)];
                const Reach* at = reach_of(parts, kx) + start[std::min(rows.first + down, classes_)];
                const int number = static_cast<int>(reach_of(parts, kx) + end - at);
                if (number == 0) continue;
                // Tiles as even as can be: short ones leave the adders idle.
                const int tiles = (number + tile_columns - 1) / tile_columns;
                const int columns = number / tiles, wider = number % tiles;
                const auto add = [&](int each, int count) {
                    const float* const next = weight + std::ptrdiff_t{ins} * width;
                    const AddColumns* const sized = far_ ? add_tiles<VECTORS, true> : add_tiles<VECTORS, false>;
                    sized[each - 1](values, weight, next, parts.channel + first, channels, at, count, target);
                    at += each * count;
                };
                if (wider > 0) add(columns + 1, wider);
                add(columns, tiles - wider);
            }
        }
        write<VECTORS>(call, group * shape_.out_per_group() + vector * lanes,
                       std::min(width, shape_.out_per_group() - vector * lanes), rows, sums, sums + sum_floats());
    }

    // Sums become planes, in memory that stays in the first cache: what is written outside of it is written in rows.
    template <int VECTORS>
    void write(const ColumnCall& call, int first, int outputs, Range rows, const float* sums, float* planes) const {
        constexpr int width = VECTORS * lanes;
        const V scale = broadcast(call.scale);
        const std::ptrdiff_t plane = plane_floats();
        const int pixels = (rows.last - rows.first) * shape_.out_width;
        for (int v = 0; v * lanes < outputs; ++v) {
            const int number = std::min(lanes, outputs - v * lanes);
            for (int p = 0; p < pixels; p += lanes) {
                V square[lanes];
                for (int i = 0; i < lanes; ++i) square[i] = load(sums + (p + i) * width + v * lanes) * scale;
                transpose(square);
                for (int o = 0; o < lanes; ++o) store(planes + o * plane + p, square[o]);
            }
            for (int o = 0; o < number; ++o) write_rows(call, first + v * lanes + o, rows, planes + o * plane);
        }
    }

    void write_rows(const ColumnCall& call, int o, Range rows, const float* from) const {
        const bool added = call.residual.data && (!call.residual_active || call.residual_active[o]);
        if (shape_.activation == Activation::relu) {
            if (added) write_plane<true, true>(call, o, rows, from);
            else write_plane<false, true>(call, o, rows, from);
        } else {
            if (added) write_plane<true, false>(call, o, rows, from);
            else write_plane<false, false>(call, o, rows, from);
        }
    }

    template <bool RESIDUAL, bool RELU>
    void write_plane(const ColumnCall& call, int o, Range rows, const float* from) const {
        float* out = call.out.channel(o) + rows.first * call.out.row;
        const float* residual = RESIDUAL ? call.residual.channel(o) + rows.first * call.residual.row : nullptr;
        const int width = shape_.out_width, whole = width / lanes * lanes;
        const auto value = [&](int x) {
            V v = load(from + x);
            if (RESIDUAL) v += load(residual + x);
            return activate(v, RELU ? Activation::relu : shape_.activation, shape_.slope);
        };
        for (int y = rows.first; y < rows.last; ++y, from += width, out += call.out.row) {
            for (int x = 0; x < whole; x += lanes) store(out + x, value(x));
            if (whole < width) store_part(out + whole, value(whole), width - whole);
            if (RESIDUAL) residual += call.residual.row;
        }
    }

    ConvShape shape_;
    int vectors_;     // of outputs in a group
    int tiles_;       // of outputs in a group
    int classes_;     // input rows, padding above included, of one remainder under the stride
    int block_rows_;
    bool far_;        // a tile's weights don't stay in the second cache
    std::unique_ptr<float[]> memory_;
    float* weight_;
    float* bias_;
    std::unique_ptr<int[]> across_;   // [kernel_width][in_width]: output column that an input column adds to, -1: none
    std::unique_ptr<int[]> pairs_x_;  // [in_width]: output columns that an input column adds to
    std::unique_ptr<int[]> pairs_y_;  // [in_height]: likewise
};

std::unique_ptr<ColumnConvolution> make_column_convolution(const ConvShape& shape, const float* weight,
                                                           const float* bias) {
    return std::make_unique<ColumnsConvolution>(shape, weight, bias);
}
