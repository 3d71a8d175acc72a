// Vectors as wide as this machine's registers, for kernels in C++ (kernels/cpp.py compiles them).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int W = 16;  // floats in a vector
#else
constexpr int W = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));

struct bfloat16 {
    uint16_t bits;
};

static inline Floats all(float x) { return x - Floats{}; }

// The first `count` of W numbers; the others are 0.
static inline Floats load(const float *from, int count) {
    Floats x = {};
    if (count >= W) {
        memcpy(&x, from, sizeof x);
    } else {
        memcpy(&x, from, count * sizeof(float));
    }
    return x;
}

static inline Floats load(const bfloat16 *from, int count) {
    Halves bits = {};
    if (count >= W) {
        memcpy(&bits, from, sizeof bits);
    } else {
        memcpy(&bits, from, count * sizeof(bfloat16));
    }
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

static inline void store(float *to, Floats x, int count) {
    memcpy(to, &x, count >= W ? sizeof x : count * sizeof(float));
}

// To the nearest, ties to even; NaN stays one.
static inline void store(bfloat16 *to, Floats x, int count) {
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, Halves);
    memcpy(to, &halves, count >= W ? sizeof halves : count * sizeof(bfloat16));
}

static inline float sum(Floats x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

// 2^x to 1e-7 of it; 0 for x < -126.5, for denormal numbers are slow, 2^127 for x > 127; NaN for NaN. Of x + SHIFT the
// last bits are the nearest integer, with the bias of an exponent already added: none of them for -127.
static inline Floats exp2(Floats x) {
    const float SHIFT = 12582912 + 127;
    x = x < -127 ? all(-127) : x;
    x = x > 127 ? all(127) : x;
    const Floats shifted = x + SHIFT;
    const Floats r = x - (shifted - SHIFT);
    Floats p = r * 1.32647e-3f + 9.67151e-3f;
    p = p * r + 5.550734e-2f;
    p = p * r + 2.4022242e-1f;
    p = p * r + 6.9314698e-1f;
    p = p * r + 1;
    return p * (Floats)((Ints)shifted << 23);
}

constexpr float LOG2_E = 1.4426950408889634f;

static inline Floats sigmoid(Floats x) { return 1 / (1 + exp2(x * -LOG2_E)); }

// log(1 + exp(x)), of which 2 artanh(a / (2 + a)) = log(1 + a) for a in (0, 1] is to 1e-8 what eight terms give.
static inline Floats softplus(Floats x) {
    const Floats a = exp2((x < 0 ? x : -x) * LOG2_E), s = a / (2 + a), square = s * s;
    Floats series = all(1.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2) series = series * square + 1.0f / odd;
    return (x > 0 ? x : Floats{}) + 2 * s * series;
}
