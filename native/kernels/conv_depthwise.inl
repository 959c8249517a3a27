// One filter for each channel: every output channel reads one input channel.

class DepthwiseConvolution final : public Convolution {
public:
    static bool takes(const ConvShape& s) { return s.groups == s.in_channels && s.in_per_group() == 1; }

    DepthwiseConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), weight_(weight), bias_(bias) {}

    std::size_t scratch() const override {
        return floats_of<std::ptrdiff_t>(shape_.taps()) + phase_floats();
    }

    int tasks(const ConvCall& call, int threads) const override {
        if (threads == 1) return 1;
        const std::int64_t pixels = std::int64_t{shape_.out_height} * shape_.out_width * call.active_out.count;
        return static_cast<int>(std::clamp<std::int64_t>(pixels / smallest_task, 1,
                                                         std::min(tasks_of_thread * threads, std::max(call.active_out.count, 1))));
    }

    std::int64_t macs(const ConvCall& call) const override { return macs_of(shape_, call); }
    const char* kernel(const ConvCall&) const override { return "depthwise"; }

    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        const Range mine = share(call.active_out.count, task, tasks);
        const int outs = shape_.out_per_group();
        const Channels in = call.active_in;
        int i = 0;
        for (int n = mine.first; n < mine.last; ++n) {
            const int o = call.active_out.index[n];
            while (i < in.count && in.index[i] < o / outs) ++i;
            run_channel(call, o, i < in.count && in.index[i] == o / outs, scratch);
        }
    }

private:
    static constexpr int smallest_task = 1 << 14;  // pixels
    static constexpr int at_once = 4;              // vectors of a row, so that sums don't wait for each other

    bool strided() const { return shape_.stride_width > 1; }

    int padded_rows() const {
        return (shape_.out_height - 1) * shape_.stride_height + reach_down(shape_) + 1;
    }

    std::size_t phase_floats() const {
        return strided() ? std::size_t(padded_rows()) * shape_.stride_width * phase_row(shape_) + lanes : 0;
    }

    void run_channel(const ConvCall& call, int o, bool active, float* scratch) const {
        auto* const tap = reinterpret_cast<std::ptrdiff_t*>(scratch);
        float* const phases = scratch + floats_of<std::ptrdiff_t>(shape_.taps());
        const float* source = call.in.channel(o / shape_.out_per_group()) - shape_.pad_top * call.in.row - shape_.pad_left;
        std::ptrdiff_t row = call.in.row;
        if (strided() && active) {
            row = std::ptrdiff_t{phase_row(shape_)} * shape_.stride_width;
            for (int y = 0; y < padded_rows(); ++y) {
                split_row(shape_, source + y * call.in.row, phases + y * row, phase_row(shape_));
            }
            source = phases;
        }
        for (int t = 0; t < shape_.taps(); ++t) {
            const int y = t / shape_.kernel_width * shape_.dilation_height;
            const int x = t % shape_.kernel_width * shape_.dilation_width;
            tap[t] = strided() ? y * row + x % shape_.stride_width * phase_row(shape_) + x / shape_.stride_width : y * row + x;
        }
        const Finish finish(call, o, bias_, shape_);
        const float* const weight = weight_ + std::ptrdiff_t{o} * shape_.taps();
        const int taps = active ? shape_.taps() : 0;
        for (int y = 0; y < shape_.out_height; ++y) {
            const float* const line = source + y * shape_.stride_height * row;
            for (int x = 0; x < shape_.out_width; x += at_once * lanes) {
                const int vectors = std::min(at_once, (shape_.out_width - x + lanes - 1) / lanes);
                with_number<at_once>(vectors, [&](auto n) {
                    run_vectors<n.value>(call, finish, line, tap, weight, taps, y, x);
                });
            }
        }
    }

    template <int NUMBER>
    void run_vectors(const ConvCall& call, const Finish& finish, const float* line, const std::ptrdiff_t* tap,
                     const float* weight, int taps, int y, int x) const {
        V sum[NUMBER] = {};
        for (int t = 0; t < taps; ++t) {
            const V w = broadcast(weight[t]);
#pragma GCC unroll 4
            for (int v = 0; v < NUMBER; ++v) sum[v] += w * load(line + tap[t] + x + v * lanes);
        }
#pragma GCC unroll 4
        for (int v = 0; v < NUMBER; ++v) {
            const int at = x + v * lanes;
            finish.write(sum[v], y * call.out.row + at, y * call.residual.row + at,
                         std::min(lanes, shape_.out_width - at));
        }
    }

    ConvShape shape_;
    const float* weight_;
    const float* bias_;
};
