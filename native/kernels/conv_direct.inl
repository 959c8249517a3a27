// The direct convolution: any kernel, stride, padding, dilation and groups, over chosen channels.
//
// Work is cut into columns (vectors of pixels of one output row) and groups of up to six output channels. A stride is
// taken out first: the rows that a block of columns reads are split into their phases, so that neighbouring outputs
// read neighbouring values and one tile serves all.

class DirectConvolution final : public Convolution {
public:
    DirectConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), weight_(weight), bias_(bias) {
        const bool threes = shape.kernel_width == 3 && shape.dilation_width == 1 && !strided();
        const bool pixel = shape.taps() == 1 && shape.pad_top == 0 && shape.pad_left == 0;
        run_ = threes ? 3 : 1;
        for (int r = 0; r < max_rows; ++r) {
            std::copy_n(threes ? tiles<3>[r] : pixel ? tiles<0>[r] : tiles<1>[r], max_columns, tile_[r]);
        }
    }

    std::size_t scratch() const override {
        return channel_floats() + tap_floats() + (strided() ? phase_floats() : 0);
    }

    int tasks(const ConvCall& call, int threads) const override {
        return Cut::tasks(Grid(*this, call).columns(), tasks_for(macs(call), threads), threads, least_columns);
    }

    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }

    const char* kernel(const ConvCall&) const override { return strided() ? "direct, strided" : "direct"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        Grid grid(*this, call);
        const Cut cut(grid.columns(), tasks, least_columns);
        const Range columns = cut.columns(task, grid.columns());
        if (shape_.taps() > 1) ask_for_rows(shape_, call, cut, grid.rows_of(columns));
        each_group(shape_, call, [&](Channels in, Channels out) {
            const Range channels = cut.channels(task, out.count);
            if (channels.empty()) return;
            run_block(call, grid, in, {out.index + channels.first, channels.last - channels.first}, columns, scratch);
        });
    }

private:
    static constexpr int least_columns = 12;  // of a task, before output channels are split
    static constexpr int block_columns = 12;  // whose inputs stay in the first cache: a multiple of 2, 3, 4

    // How output pixels are cut into columns. A 1x1 convolution of maps without halos sees one long row.
    struct Grid {
        int rows, width, per_row;

        Grid(const DirectConvolution& conv, const ConvCall& call) {
            const ConvShape& s = conv.shape_;
            const bool flat = is_pixelwise(s) && gapless(call.in) && gapless(call.out) && gapless(call.residual);
            rows = flat ? 1 : s.out_height;
            width = flat ? s.out_height * s.out_width : s.out_width;
            per_row = (width + lanes - 1) / lanes;
        }

        int columns() const { return rows * per_row; }
        Range rows_of(Range columns) const { return {columns.first / per_row, (columns.last - 1) / per_row + 1}; }
    };

    bool strided() const { return shape_.stride_height > 1 || shape_.stride_width > 1; }

    void run_block(const ConvCall& call, const Grid& grid, Channels in, Channels out, Range columns,
                   float* scratch) const {
        auto* const channel = reinterpret_cast<std::ptrdiff_t*>(scratch);
        auto* const weight = reinterpret_cast<int*>(channel + in.count);
        auto* const tap = reinterpret_cast<std::ptrdiff_t*>(scratch + channel_floats());
        float* const phases = scratch + channel_floats() + tap_floats();
        const int group_start = in.count > 0 ? in.index[0] / shape_.in_per_group() * shape_.in_per_group() : 0;
        for (int a = 0; a < in.count; ++a) {
            channel[a] = in.index[a] * call.in.plane;
            weight[a] = (in.index[a] - group_start) * shape_.taps();
        }
        const Sources sources{channel, weight, in.count, tap, shape_.taps() / run_};
        if (!strided()) {
            for (int t = 0; t < shape_.taps(); t += run_) {
                const int y = t / shape_.kernel_width * shape_.dilation_height - shape_.pad_top;
                const int x = t % shape_.kernel_width * shape_.dilation_width - shape_.pad_left;
                tap[t / run_] = y * call.in.row + x;
            }
            return run_columns(call, grid, sources, {call.in.data, call.in.row, 0}, out, columns);
        }
        const int step = phase_rows * grid.per_row;  // whole rows, so that their phases are split once
        for (int first = columns.first, last; first < columns.last; first = last) {
            last = std::min(columns.last, (first / step + 1) * step);
            const Window window = split_phases(call, in, channel, tap, phases, first / grid.per_row,
                                               (last - 1) / grid.per_row + 1);
            run_columns(call, grid, sources, window, out, {first, last});
        }
    }

    // Where the pixel under tap (0, 0) of output (y, x) lies, but for padding: data + (y - first_row) * row + x.
    struct Window {
        const float* data;
        std::ptrdiff_t row;
        int first_row;
    };

    void run_columns(const ConvCall& call, const Grid& grid, const Sources& sources, const Window& window,
                     Channels out, Range columns) const {
        Column column[block_columns];
        for (int sub = columns.first; sub < columns.last; sub += block_columns) {
            const int count = std::min(block_columns, columns.last - sub);
            for (int c = 0; c < count; ++c) {
                const int y = (sub + c) / grid.per_row, x = (sub + c) % grid.per_row * lanes;
                column[c] = {window.data + (y - window.first_row) * window.row + x, y * call.out.row + x,
                             y * call.residual.row + x, std::min(lanes, grid.width - x)};
            }
            for (int o = 0; o < out.count;) {
                const int rows = next_rows(out.count - o);
                Row row[max_rows];
                for (int r = 0; r < rows; ++r) {
                    const int channel = out.index[o + r];
                    row[r] = {weight_ + std::ptrdiff_t{channel} * shape_.in_per_group() * shape_.taps(),
                              Finish(call, channel, bias_, shape_)};
                }
                const int most = columns_of(rows);
                for (int c = 0; c < count; c += most) {
                    const int number = std::min(most, count - c);
                    tile_[rows - 1][number - 1](sources, row, column + c);
                }
                o += rows;
            }
        }
    }

    // ---- strides

    static constexpr int phase_rows = 4;  // output rows whose phases are split at once

    int phase_height() const { return phase_rows + reach_down(shape_) / shape_.stride_height; }

    std::ptrdiff_t phase_plane() const { return std::ptrdiff_t{phase_row(shape_)} * phase_height(); }

    Window split_phases(const ConvCall& call, Channels in, std::ptrdiff_t* channel, std::ptrdiff_t* tap, float* phases,
                        int first_row, int last_row) const {
        const int sh = shape_.stride_height, sw = shape_.stride_width;
        const int width = phase_row(shape_);
        const std::ptrdiff_t plane = phase_plane();
        for (int t = 0; t < shape_.taps(); ++t) {
            const int y = t / shape_.kernel_width * shape_.dilation_height;
            const int x = t % shape_.kernel_width * shape_.dilation_width;
            tap[t] = (std::ptrdiff_t{y % sh} * sw + x % sw) * plane + std::ptrdiff_t{y / sh} * width + x / sw;
        }
        for (int a = 0; a < in.count; ++a) {
            channel[a] = std::ptrdiff_t{a} * sh * sw * plane;
            const float* source = call.in.channel(in.index[a]) - shape_.pad_top * call.in.row - shape_.pad_left;
            for (int py = 0; py < std::min(sh, reach_down(shape_) + 1); ++py) {
                float* const phase = phases + channel[a] + std::ptrdiff_t{py} * sw * plane;
                const int rows = last_row - first_row + (reach_down(shape_) - py) / sh;
                for (int y = 0; y < rows; ++y) {
                    split_row(shape_, source + (std::ptrdiff_t{first_row + y} * sh + py) * call.in.row,
                              phase + std::ptrdiff_t{y} * width, plane);
                }
            }
        }
        return {phases, width, first_row};
    }

    std::size_t channel_floats() const {
        return round_up(shape_.in_per_group() * (sizeof(std::ptrdiff_t) + sizeof(int)) / sizeof(float), 16);
    }
    std::size_t tap_floats() const { return floats_of<std::ptrdiff_t>(shape_.taps()); }
    std::size_t phase_floats() const {
        const std::size_t planes = std::size_t(shape_.in_per_group()) * shape_.stride_height * shape_.stride_width;
        return round_up(planes * phase_plane() + lanes, 16);
    }

    ConvShape shape_;
    const float* weight_;
    const float* bias_;
    int run_;  // taps in a run: see Sources
    Tile tile_[max_rows][max_columns];
};
