// Winograd's F(2x2, 3x3) over chosen channels: 4 products for an output pixel and pair of channels, where the direct
// form takes 9. (Lavin and Gray, 'Fast Algorithms for Convolutional Neural Networks', 2016, arXiv 1509.09308.)
//
// The output is cut into tiles of 2x2 pixels. Each tile's 4x4 inputs are transformed once for each active input
// channel; then, for each of the 16 places in the transformed tile, tiles by output channels is a matrix product over
// the active input channels, whose weights are again read where they lie. A tile's result doesn't depend on where in a
// vector or in a block it stands.

inline constexpr int places = 16;  // of a transformed tile

class WinogradConvolution final : public Convolution {
public:
    // Few channels don't pay for the transforms, few tiles leave vectors empty.
    static bool takes(const ConvShape& s) {
        return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 &&
               s.dilation_height == 1 && s.dilation_width == 1 && s.groups == 1 && s.in_channels >= 8 &&
               s.out_channels >= 8 && s.out_height * s.out_width >= 25;
    }

    WinogradConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), bias_(bias), across_((shape.out_width + 1) / 2), down_((shape.out_height + 1) / 2),
          weight_(new float[std::size_t(shape.out_channels) * places * shape.in_channels]) {
        for (int o = 0; o < shape.out_channels; ++o) {
            for (int i = 0; i < shape.in_channels; ++i) {
                transform_weight(weight + (std::size_t(o) * shape.in_channels + i) * 9, row(o) + i);
            }
        }
    }

    std::size_t scratch() const override {
        return index_floats() + values_floats() + std::size_t(max_rows) * places * sum_row + line_floats;
    }

    int tasks(const ConvCall& call, int threads) const override {
        return Cut::tasks(panels_of(across_ * down_), tasks_for(macs(call), threads), threads, 1);
    }

    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }

    const char* kernel(const ConvCall&) const override { return "winograd 2x2"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        const int tiles = across_ * down_, panels = panels_of(tiles);
        const Cut cut(panels, tasks, 1);
        const Range part = cut.columns(task, panels), channels = cut.channels(task, call.active_out.count);
        if (channels.empty()) return;
        ask_for_rows(shape_, call, cut, {2 * (part.first * panel / across_),
                                         2 * ((std::min(part.last * panel, tiles) - 1) / across_) + 2});
        const Channels in = call.active_in;
        const Channels out{call.active_out.index + channels.first, channels.last - channels.first};
        auto* const value = reinterpret_cast<std::ptrdiff_t*>(scratch);
        float* const values = scratch + index_floats();
        float* const sums = values + values_floats();
        for (int a = 0; a < in.count; ++a) value[a] = std::ptrdiff_t{a} * panel;
        const int most = block_of(in.count);
        const std::ptrdiff_t panel_step = std::ptrdiff_t{in.count} * panel;
        for (int first = part.first; first < part.last; first += most) {
            const Range block{first * panel, std::min(std::min(first + most, part.last) * panel, tiles)};
            const std::ptrdiff_t place_step = panel_step * panels_of(block.last - block.first) + apart;
            transform_inputs(call, block, values, panel_step, place_step, sums + std::ptrdiff_t{max_rows} * places * sum_row);
            const Product product{{value, in.index, in.count}, values, place_step, panel_step, shape_.in_channels, places,
                                  block.last - block.first, sums, sum_row, 0};
            // Tasks side by side begin with other channels, lest they write to the same cache line at a time.
            const int turn = task % 2 ? out.count / 2 / max_rows * max_rows : 0;
            for (const Channels& some : {Channels{out.index + turn, out.count - turn}, Channels{out.index, turn}}) {
                product.run(some, [&](int o) { return row(o); },
                            [&](int o, const float* sum) { write_channel(call, o, block, sum); });
            }
        }
    }

private:
    static constexpr int most_panels = 6;                              // of tiles in a block
    static constexpr int values_budget = 96 << 10;                     // floats of transformed inputs in the second cache
    static constexpr int sum_row = most_panels * panel + lanes;        // sums are read past the last tile of a block
    static constexpr int apart = 16;  // floats between places: a cache line, lest all of them fall into the same set
    static constexpr int line_floats = places * sum_row;               // one channel's transformed inputs, in order

    // Blocks are as large as the second cache allows, so that weights are read seldom.
    static int block_of(int inputs) {
        return std::clamp(values_budget / (places * panel * std::max(inputs, 1)), 1, most_panels);
    }

    std::size_t index_floats() const { return floats_of<std::ptrdiff_t>(shape_.in_channels); }

    std::size_t values_floats() const {
        std::size_t most = 0;  // fewer channels have longer blocks
        for (int inputs = 1; inputs <= shape_.in_channels; ++inputs) {
            most = std::max(most, std::size_t(places) * (inputs * block_of(inputs) * panel + apart));
        }
        return most;
    }

    float* row(int o) { return weight_.get() + std::size_t(o) * places * shape_.in_channels; }
    const float* row(int o) const { return weight_.get() + std::size_t(o) * places * shape_.in_channels; }

    // G g G^T, in double precision; places are `in_channels` apart.
    void transform_weight(const float* g, float* to) const {
        double half[4][3];
        for (int x = 0; x < 3; ++x) {
            const double a = g[x], b = g[3 + x], c = g[6 + x];
            half[0][x] = a;
            half[1][x] = (a + b + c) / 2;
            half[2][x] = (a - b + c) / 2;
            half[3][x] = c;
        }
        for (int y = 0; y < 4; ++y) {
            const double a = half[y][0], b = half[y][1], c = half[y][2];
            const double full[4] = {a, (a + b + c) / 2, (a - b + c) / 2, c};
            for (int x = 0; x < 4; ++x) to[std::ptrdiff_t{y * 4 + x} * shape_.in_channels] = static_cast<float>(full[x]);
        }
    }

    // B^T d B of every tile, into panels. Values past the map that tiles at its edge read reach only outputs past it.
    void transform_inputs(const ConvCall& call, Range tiles, float* values, std::ptrdiff_t panel_step,
                          std::ptrdiff_t place_step, float* line) const {
        const int number = tiles.last - tiles.first;
        for (int a = 0; a < call.active_in.count; ++a) {
            const float* const from = call.in.channel(call.active_in.index[a]);
            float* const to = values + std::ptrdiff_t{a} * panel;
            if (across_ % lanes == 0) {  // no vector of tiles spans two panels
                transform_channel(call.in.row, from, tiles, [&](int tile) {
                    return Target{to + tile / panel * panel_step + tile % panel, place_step};
                });
                continue;
            }
            transform_channel(call.in.row, from, tiles, [&](int tile) { return Target{line + tile, sum_row}; });
            for (int place = 0; place < places; ++place) {
                for (int tile = 0; tile < number; tile += lanes) {
                    store(to + place * place_step + tile / panel * panel_step + tile % panel,
                          load(line + place * sum_row + tile));
                }
            }
        }
    }

    // Where a vector of transformed tiles goes: its first place, and the way from place to place.
    struct Target {
        float* first;
        std::ptrdiff_t step;
    };

    template <class TargetOf>
    void transform_channel(std::ptrdiff_t row, const float* from, Range tiles, TargetOf target) const {
        const int last_row = shape_.out_height + 1;  // of the padded input
        each_stretch(tiles, across_, [&](int y, int x, int count, int at) {
            const float* source[4];
            for (int i = 0; i < 4; ++i) {
                source[i] = from + (std::min(2 * y + i, last_row) - shape_.pad_top) * row + 2 * x - shape_.pad_left;
            }
            for (int v = 0; v < count; v += lanes) {
                V e[4][4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const float* p = source[i] + 2 * v;
                    const V low = load(p), high = load(p + lanes);
                    const V d0 = evens(low, high), d1 = odds(low, high);
                    const V d2 = shifted(d0, p[2 * lanes]), d3 = shifted(d1, p[2 * lanes + 1]);
                    e[i][0] = d0 - d2;
                    e[i][1] = d1 + d2;
                    e[i][2] = d2 - d1;
                    e[i][3] = d1 - d3;
                }
                const auto [to, step] = target(at + v);
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    store(to + k * step, e[0][k] - e[2][k]);
                    store(to + (4 + k) * step, e[1][k] + e[2][k]);
                    store(to + (8 + k) * step, e[2][k] - e[1][k]);
                    store(to + (12 + k) * step, e[1][k] - e[3][k]);
                }
            }
        });
    }

    // A^T m A of every tile of a channel, and what follows the convolution.
    void write_channel(const ConvCall& call, int o, Range tiles, const float* sums) const {
        const Finish finish(call, o, bias_, shape_);
        each_stretch(tiles, across_, [&](int y, int x, int count, int at) {
            for (int v = 0; v < count; v += lanes) {
                V top[4], bottom[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const float* const m = sums + at + v + k * sum_row;
                    const V m0 = load(m), m1 = load(m + 4 * sum_row), m2 = load(m + 8 * sum_row),
                            m3 = load(m + 12 * sum_row);
                    top[k] = m0 + m1 + m2;
                    bottom[k] = m1 - m2 - m3;
                }
                const int column = 2 * (x + v);
                const int pixels = std::min(2 * std::min(count - v, lanes), shape_.out_width - column);
                write_row(call, finish, top, 2 * y, column, pixels);
                if (2 * y + 1 < shape_.out_height) write_row(call, finish, bottom, 2 * y + 1, column, pixels);
            }
        });
    }

    static void write_row(const ConvCall& call, const Finish& finish, const V (&s)[4], int y, int x, int pixels) {
        const V even = s[0] + s[1] + s[2], odd = s[1] - s[2] - s[3];
        const std::ptrdiff_t at = y * call.out.row + x, residual_at = y * call.residual.row + x;
        finish.write(zip_low(even, odd), at, residual_at, std::min(pixels, lanes));
        if (pixels > lanes) finish.write(zip_high(even, odd), at + lanes, residual_at + lanes, pixels - lanes);
    }

    ConvShape shape_;
    const float* bias_;
    int across_, down_;          // tiles
    std::unique_ptr<float[]> weight_;  // transformed: [out_channels][places][in_channels]
};
