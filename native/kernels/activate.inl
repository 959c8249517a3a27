// Activations of a vector; NaN stays NaN. Include inside the namespace of an instruction set, after vec.h.

// e^x for every finite x; relative error under 2e-7. Splits x = n ln 2 + r, |r| <= ln 2 / 2, and takes a polynomial in r
// (minimax, degree 6 with the constant term; the coefficients are those of Cephes' expf).
inline V exp(V x) {
    x = min(broadcast(88.0f), max(broadcast(-87.0f), x));
    const V scaled = x * 1.44269504088896341f;
    const V magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const V n = (scaled + magic) - magic;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
    V power;
    __builtin_memcpy(&power, &exponent, sizeof power);
    return p * power;
}

inline V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

inline V tanh(V x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// erf(x), absolute error under 2e-7: an odd rational function on [-4, 4], as Eigen has it.
inline V erf(V x) {
    x = min(broadcast(4.0f), max(broadcast(-4.0f), x));
    const V s = x * x;
    V a = broadcast(-2.72614225801306e-10f);
    a = a * s + 2.77068142495902e-08f;
    a = a * s + -2.10102402082508e-06f;
    a = a * s + -5.69250639462346e-05f;
    a = a * s + -7.34990630326855e-04f;
    a = a * s + -2.95459980854025e-03f;
    a = a * s + -1.60960333262415e-02f;
    V b = broadcast(-1.45660718464996e-05f);
    b = b * s + -2.13374055278905e-04f;
    b = b * s + -1.68282697438203e-03f;
    b = b * s + -7.37332916720468e-03f;
    b = b * s + -1.42647390514189e-02f;
    return x * a / b;
}

// Those that take a power of e; a call, so that every kernel stays small.
__attribute__((noinline)) inline V activate_smooth(V x, Activation activation) {
    switch (activation) {
        case Activation::silu: return x * sigmoid(x);
        case Activation::sigmoid: return sigmoid(x);
        case Activation::tanh: return tanh(x);
        case Activation::gelu: return 0.5f * x * (1.0f + erf(x * 0.70710678118654752f));
        case Activation::gelu_tanh:
            return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
        default: return x;
    }
}

inline V activate(V x, Activation activation, float slope) {
    const V zero = {};
    switch (activation) {
        case Activation::none: return x;
        case Activation::relu: return max(zero, x);
        case Activation::relu6: return min(broadcast(6.0f), max(zero, x));
        case Activation::leaky_relu: return x > zero ? x : x * slope;
        case Activation::hardswish: return x * min(broadcast(6.0f), max(zero, x + 3.0f)) / 6.0f;
        case Activation::hardsigmoid: return min(broadcast(6.0f), max(zero, x + 3.0f)) / 6.0f;
        default: return activate_smooth(x, activation);
    }
}
