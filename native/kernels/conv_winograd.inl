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
          narrow_(across_ * 2 == lanes || across_ * 4 == lanes), values_floats_(most_values(shape.in_channels)),
          weight_(new float[std::size_t(shape.out_channels) * places * shape.in_channels]) {
        for (int o = 0; o < shape.out_channels; ++o) {
            for (int i = 0; i < shape.in_channels; ++i) {
                transform_weight(weight + (std::size_t(o) * shape.in_channels + i) * 9, row(o) + i);
            }
        }
    }

    std::size_t scratch() const override {
        return index_floats() + values_floats_ + std::size_t(max_rows) * places * sum_row + line_floats;
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
        float* const sums = values + values_floats_;
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
    static constexpr int narrow_row = sum_row + lanes;                 // of one column of tiles, every second row of the input
    static_assert(8 * narrow_row <= line_floats);

    // Blocks are as large as the second cache allows, so that weights are read seldom.
    static int block_of(int inputs) {
        return std::clamp(values_budget / (places * panel * std::max(inputs, 1)), 1, most_panels);
    }

    std::size_t index_floats() const { return floats_of<std::ptrdiff_t>(shape_.in_channels); }

    // Of transformed inputs, however many are active.
    static std::size_t most_values(int in_channels) {
        std::size_t most = 0;  // fewer channels have longer blocks
        for (int inputs = 1; inputs <= in_channels; ++inputs) {
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
            const auto in_panel = [&](int tile) {
                return Target{to + tile / panel * panel_step + tile % panel, place_step};
            };
            if (narrow_) {
                if (2 * across_ == lanes) transform_narrow<lanes / 2>(call.in.row, from, tiles, line, in_panel);
                else transform_narrow<lanes / 4>(call.in.row, from, tiles, line, in_panel);
                continue;
            }
            if (across_ % lanes == 0) {  // no vector of tiles spans two panels
                transform_rows(call.in.row, from, tiles, in_panel);
                continue;
            }
            transform_rows(call.in.row, from, tiles, [&](int tile) { return Target{line + tile, sum_row}; });
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

    // The padded input's row `y`, from its first column on.
    const float* input_row(std::ptrdiff_t row, const float* from, int y) const {
        return from + (std::min(y, shape_.out_height + 1) - shape_.pad_top) * row - shape_.pad_left;
    }

    // A vector holds tiles of one row.
    template <class TargetOf>
    void transform_rows(std::ptrdiff_t row, const float* from, Range tiles, TargetOf target) const {
        each_stretch(tiles, across_, [&](int y, int x, int count, int at) {
            const float* source[4];
            for (int i = 0; i < 4; ++i) source[i] = input_row(row, from, 2 * y + i) + 2 * x;
            for (int v = 0; v < count; v += lanes) {
                transform(target(at + v), [&](int i, V (&d)[4]) {
                    const float* const p = source[i] + 2 * v;
                    const V low = load(p), high = load(p + lanes);
                    d[0] = evens(low, high), d[1] = odds(low, high);
                    d[2] = shifted(d[0], p[2 * lanes]), d[3] = shifted(d[1], p[2 * lanes + 1]);
                });
            }
        });
    }

    // A vector holds tiles of several rows: what these read is brought together first, by column of the tiles, the
    // input's even rows and its odd ones each for themselves. Then each row and column of all tiles is one vector.
    template <int ACROSS, class TargetOf>
    void transform_narrow(std::ptrdiff_t row, const float* from, Range tiles, float* line, TargetOf target) const {
        const int number = tiles.last - tiles.first, first = 2 * (tiles.first / ACROSS), rows = 2 * (number / ACROSS + 1);
        float* const column[4] = {line, line + 2 * narrow_row, line + 4 * narrow_row, line + 6 * narrow_row};
        for (int i = 0; i < rows; ++i) {
            const float* const p = input_row(row, from, first + i);
            const V a = load(p), b = load(p + 2);
            const std::ptrdiff_t at = i % 2 * narrow_row + std::ptrdiff_t{i / 2} * ACROSS;
            store_first<ACROSS>(column[0] + at, evens(a, a));
            store_first<ACROSS>(column[1] + at, odds(a, a));
            store_first<ACROSS>(column[2] + at, evens(b, b));
            store_first<ACROSS>(column[3] + at, odds(b, b));
        }
        for (int v = 0; v < number; v += lanes) {
            transform(target(v), [&](int i, V (&d)[4]) {
                for (int k = 0; k < 4; ++k) d[k] = load(column[k] + i % 2 * narrow_row + i / 2 * ACROSS + v);
            });
        }
    }

    // A vector of tiles: read(i, d) gives columns 0 to 3 of row i of each.
    template <class Read>
    __attribute__((always_inline)) static void transform(Target target, Read read) {
        V e[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            V d[4];
            read(i, d);
            e[i][0] = d[0] - d[2];
            e[i][1] = d[1] + d[2];
            e[i][2] = d[2] - d[1];
            e[i][3] = d[1] - d[3];
        }
        const auto [to, step] = target;
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            store(to + k * step, e[0][k] - e[2][k]);
            store(to + (4 + k) * step, e[1][k] + e[2][k]);
            store(to + (8 + k) * step, e[2][k] - e[1][k]);
            store(to + (12 + k) * step, e[1][k] - e[3][k]);
        }
    }

    // Two rows of pixels from a vector of tiles, each in two vectors.
    struct Pixels {
        V top[2], bottom[2];
    };

    // A^T m A of every tile of a channel, and what follows the convolution.
    void write_channel(const ConvCall& call, int o, Range tiles, const float* sums) const {
        const Finish finish(call, o, bias_, shape_);
        if (narrow_) return write_narrow(call, finish, tiles, sums);
        each_stretch(tiles, across_, [&](int y, int x, int count, int at) {
            for (int v = 0; v < count; v += lanes) {
                const Pixels found = pixels_of(sums + at + v);
                const int column = 2 * (x + v);
                const int pixels = std::min(2 * std::min(count - v, lanes), shape_.out_width - column);
                write_row(call, finish, found.top, 2 * y, column, pixels);
                if (2 * y + 1 < shape_.out_height) write_row(call, finish, found.bottom, 2 * y + 1, column, pixels);
            }
        });
    }

    // The same where a vector of tiles holds two or four rows of them: each is one vector of pixels, or half of one.
    void write_narrow(const ConvCall& call, const Finish& finish, Range tiles, const float* sums) const {
        const int number = tiles.last - tiles.first, rows = lanes / across_;
        for (int v = 0; v < number; v += lanes) {
            const Pixels both = pixels_of(sums + v);
            for (int r = 0; r < rows && v + r * across_ < number; ++r) {
                const int y = 2 * ((tiles.first + v) / across_ + r);
                const auto write = [&](const V (&pixels)[2], int y) {
                    const V found = pixels[2 * r / rows];
                    finish.write(rows == 4 && r % 2 ? upper(found) : found, y * call.out.row, y * call.residual.row,
                                 shape_.out_width);
                };
                write(both.top, y);
                if (y + 1 < shape_.out_height) write(both.bottom, y + 1);
            }
        }
    }

    __attribute__((always_inline)) static Pixels pixels_of(const float* sums) {
        V top[4], bottom[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const float* const m = sums + k * sum_row;
            const V m0 = load(m), m1 = load(m + 4 * sum_row), m2 = load(m + 8 * sum_row), m3 = load(m + 12 * sum_row);
            top[k] = m0 + m1 + m2;
            bottom[k] = m1 - m2 - m3;
        }
        Pixels found;
        zip(top, found.top);
        zip(bottom, found.bottom);
        return found;
    }

    __attribute__((always_inline)) static void zip(const V (&s)[4], V (&pixels)[2]) {
        const V even = s[0] + s[1] + s[2], odd = s[1] - s[2] - s[3];
        pixels[0] = zip_low(even, odd), pixels[1] = zip_high(even, odd);
    }

    static void write_row(const ConvCall& call, const Finish& finish, const V (&s)[2], int y, int x, int pixels) {
        const std::ptrdiff_t at = y * call.out.row + x, residual_at = y * call.residual.row + x;
        finish.write(s[0], at, residual_at, std::min(pixels, lanes));
        if (pixels > lanes) finish.write(s[1], at + lanes, residual_at + lanes, pixels - lanes);
    }

    ConvShape shape_;
    const float* bias_;
    int across_, down_;                // tiles
    bool narrow_;                      // two or four rows of tiles in a vector
    std::size_t values_floats_;
    std::unique_ptr<float[]> weight_;  // transformed: [out_channels][places][in_channels]
};
