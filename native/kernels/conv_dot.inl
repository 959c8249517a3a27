// Maps of a few pixels: vectors run along the weights of an output channel instead, over stretches of active input
// channels that are neighbours.

class DotConvolution final : public Convolution {
public:
    static bool takes(const ConvShape& s) {
        return s.out_height * s.out_width <= most_pixels && s.in_per_group() * s.taps() >= lanes;
    }

    DotConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), weight_(weight), bias_(bias) {}

    std::size_t scratch() const override {
        return floats_of<Range>(shape_.in_per_group()) + std::size_t(most_pixels) * value_row();
    }

    int tasks(const ConvCall& call, int threads) const override {
        return std::min(tasks_for(4 * macs(call), threads), std::max(1, call.active_out.count));
    }

    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }
    const char* kernel(const ConvCall&) const override { return "dot"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        auto* const stretches = reinterpret_cast<Range*>(scratch);
        float* const values = scratch + floats_of<Range>(shape_.in_per_group());
        each_group(shape_, call, [&](Channels in, Channels out) {
            const Range mine = share(out.count, task, tasks);
            if (mine.empty()) return;
            const int count = list_stretches(in, stretches);
            pack(call, in, values);
            const int pixels = shape_.out_height * shape_.out_width;
            for (int o = mine.first; o < mine.last; o += rows_at_once) {
                const int rows = std::min(rows_at_once, mine.last - o);
                const Block block{stretches, count, values, value_row(), out.index + o, mine.last - o - rows};
                with_number<rows_at_once>(rows, [&](auto r) {
                    with_number<most_pixels>(pixels, [&](auto p) { run_rows<r.value, p.value>(call, block); });
                });
            }
        });
    }

private:
    static constexpr int most_pixels = 4;
    static constexpr int rows_at_once = lanes == 16 ? 4 : 2;  // with four pixels, as many sums as there is room for

    struct Block {
        const Range* stretch;  // of a row of weights
        int stretches;
        const float* values;   // [pixels][value_row]: what lies under each weight, zero where the channel is not active
        int value_row;
        const int* out;
        int next;              // outputs that follow those of the block
    };

    int row_weights() const { return shape_.in_per_group() * shape_.taps(); }
    int value_row() const { return static_cast<int>(round_up(row_weights(), lanes)) + lanes; }

    int list_stretches(Channels in, Range* stretches) const {
        int count = 0;
        for (int a = 0; a < in.count; ++a) {
            const int first = in.index[a] % shape_.in_per_group() * shape_.taps();
            if (count && stretches[count - 1].last == first) stretches[count - 1].last += shape_.taps();
            else stretches[count++] = {first, first + shape_.taps()};
        }
        return count;
    }

    void pack(const ConvCall& call, Channels in, float* values) const {
        for (int y = 0; y < shape_.out_height; ++y) {
            for (int x = 0; x < shape_.out_width; ++x) {
                float* const to = values + std::ptrdiff_t{y * shape_.out_width + x} * value_row();
                std::fill_n(to, value_row(), 0.0f);
                for (int a = 0; a < in.count; ++a) {
                    const float* const from = call.in.channel(in.index[a]) +
                                              (y * shape_.stride_height - shape_.pad_top) * call.in.row +
                                              x * shape_.stride_width - shape_.pad_left;
                    float* pixel = to + in.index[a] % shape_.in_per_group() * shape_.taps();
                    for (int ky = 0; ky < shape_.kernel_height; ++ky) {
                        for (int kx = 0; kx < shape_.kernel_width; ++kx) {
                            *pixel++ = from[ky * shape_.dilation_height * call.in.row + kx * shape_.dilation_width];
                        }
                    }
                }
            }
        }
    }

    template <int ROWS, int PIXELS>
    void run_rows(const ConvCall& call, const Block& block) const {
        const float *weight[ROWS], *next[ROWS];  // the next rows are fetched meanwhile
        for (int r = 0; r < ROWS; ++r) {
            weight[r] = weight_ + std::ptrdiff_t{block.out[r]} * row_weights();
            next[r] = weight_ + std::ptrdiff_t{block.out[r < block.next ? ROWS + r : r]} * row_weights();
        }
        V sum[ROWS][PIXELS] = {};
        for (int s = 0; s < block.stretches; ++s) {
            const Range stretch = block.stretch[s];
            int k = stretch.first;
            for (; k + lanes <= stretch.last; k += lanes) {
                V w[ROWS];
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r) {
                    w[r] = load(weight[r] + k);
                    __builtin_prefetch(next[r] + k, 0, 2);
                }
                add_products(w, block, k, sum);
            }
            if (k < stretch.last) {
                V w[ROWS];
                for (int r = 0; r < ROWS; ++r) w[r] = load_first(weight[r] + k, stretch.last - k);
                add_products(w, block, k, sum);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            float sums[most_pixels + lanes] = {};
            for (int p = 0; p < PIXELS; ++p) sums[p] = total(sum[r][p]);
            const Finish finish(call, block.out[r], bias_, shape_);
            for (int y = 0; y < shape_.out_height; ++y) {
                finish.write(load(sums + y * shape_.out_width), y * call.out.row, y * call.residual.row, shape_.out_width);
            }
        }
    }

    // `count` weights and zeros after them.
    V load_first(const float* p, int count) const {
        V values = {};
        if (p + lanes > weight_ + std::ptrdiff_t{shape_.out_channels} * row_weights()) {
            for (int i = 0; i < count; ++i) values[i] = p[i];
            return values;
        }
        values = load(p);
        I place = {};
        for (int i = 0; i < lanes; ++i) place[i] = i;
        return reinterpret_cast<V>(reinterpret_cast<I>(values) & (place < count));
    }

    template <int ROWS, int PIXELS>
    static void add_products(const V (&w)[ROWS], const Block& block, int k, V (&sum)[ROWS][PIXELS]) {
#pragma GCC unroll 4
        for (int p = 0; p < PIXELS; ++p) {
            const V x = load(block.values + std::ptrdiff_t{p} * block.value_row + k);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) sum[r][p] += w[r] * x;
        }
    }

    static float total(V v) {
        for (int half = lanes / 2; half; half /= 2) {
            for (int i = 0; i < half; ++i) v[i] += v[i + half];
        }
        return v[0];
    }

    ConvShape shape_;
    const float* weight_;
    const float* bias_;
};
