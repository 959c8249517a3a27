// Winograd's products or packed ones, call by call.
//
// A pair of channels has 16 weights for Winograd's products and nine for plain ones. Where a large layer's weights come
// from beyond the second cache, time follows the weights, and those of a computed channel are all read, whichever inputs
// are active: few products per weight, on small maps with few active inputs, make the plain form the faster one. What is
// chosen follows from the decisions of the image alone.

class SparseConvolution final : public Convolution {
public:
    // Whether it depends on the call which of the two is faster.
    static bool pays(const ConvShape& s) {
        return WinogradConvolution::takes(s) && std::int64_t{s.in_channels} * s.out_channels * places > far_weights &&
               packs(s, 1) && !packs(s, s.in_channels);
    }

    SparseConvolution(const ConvShape& shape, const float* weight, const float* bias)
        : shape_(shape), winograd_(shape, weight, bias), packed_(shape, weight, bias) {}

    std::size_t scratch() const override { return std::max(winograd_.scratch(), packed_.scratch()); }
    int tasks(const ConvCall& call, int threads) const override { return chosen(call).tasks(call, threads); }
    std::int64_t macs(const ConvCall& call) const override { return chosen(call).macs(call); }
    const char* kernel(const ConvCall& call) const override { return chosen(call).kernel(call); }
    void run(const ConvCall& call, int task, int tasks, float* scratch) const override {
        chosen(call).run(call, task, tasks, scratch);
    }

private:
    static constexpr std::int64_t far_weights = 256 << 10;  // floats that the second cache no longer holds
    static constexpr double far_weight = 24.0 / lanes;      // what one of them costs, in products of vectors: measured

    // Whether packed products take less time when so many inputs are active, as products for an output channel.
    static bool packs(const ConvShape& s, int active) {
        const auto vectors = [](int values) { return (values + lanes - 1) / lanes; };
        const auto cost = [&](int weights, int products) {
            return weights * std::max<double>(double(active) * products, s.in_channels * far_weight);
        };
        const int tiles = (s.out_height + 1) / 2 * ((s.out_width + 1) / 2);
        return cost(s.taps(), vectors(s.out_height * s.out_width)) < cost(places, vectors(tiles));
    }

    const Convolution& chosen(const ConvCall& call) const {
        if (packs(shape_, call.active_in.count)) return packed_;
        return winograd_;
    }

    ConvShape shape_;
    WinogradConvolution winograd_;
    PackedConvolution packed_;
};
