// The register tile of the direct convolution: ROWS output channels by COLUMNS vectors of neighbouring pixels.
//
// Weights are read where they lie, one broadcast for each row, input channel and tap; pixels are read where they lie,
// one unaligned load for each column and tap. No set of channels is ever gathered, and sums are added in the order of
// input channels and taps, whatever the tile.

// What all tiles of a task share. Tiles are compiled for runs of three taps (RUN = 3), of one (1), and for one tap in
// all, at the pixel itself (0).
struct Sources {
    const std::ptrdiff_t* channel;  // [count]: floats from the base of a pixel to its value in each active input channel
    const int* weight;              // [count]: floats from the start of a weight row to the channel's first tap
    int count;
    const std::ptrdiff_t* run;      // [runs]: floats from a pixel to the pixel under the first tap of each run
    int runs;                       // runs of taps whose pixels, like their weights, are neighbours
};

struct Column {
    const float* in;                // the vector's first pixel, in channel 0 of the source
    std::ptrdiff_t out, residual;   // of its first pixel in a channel's plane
    int pixels;                     // that are written, 1 to `lanes`
};

struct Row {
    const float* weight;
    Finish finish;
};

inline constexpr int max_rows = 6, max_columns = 4;

// What is done beside each of the products: nothing, for one.
struct Nothing {
    void operator()() const {}
};

template <int ROWS, int COLUMNS, int RUN, class Beside = Nothing>
__attribute__((always_inline)) inline void accumulate(const Sources& s, const Row* row, const Column* column,
                                                      V (&sum)[ROWS][COLUMNS], Beside&& beside = {}) {
    const float* in[COLUMNS];
    const float* weight[ROWS];
    for (int c = 0; c < COLUMNS; ++c) in[c] = column[c].in;
    for (int r = 0; r < ROWS; ++r) weight[r] = row[r].weight;
    const std::ptrdiff_t* const run = s.run;
    const int count = s.count, runs = s.runs;
    for (int a = 0; a < count; ++a) {
        beside();
        const std::ptrdiff_t x = s.channel[a];
        std::ptrdiff_t w = s.weight[a];
        for (int n = 0; n < (RUN > 0 ? runs : 1); ++n, w += RUN) {
            const std::ptrdiff_t at = RUN > 0 ? x + run[n] : x;
#pragma GCC unroll 3
            for (int t = 0; t < (RUN > 0 ? RUN : 1); ++t) {
                V pixel[COLUMNS];
#pragma GCC unroll 4
                for (int c = 0; c < COLUMNS; ++c) pixel[c] = load(in[c] + at + t);
#pragma GCC unroll 6
                for (int r = 0; r < ROWS; ++r) {
                    const V value = broadcast(weight[r][w + t]);
#pragma GCC unroll 4
                    for (int c = 0; c < COLUMNS; ++c) sum[r][c] += value * pixel[c];
                }
            }
        }
    }
}

template <int ROWS, int COLUMNS, int RUN>
void tile(const Sources& s, const Row* row, const Column* column) {
    V sum[ROWS][COLUMNS] = {};
    accumulate<ROWS, COLUMNS, RUN>(s, row, column, sum);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) {
            row[r].finish.write(sum[r][c], column[c].out, column[c].residual, column[c].pixels);
        }
    }
}

using Tile = void (*)(const Sources&, const Row*, const Column*);

// Most columns that a tile of so many rows takes: some twelve sums keep both multipliers busy.
inline constexpr int columns_of(int rows) { return rows >= 5 ? 2 : rows == 4 ? 3 : 4; }

template <int RUN>
inline constexpr Tile tiles[max_rows][max_columns] = {
    {tile<1, 1, RUN>, tile<1, 2, RUN>, tile<1, 3, RUN>, tile<1, 4, RUN>},
    {tile<2, 1, RUN>, tile<2, 2, RUN>, tile<2, 3, RUN>, tile<2, 4, RUN>},
    {tile<3, 1, RUN>, tile<3, 2, RUN>, tile<3, 3, RUN>, tile<3, 4, RUN>},
    {tile<4, 1, RUN>, tile<4, 2, RUN>, tile<4, 3, RUN>, nullptr},
    {tile<5, 1, RUN>, tile<5, 2, RUN>, nullptr, nullptr},
    {tile<6, 1, RUN>, tile<6, 2, RUN>, nullptr, nullptr},
};

// ---- products with matrices that were made for them: packed pixels, transformed tiles

// Such a matrix is cut into panels of two columns, each of which lies in one piece, row after row.
inline constexpr int panel_columns = 2;
inline constexpr int panel = panel_columns * lanes;  // values in a row

inline int panels_of(int values) { return (values + panel - 1) / panel; }

// Which rows of a panel and which weights belong together.
struct Pairs {
    const std::ptrdiff_t* value;
    const int* weight;
    int count;
};

// Weights that come next, fetched line by line beside the products before: a large layer waits for its weights otherwise,
// as the processor foresees neither the next rows nor the gaps in them.
struct Ahead {
    const float* const* row;
    int rows;
    std::ptrdiff_t length;
    std::ptrdiff_t at = 0;

    void operator()() {
        if (rows == 0) return;
        __builtin_prefetch(*row + at, 0, 2);
        if ((at += 16) < length) return;
        at = 0, ++row, --rows;
    }
};

// `steps` products of the same form, whose weights lie `weight_step` apart, values `value_step`, and sums `sum_row`
// floats for each row and step: sum[r][step][value].
template <int ROWS, int COLUMNS>
void tile_sums(Pairs pairs, const float* const* weight, std::ptrdiff_t weight_step, const float* value,
               std::ptrdiff_t value_step, int steps, float* sums, int sum_row, Ahead ahead) {
    Row row[ROWS];
    Column column[COLUMNS];
    const Sources sources{pairs.value, pairs.weight, pairs.count, nullptr, 1};
    for (int step = 0; step < steps; ++step) {
        for (int r = 0; r < ROWS; ++r) row[r].weight = weight[r] + step * weight_step;
        for (int c = 0; c < COLUMNS; ++c) column[c].in = value + step * value_step + c * lanes;
        V sum[ROWS][COLUMNS] = {};
        if (ahead.rows) accumulate<ROWS, COLUMNS, 0>(sources, row, column, sum, ahead);
        else accumulate<ROWS, COLUMNS, 0>(sources, row, column, sum);
        for (int r = 0; r < ROWS; ++r) {
            for (int c = 0; c < COLUMNS; ++c) store(sums + (r * steps + step) * sum_row + c * lanes, sum[r][c]);
        }
    }
}

using TileSums = void (*)(Pairs, const float* const*, std::ptrdiff_t, const float*, std::ptrdiff_t, int, float*, int,
                          Ahead);

inline constexpr TileSums sum_tiles[max_rows][panel_columns] = {
    {tile_sums<1, 1>, tile_sums<1, 2>}, {tile_sums<2, 1>, tile_sums<2, 2>}, {tile_sums<3, 1>, tile_sums<3, 2>},
    {tile_sums<4, 1>, tile_sums<4, 2>}, {tile_sums<5, 1>, tile_sums<5, 2>}, {tile_sums<6, 1>, tile_sums<6, 2>},
};

// A matrix product: rows of weights by panels of values.
struct Product {
    static constexpr std::ptrdiff_t far_weights = 64 << 10;  // floats that the second cache no longer holds beside all else

    Pairs pairs;
    const float* value;
    std::ptrdiff_t value_step, panel_step, weight_step;
    int steps, values;
    float* sums;
    int sum_row;
    std::ptrdiff_t row_length;  // of weights, in floats; 0: they are not fetched ahead

    // All rows, up to six at a time: row_of(channel) is a row's weights, take(channel, sums) takes its sums.
    template <class RowOf, class Take>
    void run(Channels out, RowOf row_of, Take take) const {
        const float *row[max_rows], *next[max_rows];
        const auto list = [&](int first, const float** to) {
            const int rows = next_rows(out.count - first);
            for (int r = 0; r < rows; ++r) to[r] = row_of(out.index[first + r]);
            return rows;
        };
        const bool far = row_length * out.count > far_weights;
        for (int o = 0; o < out.count;) {
            const int rows = list(o, row);
            const int then = far ? list(o + rows, next) : 0;
            for (int p = 0; p * panel < values; ++p) {
                const int columns = values - p * panel > lanes ? 2 : 1;
                sum_tiles[rows - 1][columns - 1](pairs, row, weight_step, value + p * panel_step, value_step, steps,
                                                 sums + p * panel, sum_row, {next, p ? 0 : then, row_length});
            }
            for (int r = 0; r < rows; ++r) take(out.index[o + r], sums + std::ptrdiff_t{r} * steps * sum_row);
            o += rows;
        }
    }
};
