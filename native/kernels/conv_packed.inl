// Small maps: pixels of several rows share a vector. The values under each tap are packed first, one row of pixels for
// each pair of active input channel and tap; packing costs little where many output channels read what was packed.

class PackedConvolution final : public Convolution {
public:
    // Whether vectors of pixels of one row would stay so empty that packing pays.
    static bool pays(const ConvShape& s) {
        const auto filled = [](int pixels) { return pixels / double(round_up(pixels, lanes)); };
        return filled(s.out_width) * 1.25 < filled(s.out_height * s.out_width);
    }

    PackedConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), weight_(weight), bias_(bias) {}

    std::size_t scratch() const override {
        return place_floats() + weight_floats() + std::size_t(most_pairs()) * row_floats + max_rows * row_floats;
    }

    int tasks(const ConvCall& call, int threads) const override { return tasks_for(macs(call), threads); }
    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }
    const char* kernel() const override { return "packed"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        const int pixels = shape_.out_height * shape_.out_width, vectors = (pixels + lanes - 1) / lanes;
        const Cut cut(vectors, tasks, block_vectors);
        const Range part = cut.columns(task, vectors);
        each_group(shape_, call, [&](Channels in, Channels out) {
            const Range channels = cut.channels(task, out.count);
            if (channels.empty()) return;
            const Channels own{out.index + channels.first, channels.last - channels.first};
            for (int first = part.first; first < part.last; first += block_vectors) {
                const int last = std::min(part.last, first + block_vectors);
                run_block(call, in, own, {first * lanes, std::min(last * lanes, pixels)}, scratch);
            }
        });
    }

private:
    static constexpr int block_vectors = 6;                     // a multiple of 2 and 3
    static constexpr int row_floats = (block_vectors + 1) * lanes;  // one more, which sums are read past their end into

    int most_pairs() const { return shape_.in_per_group() * shape_.taps(); }
    std::size_t place_floats() const { return round_up(most_pairs() * sizeof(std::ptrdiff_t) / sizeof(float), 16); }
    std::size_t weight_floats() const { return round_up(most_pairs(), 16); }

    void run_block(const ConvCall& call, Channels in, Channels out, Range pixels, float* scratch) const {
        auto* const place = reinterpret_cast<std::ptrdiff_t*>(scratch);
        auto* const weight = reinterpret_cast<int*>(scratch + place_floats());
        float* const values = scratch + place_floats() + weight_floats();
        float* const sums = values + std::ptrdiff_t{most_pairs()} * row_floats;
        const int count = pack(call, in, pixels, place, weight, values);
        const int vectors = (pixels.last - pixels.first + lanes - 1) / lanes;
        for (int o = 0; o < out.count;) {
            const int rows = next_rows(out.count - o);
            const float* row[max_rows];
            for (int r = 0; r < rows; ++r) row[r] = weight_ + std::ptrdiff_t{out.index[o + r]} * most_pairs();
            multiply({place, weight, count}, row, rows, 0, values, 0, 1, sums, row_floats, vectors);
            for (int r = 0; r < rows; ++r) write_channel(call, out.index[o + r], pixels, sums + r * row_floats);
            o += rows;
        }
    }

    // Returns the number of pairs of channel and tap.
    int pack(const ConvCall& call, Channels in, Range pixels, std::ptrdiff_t* place, int* weight, float* values) const {
        int pair = 0;
        for (int a = 0; a < in.count; ++a) {
            const float* const channel = call.in.channel(in.index[a]);
            for (int t = 0; t < shape_.taps(); ++t, ++pair) {
                const int ky = t / shape_.kernel_width, kx = t % shape_.kernel_width;
                float* to = values + std::ptrdiff_t{pair} * row_floats;
                place[pair] = std::ptrdiff_t{pair} * row_floats;
                weight[pair] = in.index[a] % shape_.in_per_group() * shape_.taps() + t;
                const float* const tap = channel +
                                         (ky * shape_.dilation_height - shape_.pad_top) * call.in.row +
                                         kx * shape_.dilation_width - shape_.pad_left;
                each_row(pixels, [&](int y, int x, int number, int) {
                    const float* from = tap + y * shape_.stride_height * call.in.row + x * shape_.stride_width;
                    for (int p = 0; p < number; ++p) *to++ = from[p * shape_.stride_width];
                });
                while (to < values + std::ptrdiff_t{pair} * row_floats + round_up(pixels.last - pixels.first, lanes)) {
                    *to++ = 0;
                }
            }
        }
        return pair;
    }

    void write_channel(const ConvCall& call, int o, Range pixels, const float* sums) const {
        const Finish finish(call, o, bias_, shape_);
        each_row(pixels, [&](int y, int x, int number, int at) {
            for (int v = 0; v < number; v += lanes) {
                finish.write(load(sums + at + v), y * call.out.row + x + v, y * call.residual.row + x + v,
                             std::min(lanes, number - v));
            }
        });
    }

    // Calls visit(y, x, number, place in the block) for each stretch of the pixels in a row.
    template <class Visit>
    void each_row(Range pixels, Visit visit) const {
        for (int pixel = pixels.first; pixel < pixels.last;) {
            const int y = pixel / shape_.out_width, x = pixel % shape_.out_width;
            const int number = std::min(shape_.out_width - x, pixels.last - pixel);
            visit(y, x, number, pixel - pixels.first);
            pixel += number;
        }
    }

    ConvShape shape_;
    const float* weight_;
    const float* bias_;
};
