// Winograd's products or plain ones, call by call.
//
// A pair of channels has 16 weights for Winograd's products and nine for plain ones. Where a large layer's weights come
// from beyond the second cache, time follows the weights, and those of a computed channel are all read, whichever inputs
// are active: few products per weight, on small maps with few active inputs, make the plain form the faster one (packed,
// or outer where that pays: it reads the weights of active inputs only). What is chosen follows from the decisions of the
// image alone.

class SparseConvolution final : public Convolution {
public:
    // Whether it depends on the call which of the two is faster.
    static bool pays(const ConvShape& s) {
        return WinogradConvolution::takes(s) && std::int64_t{s.in_channels} * s.out_channels * places > far_weights &&
               is_plain(s, 1) && !is_plain(s, s.in_channels);
    }

    SparseConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), winograd_(shape, weight, bias) {
        if (OuterConvolution::pays(shape)) plain_ = std::make_unique<OuterConvolution>(shape, weight, bias);
        else plain_ = std::make_unique<PackedConvolution>(shape, weight, bias);
    }

    std::size_t scratch() const override { return std::max(winograd_.scratch(), plain_->scratch()); }
    int tasks(const ConvCall& call, int threads) const override { return chosen(call).tasks(call, threads); }
    std::int64_t macs(const ConvCall& call) const override { return chosen(call).macs(call); }
    const char* kernel(const ConvCall& call) const override { return chosen(call).kernel(call); }
    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        chosen(call).run(call, task, tasks, scratch);
    }

private:
    static constexpr double far_weight = 24.0 / lanes;  // what one of them costs, in products of vectors: measured

    // Whether plain products take less time when so many inputs are active, as products for an output channel.
    static bool is_plain(const ConvShape& s, int active) {
        const auto vectors = [](int values) { return (values + lanes - 1) / lanes; };
        const auto cost = [&](int weights, int products) {
            return weights * std::max<double>(double(active) * products, s.in_channels * far_weight);
        };
        const int tiles = (s.out_height + 1) / 2 * ((s.out_width + 1) / 2);
        return cost(s.taps(), vectors(s.out_height * s.out_width)) < cost(places, vectors(tiles));
    }

    const Convolution& chosen(const ConvCall& call) const {
        if (is_plain(shape_, call.active_in.count)) return *plain_;
        return winograd_;
    }

    ConvShape shape_;
    WinogradConvolution winograd_;
    std::unique_ptr<Convolution> plain_;
};
