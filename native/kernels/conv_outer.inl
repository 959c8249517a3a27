// Outer products: vectors run along output channels, and weights lie input channel by input channel.
//
// In the other forms an output channel's weights lie together, those of inactive inputs among them: with few inputs
// active every cache line is touched for a few floats. On small maps, where a weight has few pixels to serve, a layer's
// time is that of its weights. Here all that an input weighs for a block of outputs lies in one piece, and what belongs to
// inactive inputs is never touched. Outputs of a block can't be left out, so this is for gates that choose inputs alone.

class OuterConvolution final : public Convolution {
public:
    static bool pays(const ConvShape& s) {
        return s.chooses_inputs && s.groups == 1 && s.stride_width <= 2 && s.out_height * s.out_width <= most_pixels &&
               std::int64_t{s.in_channels} * s.out_channels * s.taps() > far_weights;
    }

    OuterConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), bias_(bias), blocks_((shape.out_channels + block - 1) / block),
          lines_(floats_of<float>(std::size_t(shape.in_channels) * blocks_ * shape.taps() * block) / line_floats) {
        float* const to = &lines_[0].value[0];
        for (int o = 0; o < shape.out_channels; ++o) {
            for (int i = 0; i < shape.in_channels; ++i) {
                for (int t = 0; t < shape.taps(); ++t, ++weight) to[piece(i, o / block) + t * block + o % block] = *weight;
            }
        }
    }

    std::size_t scratch() const override {
        return floats_of<std::ptrdiff_t>(shape_.taps()) + floats_of<Tile>(pixels()) +
               floats_of<float>(std::size_t(blocks_) * block * pixels()) + pixels() + lanes;
    }

    int tasks(const ConvCall& call, int threads) const override {
        return std::min(tasks_for(product_cost * macs(call), threads), blocks_);
    }

    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }
    const char* kernel(const ConvCall&) const override { return "outer"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        const Range blocks = share(blocks_, task, tasks);
        auto* const tap = reinterpret_cast<std::ptrdiff_t*>(scratch);
        auto* const tiles = reinterpret_cast<Tile*>(scratch + floats_of<std::ptrdiff_t>(shape_.taps()));
        float* const sums = reinterpret_cast<float*>(tiles) + floats_of<Tile>(pixels());
        const std::size_t number = std::size_t(blocks.last - blocks.first) * block * pixels();
        std::fill_n(sums, number, 0.0f);
        for (int t = 0; t < shape_.taps(); ++t) {
            const int ky = t / shape_.kernel_width, kx = t % shape_.kernel_width;
            tap[t] = ky * shape_.dilation_height * call.in.row + kx * shape_.dilation_width;
        }
        add(call, blocks, {tap, shape_.taps(), call.in.row * shape_.stride_height, shape_.out_width}, tiles,
            list_tiles(call, tiles), sums);
        float* const line = sums + floats_of<float>(number);
        for (int o = blocks.first * block; o < std::min(blocks.last * block, shape_.out_channels); ++o) {
            const float* const sum = sums + std::ptrdiff_t{o / block - blocks.first} * block * pixels() + o % block;
            for (int p = 0; p < pixels(); ++p) line[p] = sum[p * block];
            write_pixels(shape_, call, Finish(call, o, bias_, shape_), {0, pixels()}, line);
        }
    }

private:
    static constexpr int most_pixels = 64;                  // with more, a weight serves until the next is there
    static constexpr int product_cost = 4;                  // of those that wait for weights, in usual ones
    static constexpr int block = 2 * lanes;                 // outputs
    static constexpr int most_sums = lanes == 16 ? 8 : 6;   // pixels of a tile: as many as there are registers for
    static constexpr int most_at_once = 16;                 // inputs
    static constexpr int products_at_once = 36;             // for each sum, before it is put back
    static constexpr int line_floats = 16;

    // A type of this instruction set: what is compiled for it must not be linked for others.
    struct alignas(64) Line {
        float value[line_floats];
    };

    // Active inputs, as many as are added at once, and what each weighs for one block of outputs.
    struct Inputs {
        int count;
        const float* channel[most_at_once];
        const float* weight[most_at_once];
        const float* next[most_at_once];  // weights that come after, to be fetched meanwhile
    };

    // What all tiles of a call share.
    struct Shared {
        const std::ptrdiff_t* tap;  // [taps]: floats from the pixel under the first tap
        int taps;
        std::ptrdiff_t down;        // floats of the input from an output pixel to that below it
        int out_width;
    };

    struct Tile {
        void (*add)(const Inputs&, const Shared&, std::ptrdiff_t, float*);
        std::ptrdiff_t in;  // floats from a channel's first pixel to that under the first tap
        int first;          // pixel of the output
    };

    int pixels() const { return shape_.out_height * shape_.out_width; }

    // Floats from the first weight to what input i weighs for block b, [tap][output].
    std::ptrdiff_t piece(int i, int b) const { return (std::ptrdiff_t{i} * blocks_ + b) * shape_.taps() * block; }

    int list_tiles(const ConvCall& call, Tile* tiles) const {
        const int pieces = (shape_.out_width + most_sums - 1) / most_sums;
        int count = 0;
        for (int piece = 0; piece < pieces; ++piece) {
            const Range columns = share(shape_.out_width, piece, pieces);
            const int width = columns.last - columns.first;
            for (int y = 0, rows; y < shape_.out_height; y += rows) {
                rows = y + 1 < shape_.out_height && 2 * width <= most_sums ? 2 : 1;
                Tile& tile = tiles[count++];
                with_number<2>(shape_.stride_width, [&](auto stride) {
                    with_number<most_sums>(width, [&](auto w) {
                        if (rows == 1) tile.add = add_tile<1, w.value, stride.value>;
                        else if constexpr (2 * w.value <= most_sums) tile.add = add_tile<2, w.value, stride.value>;
                    });
                });
                tile.in = (y * shape_.stride_height - shape_.pad_top) * call.in.row +
                          columns.first * shape_.stride_width - shape_.pad_left;
                tile.first = y * shape_.out_width + columns.first;
            }
        }
        return count;
    }

    // Adds to sums[block][pixel][output].
    void add(const ConvCall& call, Range blocks, const Shared& shared, const Tile* tiles, int count, float* sums) const {
        const Channels in = call.active_in;
        const float* const weights = &lines_[0].value[0];
        const int at_once = std::clamp(products_at_once / shape_.taps(), 1, most_at_once);
        Inputs inputs;
        for (int first = 0; first < in.count; first += at_once) {
            inputs.count = std::min(at_once, in.count - first);
            for (int i = 0; i < inputs.count; ++i) inputs.channel[i] = call.in.channel(in.index[first + i]);
            for (int b = blocks.first; b < blocks.last; ++b) {
                for (int i = 0; i < inputs.count; ++i) {
                    const int a = first + i, then = std::min(a + at_once, in.count - 1);
                    inputs.weight[i] = weights + piece(in.index[a], b);
                    inputs.next[i] = weights + (b + 1 < blocks.last ? piece(in.index[a], b + 1)
                                                                    : piece(in.index[then], blocks.first));
                }
                float* const to = sums + std::ptrdiff_t{b - blocks.first} * block * pixels();
                for (int t = 0; t < count; ++t) tiles[t].add(inputs, shared, tiles[t].in, to + tiles[t].first * block);
            }
        }
    }

    template <int ROWS, int COLUMNS, int STRIDE>
    static void add_tile(const Inputs& inputs, const Shared& shared, std::ptrdiff_t in, float* sums) {
        const std::ptrdiff_t down = shared.down, next_row = std::ptrdiff_t{shared.out_width} * block;
        V sum[ROWS][COLUMNS][2];
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) {
                for (int v = 0; v < 2; ++v) sum[r][c][v] = load(sums + r * next_row + c * block + v * lanes);
            }
        }
        for (int i = 0; i < inputs.count; ++i) {
            const float *weight = inputs.weight[i], *next = inputs.next[i], *const first = inputs.channel[i] + in;
            for (int t = 0; t < shared.taps; ++t, weight += block, next += block) {
                const float* const from = first + shared.tap[t];
                const V low = load(weight), high = load(weight + lanes);
                for (int f = 0; f < block; f += line_floats) __builtin_prefetch(next + f);
#pragma GCC unroll 2
                for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
                    for (int c = 0; c < COLUMNS; ++c) {
                        const V pixel = broadcast(from[r * down + c * STRIDE]);
                        sum[r][c][0] += low * pixel;
                        sum[r][c][1] += high * pixel;
                    }
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) {
                for (int v = 0; v < 2; ++v) store(sums + r * next_row + c * block + v * lanes, sum[r][c][v]);
            }
        }
    }

    ConvShape shape_;
    const float* bias_;
    int blocks_;
    std::vector<Line> lines_;  // weights [input][block of outputs][tap][output]
};
