// Include inside the namespace of an instruction set, after activate.inl. Loops over contiguous rows are left to the
// compiler; only sums spell their lanes out, since their order must not depend on anything but the sizes.

namespace {

using Lanes = float __attribute__((vector_size(32)));
constexpr int lanes = 8;

inline Lanes load(const float* p) {
    Lanes value;
    __builtin_memcpy(&value, p, sizeof value);
    return value;
}

inline void store(float* p, Lanes value) { __builtin_memcpy(p, &value, sizeof value); }

inline float total(Lanes v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// ---- value by value

// Planes without gaps between their rows are one long row.
template <class... P>
inline Extent merged(Extent e, const P&... planes) {
    return ((planes.row == e.width) && ...) ? Extent{1, e.height * e.width} : e;
}

void affine(ConstPlane x, Plane y, Extent extent, float scale, float shift, Activation activation, float slope) {
    const Extent e = merged(extent, x, y);
    with_activation(activation, [&](auto chosen) {
        for (int h = 0; h < e.height; ++h) {
            const float* __restrict from = x.data + h * x.row;
            float* __restrict to = y.data + h * y.row;
            for (int w = 0; w < e.width; ++w) to[w] = activated<chosen.activation>(from[w] * scale + shift, slope);
        }
    });
}

void add(ConstPlane a, ConstPlane b, Plane y, Extent extent, Activation activation, float slope) {
    const Extent e = merged(extent, a, b, y);
    with_activation(activation, [&](auto chosen) {
        for (int h = 0; h < e.height; ++h) {
            const float* __restrict first = a.data + h * a.row;
            const float* __restrict second = b.data + h * b.row;
            float* __restrict to = y.data + h * y.row;
            for (int w = 0; w < e.width; ++w) to[w] = activated<chosen.activation>(first[w] + second[w], slope);
        }
    });
}

void multiply(ConstPlane a, ConstPlane b, Plane y, Extent extent, Activation activation, float slope) {
    const Extent e = merged(extent, a, b, y);
    with_activation(activation, [&](auto chosen) {
        for (int h = 0; h < e.height; ++h) {
            const float* __restrict first = a.data + h * a.row;
            const float* __restrict second = b.data + h * b.row;
            float* __restrict to = y.data + h * y.row;
            for (int w = 0; w < e.width; ++w) to[w] = activated<chosen.activation>(first[w] * second[w], slope);
        }
    });
}

void activate(float* y, std::ptrdiff_t count, Activation activation, float slope) {
    with_activation(activation, [&](auto chosen) {
        for (std::ptrdiff_t i = 0; i < count; ++i) y[i] = activated<chosen.activation>(y[i], slope);
    });
}

void input_bytes(const std::uint8_t* __restrict x, std::ptrdiff_t step, float* __restrict y, int count, float scale,
                 float shift) {
    if (step == 1)
        for (int i = 0; i < count; ++i) y[i] = static_cast<float>(x[i]) * scale + shift;
    else
        for (int i = 0; i < count; ++i) y[i] = static_cast<float>(x[i * step]) * scale + shift;
}

void input_floats(const float* __restrict x, std::ptrdiff_t step, float* __restrict y, int count) {
    for (int i = 0; i < count; ++i) y[i] = x[i * step];
}

// ---- sums

template <bool magnitude>
inline float sum_of(ConstPlane x, Extent extent) {
    using Bits = std::int32_t __attribute__((vector_size(32)));
    const auto part = [](Lanes v) {
        if constexpr (magnitude) return reinterpret_cast<Lanes>(reinterpret_cast<Bits>(v) & 0x7fffffff);
        else return v;
    };
    const auto single = [](float v) { return magnitude ? __builtin_fabsf(v) : v; };
    const Extent e = merged(extent, x);
    Lanes a{}, b{}, c{}, d{};
    float rest = 0;
    for (int h = 0; h < e.height; ++h) {
        const float* row = x.data + h * x.row;
        int w = 0;
        for (; w + 4 * lanes <= e.width; w += 4 * lanes) {
            a += part(load(row + w));
            b += part(load(row + w + lanes));
            c += part(load(row + w + 2 * lanes));
            d += part(load(row + w + 3 * lanes));
        }
        for (; w + lanes <= e.width; w += lanes) a += part(load(row + w));
        for (; w < e.width; ++w) rest += single(row[w]);
    }
    return total((a + b) + (c + d)) + rest;
}

float sum(ConstPlane x, Extent extent) { return sum_of<false>(x, extent); }
float sum_magnitude(ConstPlane x, Extent extent) { return sum_of<true>(x, extent); }

// `count` channels of a row, added in their order.
template <int count>
inline void add_magnitudes(const float* const* rows, float* __restrict y, int width) {
    for (int w = 0; w < width; ++w) {
        float value = y[w];
        for (int k = 0; k < count; ++k) value += __builtin_fabsf(rows[k][w]);
        y[w] = value;
    }
}

void sum_columns(const Map& x, Channels channels, int first, int last, float* y) {
    constexpr int together = 4;
    const bool dense = x.row == x.width;  // rows without gaps are one long row
    const int width = dense ? x.width * (last - first) : x.width;
    for (int h = first; h < (dense ? first + 1 : last); ++h) {
        float* const to = y + static_cast<std::ptrdiff_t>(h) * x.width;
        __builtin_memset(to, 0, static_cast<std::size_t>(width) * sizeof(float));
        for (int c = 0; c < channels.count; c += together) {
            const int count = channels.count - c < together ? channels.count - c : together;
            const float* rows[together];
            for (int k = 0; k < count; ++k) rows[k] = x.channel(channels.index[c + k]) + h * x.row;
            if (count == together) {
                add_magnitudes<together>(rows, to, width);
                continue;
            }
            for (int k = 0; k < count; ++k) add_magnitudes<1>(rows + k, to, width);
        }
    }
}

// ---- ranking

inline int count_from(const int* keys, int count, int least) {
    int found = 0;
    for (int i = 0; i < count; ++i) found += keys[i] >= least;
    return found;
}

void mark_highest(const float* scores, int count, int k, int* keys, std::uint8_t* marks) {
    int high = -1;
    for (int i = 0; i < count; ++i) {
        const float score = scores[i] + 0.0f;  // -0 becomes 0; floats that are not negative rank as their bits do
        int key;
        __builtin_memcpy(&key, &score, sizeof key);
        keys[i] = score == score ? key : -1;
        high = keys[i] > high ? keys[i] : high;
    }
    // The highest key that k or more reach, by halving: cheaper than sorting, for a count of all keys is vectors only.
    int least = -1, reaching = count;
    while (least < high && reaching != k) {
        const int middle = static_cast<int>((static_cast<long long>(least) + high + 1) / 2);
        const int found = count_from(keys, count, middle);
        if (found >= k) least = middle, reaching = found;
        else high = middle - 1;
    }
    if (reaching == k) {
        for (int i = 0; i < count; ++i) marks[i] = keys[i] >= least;
        return;
    }
    int ties = k - count_from(keys, count, least + 1);
    for (int i = 0; i < count; ++i) {
        const bool tie = keys[i] == least && ties > 0;
        ties -= tie;
        marks[i] = keys[i] > least || tie;
    }
}

// ---- pooling

struct Maximum {
    static constexpr float start = -__builtin_inff();
    static float join(float a, float b) { return ((b > a) | (b != b)) ? b : a; }
};

struct Sum {
    static constexpr float start = 0;
    static float join(float a, float b) { return a + b; }
};

template <class Join, int stride, bool first>
inline void join_strided(float* __restrict y, const float* __restrict x, int count, int any_stride) {
    const int s = stride ? stride : any_stride;
    for (int i = 0; i < count; ++i) y[i] = first ? x[i * s] : Join::join(y[i], x[i * s]);
}

template <class Join, bool first>
inline void join_along(float* y, const float* x, int count, int stride) {
    switch (stride) {
        case 1: return join_strided<Join, 1, first>(y, x, count, 1);
        case 2: return join_strided<Join, 2, first>(y, x, count, 2);
        case 3: return join_strided<Join, 3, first>(y, x, count, 3);
        default: return join_strided<Join, 0, first>(y, x, count, stride);
    }
}

// One row of output before any division: down the columns into `t` with its padding, then along the row.
template <class Join>
inline void pool_row(ConstPlane x, float* __restrict y, const Window& w, int oh, float* __restrict t) {
    const int reach = (w.out.width - 1) * w.stride_width + w.dilation_width * (w.kernel_width - 1) + 1;
    const int columns = reach - w.pad_left < w.in.width ? reach - w.pad_left : w.in.width;
    float* __restrict inner = t + w.pad_left;
    for (int i = 0; i < w.pad_left; ++i) t[i] = Join::start;
    for (int i = w.pad_left + columns; i < reach; ++i) t[i] = Join::start;
    const int top = oh * w.stride_height - w.pad_top;
    bool empty = true;
    for (int k = 0; k < w.kernel_height; ++k) {
        const int ih = top + k * w.dilation_height;
        if (ih < 0 || ih >= w.in.height) continue;
        const float* row = x.data + ih * x.row;
        if (empty) join_along<Join, true>(inner, row, columns, 1);
        else join_along<Join, false>(inner, row, columns, 1);
        empty = false;
    }
    if (empty)
        for (int i = 0; i < columns; ++i) inner[i] = Join::start;
    join_along<Join, true>(y, t, w.out.width, w.stride_width);
    for (int k = 1; k < w.kernel_width; ++k)
        join_along<Join, false>(y, t + k * w.dilation_width, w.out.width, w.stride_width);
}

void max_pool(ConstPlane x, Plane y, const Window& w, float* scratch) {
    const bool subsamples = w.kernel_height == 1 && w.kernel_width == 1 && !w.pad_top && !w.pad_bottom && !w.pad_left &&
                            !w.pad_right;
    if (subsamples) {
        for (int oh = 0; oh < w.out.height; ++oh)
            join_along<Maximum, true>(y.data + oh * y.row, x.data + oh * w.stride_height * x.row, w.out.width, w.stride_width);
        return;
    }
    for (int oh = 0; oh < w.out.height; ++oh) pool_row<Maximum>(x, y.data + oh * y.row, w, oh, scratch);
}

inline int covered(int start, int kernel, int size, int after, bool with_padding) {
    int end = start + kernel < size + after ? start + kernel : size + after;
    if (with_padding) return end - start;
    end = end < size ? end : size;
    return end - (start > 0 ? start : 0);
}

void avg_pool(ConstPlane x, Plane y, const Window& w, float* scratch) {
    const bool constant = w.divisor > 0 || (!w.pad_left && !w.pad_right &&
                          (w.out.width - 1) * w.stride_width + w.kernel_width <= w.in.width);
    for (int oh = 0; oh < w.out.height; ++oh) {
        float* __restrict row = y.data + oh * y.row;
        pool_row<Sum>(x, row, w, oh, scratch);
        const int height = covered(oh * w.stride_height - w.pad_top, w.kernel_height, w.in.height, w.pad_bottom,
                                   w.count_include_pad);
        if (constant) {
            const float divisor = w.divisor ? static_cast<float>(w.divisor) : static_cast<float>(height) * static_cast<float>(w.kernel_width);
            for (int i = 0; i < w.out.width; ++i) row[i] /= divisor;
        } else {
            for (int i = 0; i < w.out.width; ++i) {
                const int width = covered(i * w.stride_width - w.pad_left, w.kernel_width, w.in.width, w.pad_right,
                                          w.count_include_pad);
                row[i] /= static_cast<float>(height) * static_cast<float>(width);
            }
        }
    }
}

inline int window_start(int i, int in, int out) { return static_cast<int>(static_cast<std::int64_t>(i) * in / out); }
inline int window_end(int i, int in, int out) {
    return static_cast<int>((static_cast<std::int64_t>(i + 1) * in + out - 1) / out);
}

template <class Use>
inline void adaptive(ConstPlane x, Plane y, Extent in, Extent out, Use use) {
    for (int oh = 0; oh < out.height; ++oh) {
        const int top = window_start(oh, in.height, out.height), bottom = window_end(oh, in.height, out.height);
        for (int ow = 0; ow < out.width; ++ow) {
            const int left = window_start(ow, in.width, out.width), right = window_end(ow, in.width, out.width);
            y.data[oh * y.row + ow] = use(ConstPlane{x.data + top * x.row + left, x.row}, Extent{bottom - top, right - left});
        }
    }
}

void adaptive_avg_pool(ConstPlane x, Plane y, Extent in, Extent out) {
    adaptive(x, y, in, out, [](ConstPlane window, Extent e) {
        return sum_of<false>(window, e) / (static_cast<float>(e.height) * static_cast<float>(e.width));
    });
}

void adaptive_max_pool(ConstPlane x, Plane y, Extent in, Extent out) {
    adaptive(x, y, in, out, [](ConstPlane window, Extent e) {
        float best = Maximum::start;
        for (int h = 0; h < e.height; ++h)
            for (int w = 0; w < e.width; ++w) best = Maximum::join(best, window.data[h * window.row + w]);
        return best;
    });
}

// ---- layer norm

void layer_norm(const Map& x, const std::uint8_t* active, const Map& y, const float* weight, const float* bias,
                float epsilon, int first, int last) {
    constexpr int chunk = 64;
    const float channels = static_cast<float>(x.channels);
    for (int h = first; h < last; ++h) {
        for (int start = 0; start < x.width; start += chunk) {
            const int n = x.width - start < chunk ? x.width - start : chunk;
            const std::ptrdiff_t from = h * x.row + start;
            alignas(64) float mean[chunk] = {}, variance[chunk] = {};
            int inactive = 0;
            for (int c = 0; c < x.channels; ++c) {
                if (active && !active[c]) { ++inactive; continue; }
                const float* __restrict row = x.data + c * x.plane + from;
                for (int i = 0; i < n; ++i) mean[i] += row[i];
            }
            for (int i = 0; i < n; ++i) mean[i] /= channels;
            for (int i = 0; i < n; ++i) variance[i] = static_cast<float>(inactive) * (mean[i] * mean[i]);
            for (int c = 0; c < x.channels; ++c) {
                if (active && !active[c]) continue;
                const float* __restrict row = x.data + c * x.plane + from;
                for (int i = 0; i < n; ++i) variance[i] += (row[i] - mean[i]) * (row[i] - mean[i]);
            }
            for (int i = 0; i < n; ++i) variance[i] = 1.0f / __builtin_sqrtf(variance[i] / channels + epsilon);
            for (int c = 0; c < x.channels; ++c) {
                const float* __restrict row = x.data + c * x.plane + from;
                float* __restrict to = y.data + c * y.plane + h * y.row + start;
                const float w = weight[c], b = bias[c];
                if (active && !active[c])
                    for (int i = 0; i < n; ++i) to[i] = -mean[i] * variance[i] * w + b;
                else
                    for (int i = 0; i < n; ++i) to[i] = (row[i] - mean[i]) * variance[i] * w + b;
            }
        }
    }
}

// ---- linear

// `rows` outputs together; each adds in the same order as it would alone.
template <int rows>
inline void dot_runs(const float* weight, const float* bias, const float* __restrict x, float* __restrict y,
                     std::ptrdiff_t features, const Run* runs, int count) {
    Lanes even[rows] = {}, odd[rows] = {};
    float rest[rows] = {};
    for (int r = 0; r < count; ++r) {
        int f = runs[r].first;
        const int end = f + runs[r].count;
        for (; f + 2 * lanes <= end; f += 2 * lanes) {
            const Lanes x0 = load(x + f), x1 = load(x + f + lanes);
            for (int k = 0; k < rows; ++k) {
                even[k] += load(weight + k * features + f) * x0;
                odd[k] += load(weight + k * features + f + lanes) * x1;
            }
        }
        if (f + lanes <= end) {
            const Lanes x0 = load(x + f);
            for (int k = 0; k < rows; ++k) even[k] += load(weight + k * features + f) * x0;
            f += lanes;
        }
        for (; f < end; ++f)
            for (int k = 0; k < rows; ++k) rest[k] += weight[k * features + f] * x[f];
    }
    for (int k = 0; k < rows; ++k) y[k] = bias[k] + (total(even[k] + odd[k]) + rest[k]);
}

void linear_runs(const float* weight, const float* bias, const float* x, float* y, int features, const Run* runs,
                 int count, int first, int last) {
    int o = first;
    for (; o + linear_block <= last; o += linear_block)
        dot_runs<linear_block>(weight + o * static_cast<std::ptrdiff_t>(features), bias + o, x, y + o, features, runs, count);
    for (; o < last; ++o) dot_runs<1>(weight + o * static_cast<std::ptrdiff_t>(features), bias + o, x, y + o, features, runs, count);
}

void linear_rows(const float* weight, const float* bias, const float* x, float* y, int features, int first, int last) {
    const Run all{0, features};
    linear_runs(weight, bias, x, y, features, &all, 1, first, last);
}

void linear_panels(const float* panels, const float* bias, const float* x, const int* index, int count, float* y,
                   int features, int first, int last) {
    constexpr int vectors = linear_panel / lanes;
    for (int o = first; o < last; o += linear_panel) {
        const float* panel = panels + static_cast<std::ptrdiff_t>(o) * features;
        Lanes sums[vectors] = {};
        for (int i = 0; i < count; ++i) {
            const float* column = panel + static_cast<std::ptrdiff_t>(index[i]) * linear_panel;
            for (int v = 0; v < vectors; ++v) sums[v] += load(column + v * lanes) * x[i];
        }
        alignas(32) float values[linear_panel];
        for (int v = 0; v < vectors; ++v) store(values + v * lanes, sums[v]);
        for (int k = 0; k < linear_panel && o + k < last; ++k) y[o + k] = bias[o + k] + values[k];
    }
}

}  // namespace

const SimpleKernels& simple_kernels() {
    static constexpr SimpleKernels kernels{
        affine, add, multiply, activate, sum, sum_magnitude, sum_columns, mark_highest, max_pool, avg_pool, adaptive_avg_pool, adaptive_max_pool,
        layer_norm, linear_rows, linear_runs, linear_panels, input_bytes, input_floats,
    };
    return kernels;
}
