// Activation functions on one value, written so that a loop over them becomes vector code. Include inside the
// namespace of an instruction set. Errors against the exact functions are below 1e-6, relative where they are large.

inline float as_float(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline std::uint32_t as_bits(float value) { return __builtin_bit_cast(std::uint32_t, value); }

// e^x as 2^n * e^r with |r| <= ln(2) / 2. NaN stays NaN; beyond +-87 it stays at the end of the range.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504089f + 12582912.0f;  // 1.5 * 2^23: the low bits are now n, rounded to nearest
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;  // Cephes, expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * as_float((as_bits(shifted) + 127u) << 23);
}

inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float clamped(float x, float low, float high) {
    x = x < low ? low : x;
    return x > high ? high : x;
}

// Rational minimax approximations over the range where the function is not yet +-1 (as in Eigen).
inline float hyperbolic_tangent(float x) {
    x = clamped(x, -7.90531110763549805f, 7.90531110763549805f);
    const float s = x * x;
    float p = -2.76076847742355e-16f;
    p = p * s + 2.00018790482477e-13f;
    p = p * s + -8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    float q = 1.19825839466702e-06f;
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    return x * p / q;
}

inline float error_function(float x) {
    x = clamped(x, -4.0f, 4.0f);
    const float s = x * x;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    return x * p / q;
}

template <Activation A>
inline float activated(float x, float slope) {
    if constexpr (A == Activation::relu) return x < 0 ? 0 : x;  // NaN stays
    else if constexpr (A == Activation::relu6) return clamped(x, 0, 6);
    else if constexpr (A == Activation::leaky_relu) return x < 0 ? x * slope : x;
    else if constexpr (A == Activation::silu) return x * logistic(x);
    else if constexpr (A == Activation::gelu) return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
    else if constexpr (A == Activation::gelu_tanh)
        return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456080286536f * (x + 0.044715f * (x * x * x))));
    else if constexpr (A == Activation::hardswish) return x * (clamped(x + 3.0f, 0, 6) * (1.0f / 6.0f));
    else if constexpr (A == Activation::sigmoid) return logistic(x);
    else if constexpr (A == Activation::hardsigmoid) return clamped(x + 3.0f, 0, 6) * (1.0f / 6.0f);
    else if constexpr (A == Activation::tanh) return hyperbolic_tangent(x);
    else return x;
}

template <Activation A>
struct Activated {
    static constexpr Activation activation = A;
};

// Calls `use` with Activated<activation>, so that the choice is made outside of the loops.
template <class Use>
inline void with_activation(Activation activation, Use use) {
    switch (activation) {
        case Activation::none: return use(Activated<Activation::none>{});
        case Activation::relu: return use(Activated<Activation::relu>{});
        case Activation::relu6: return use(Activated<Activation::relu6>{});
        case Activation::leaky_relu: return use(Activated<Activation::leaky_relu>{});
        case Activation::silu: return use(Activated<Activation::silu>{});
        case Activation::gelu: return use(Activated<Activation::gelu>{});
        case Activation::gelu_tanh: return use(Activated<Activation::gelu_tanh>{});
        case Activation::hardswish: return use(Activated<Activation::hardswish>{});
        case Activation::sigmoid: return use(Activated<Activation::sigmoid>{});
        case Activation::hardsigmoid: return use(Activated<Activation::hardsigmoid>{});
        case Activation::tanh: return use(Activated<Activation::tanh>{});
    }
}
