// Packs the values under each tap first: pixels of several rows share a vector, and what a tile reads lies in one piece.
// It costs little where many output channels read what was packed, and pays on small maps and under 1x1 filters.

class PackedConvolution final : public Convolution {
public:
    static bool pays(const ConvShape& s) {
        if (s.taps() == 1 && s.in_per_group() >= 128 && s.out_per_group() >= 32) return true;
        // Vectors of pixels of one row would stay much emptier.
        const auto filled = [](int pixels) { return pixels / double(round_up(pixels, lanes)); };
        return filled(s.out_width) * 1.25 < filled(s.out_height * s.out_width);
    }

    PackedConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), weight_(weight), bias_(bias) {}

    std::size_t scratch() const override {
        return place_floats() + weight_floats() + value_floats() + max_rows * sum_row;
    }

    int tasks(const ConvCall& call, int threads) const override {
        // Each task reads all weights once for every block of panels: no less than a block, if every thread gets one.
        const int panels = panels_of(shape_.out_height * shape_.out_width);
        const int blocks = panels / block_of(call.active_in.count / shape_.groups * shape_.taps());
        const int worth = std::min(tasks_for(macs(call), threads), std::max(blocks / threads, 1) * threads);
        return Cut::tasks(panels, worth, threads, 1);
    }
    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }
    const char* kernel(const ConvCall&) const override { return "packed"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        const int pixels = shape_.out_height * shape_.out_width, panels = panels_of(pixels);
        const Cut cut(panels, tasks, 1);
        const Range part = cut.columns(task, panels);
        ask_for_rows(shape_, call, cut, {part.first * panel / shape_.out_width,
                                         (std::min(part.last * panel, pixels) - 1) / shape_.out_width + 1});
        each_group(shape_, call, [&](Channels in, Channels out) {
            const Range channels = cut.channels(task, out.count);
            if (channels.empty()) return;
            const Channels own{out.index + channels.first, channels.last - channels.first};
            const int most = block_of(in.count * shape_.taps());
            for (int first = part.first; first < part.last; first += most) {
                const int last = std::min(part.last, first + most);
                run_block(call, in, own, {first * panel, std::min(last * panel, pixels)}, scratch);
            }
        });
    }

private:
    static constexpr int most_panels = 6;                        // in a block
    static constexpr int values_budget = 96 << 10;               // floats of packed values in the second cache
    static constexpr int sum_row = most_panels * panel + lanes;  // sums are read past the last pixel

    static int block_of(int pairs) { return std::clamp(values_budget / (panel * std::max(pairs, 1)), 1, most_panels); }

    int most_pairs() const { return shape_.in_per_group() * shape_.taps(); }
    std::size_t place_floats() const { return floats_of<std::ptrdiff_t>(most_pairs()); }
    std::size_t weight_floats() const { return floats_of<int>(most_pairs()); }
    // From one panel to the next: see pack_panel() for the last vector.
    static std::ptrdiff_t panel_floats(int pairs) { return std::ptrdiff_t{pairs} * panel + lanes; }
    std::size_t value_floats() const { return static_cast<std::size_t>(most_panels * panel_floats(most_pairs())); }

    void run_block(const ConvCall& call, Channels in, Channels out, Range pixels, float* scratch) const {
        auto* const place = reinterpret_cast<std::ptrdiff_t*>(scratch);
        auto* const weight = reinterpret_cast<int*>(scratch + place_floats());
        float* const values = scratch + place_floats() + weight_floats();
        float* const sums = values + value_floats();
        const int number = pixels.last - pixels.first;
        const std::ptrdiff_t panel_step = panel_floats(in.count * shape_.taps());
        pack(call, in, pixels, place, weight, values, panel_step);
        const Product product{{place, weight, in.count * shape_.taps()}, values, 0, panel_step, 0, 1, number, sums,
                              sum_row, most_pairs()};
        product.run(out, [&](int o) { return weight_ + std::ptrdiff_t{o} * most_pairs(); },
                    [&](int o, const float* sum) { write_pixels(shape_, call, Finish(call, o, bias_, shape_), pixels, sum); });
    }

    void pack(const ConvCall& call, Channels in, Range pixels, std::ptrdiff_t* place, int* weight, float* values,
              std::ptrdiff_t panel_step) const {
        int pair = 0;
        for (int a = 0; a < in.count; ++a) {
            for (int t = 0; t < shape_.taps(); ++t, ++pair) {
                place[pair] = std::ptrdiff_t{pair} * panel;
                weight[pair] = in.index[a] % shape_.in_per_group() * shape_.taps() + t;
            }
        }
        // Channel after channel, so that what lies together is read together. Values past the last pixel are whatever was
        // there: nobody reads the sums that they lead to.
        const bool flat = is_pixelwise(shape_) && gapless(call.in);
        Start start[most_panels];
        const int panels = list_starts(pixels, start);
        float* to = values;
        for (int a = 0; a < in.count; ++a) {
            const float* const channel = call.in.channel(in.index[a]);
            if (flat) {
                copy_panels(channel, pixels, to, panel_step);
                to += panel;
                continue;
            }
            for (int t = 0; t < shape_.taps(); ++t, to += panel) {
                const int ky = t / shape_.kernel_width, kx = t % shape_.kernel_width;
                const float* const tap = channel + (ky * shape_.dilation_height - shape_.pad_top) * call.in.row +
                                         kx * shape_.dilation_width - shape_.pad_left;
                for (int p = 0; p < panels; ++p) pack_panel(call, start[p], tap, to + p * panel_step);
            }
        }
    }

    static void copy_panels(const float* channel, Range pixels, float* to, std::ptrdiff_t panel_step) {
        for (int first = pixels.first; first < pixels.last; first += panel, to += panel_step) {
            for (int v = 0; v < panel; v += lanes) store(to + v, load(channel + first + v));
        }
    }

    // The first output pixel of a panel, and how many it has.
    struct Start {
        int y, x, pixels;
    };

    int list_starts(Range pixels, Start* start) const {
        int panels = 0;
        for (int first = pixels.first; first < pixels.last; first += panel) {
            start[panels++] = {first / shape_.out_width, first % shape_.out_width, std::min(panel, pixels.last - first)};
        }
        return panels;
    }

    // Writes up to a vector more than the row of the panel, where what belongs there is written later, or nothing lies.
    void pack_panel(const ConvCall& call, const Start& start, const float* tap, float* to) const {
        const std::ptrdiff_t row = call.in.row * shape_.stride_height;
        each_stretch(start.y, start.x, start.pixels, shape_.out_width, [&](int y, int x, int number, int at) {
            const float* const from = tap + y * row + x * shape_.stride_width;
            if (shape_.stride_width == 1) {
                for (int p = 0; p < number; p += lanes) store(to + at + p, load(from + p));
            } else if (shape_.stride_width == 2) {
                for (int p = 0; p < number; p += lanes) {
                    store(to + at + p, evens(load(from + 2 * p), load(from + 2 * p + lanes)));
                }
            } else {
                for (int p = 0; p < number; ++p) to[at + p] = from[p * shape_.stride_width];
            }
        });
    }

    ConvShape shape_;
    const float* weight_;
    const float* bias_;
};
