// Vectors of floats as the compiler's own type: the same source serves every instruction set, by the flags it is
// compiled with. Include inside the namespace of an instruction set only after THRIFTY_VECTOR says its width.
#pragma once

#ifndef THRIFTY_VECTOR
#error "define THRIFTY_VECTOR, floats in a vector register, before including vec.h"
#endif

namespace thrifty::THRIFTY_ISA {

inline constexpr int lanes = THRIFTY_VECTOR;
typedef float V __attribute__((vector_size(lanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(lanes * sizeof(float)), aligned(4), may_alias));
typedef int I __attribute__((vector_size(lanes * sizeof(int))));

inline V load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
inline void store(float* p, V v) { *reinterpret_cast<Unaligned*>(p) = v; }
// The first COUNT lanes alone.
template <int COUNT>
void store_first(float* p, V v) {
    __builtin_memcpy(p, &v, COUNT * sizeof(float));
}
inline V broadcast(float x) { return x - V{}; }  // minus: x + 0 is not x where x is -0
// Where either is NaN, the second is returned.
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }

#if defined(__clang__) || __GNUC__ >= 12
#define THRIFTY_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define THRIFTY_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

// Of 2 * lanes neighbours, those at even and at odd places; neighbours from both again; all but the first, and `last`;
// the upper half as the lower one.
#if THRIFTY_VECTOR == 16
#define THRIFTY_EVERY_SECOND(from)                                                                               \
    from, from + 2, from + 4, from + 6, from + 8, from + 10, from + 12, from + 14, from + 16, from + 18, from + 20, \
        from + 22, from + 24, from + 26, from + 28, from + 30
#define THRIFTY_PAIRS(from)                                                                                          \
    from, from + 16, from + 1, from + 17, from + 2, from + 18, from + 3, from + 19, from + 4, from + 20, from + 5, \
        from + 21, from + 6, from + 22, from + 7, from + 23
inline V evens(V a, V b) { return THRIFTY_SHUFFLE(a, b, THRIFTY_EVERY_SECOND(0)); }
inline V odds(V a, V b) { return THRIFTY_SHUFFLE(a, b, THRIFTY_EVERY_SECOND(1)); }
inline V zip_low(V a, V b) { return THRIFTY_SHUFFLE(a, b, THRIFTY_PAIRS(0)); }
inline V zip_high(V a, V b) { return THRIFTY_SHUFFLE(a, b, THRIFTY_PAIRS(8)); }
inline V shifted(V a, float last) {
    return THRIFTY_SHUFFLE(a, broadcast(last), 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
}
inline V upper(V v) { return THRIFTY_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15); }
#elif THRIFTY_VECTOR == 8
inline V evens(V a, V b) { return THRIFTY_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }
inline V odds(V a, V b) { return THRIFTY_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
inline V zip_low(V a, V b) { return THRIFTY_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline V zip_high(V a, V b) { return THRIFTY_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline V shifted(V a, float last) { return THRIFTY_SHUFFLE(a, broadcast(last), 1, 2, 3, 4, 5, 6, 7, 8); }
inline V upper(V v) { return THRIFTY_SHUFFLE(v, v, 4, 5, 6, 7, 4, 5, 6, 7); }
#elif THRIFTY_VECTOR == 4
inline V evens(V a, V b) { return THRIFTY_SHUFFLE(a, b, 0, 2, 4, 6); }
inline V odds(V a, V b) { return THRIFTY_SHUFFLE(a, b, 1, 3, 5, 7); }
inline V zip_low(V a, V b) { return THRIFTY_SHUFFLE(a, b, 0, 4, 1, 5); }
inline V zip_high(V a, V b) { return THRIFTY_SHUFFLE(a, b, 2, 6, 3, 7); }
inline V shifted(V a, float last) { return THRIFTY_SHUFFLE(a, broadcast(last), 1, 2, 3, 4); }
inline V upper(V v) { return THRIFTY_SHUFFLE(v, v, 2, 3, 2, 3); }
#else
#error "no shuffles for this width"
#endif

// Writes the first `count` lanes, 0 < count <= lanes.
inline void store_part(float* p, V v, int count) {
    if (count == lanes) {
        store(p, v);
        return;
    }
#if THRIFTY_VECTOR == 16
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

}  // namespace thrifty::THRIFTY_ISA
