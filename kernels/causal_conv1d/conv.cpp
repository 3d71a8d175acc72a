// A short causal convolution on a CPU: a row's tokens in order, a vector of channels at a time, its last inputs in the
// first cache.
//
// Layouts: x (B, T, E) with strides of rows and tokens; y, dy, dx (B, T, E); weight (k, E) and bias in fp32, the last
// tap for the token itself; initial (B, k - 1, E) in fp32; reach (B, T): how many tokens back a tap may look, at most
// k - 1. An item of work is a row: gradients of weight and bias come in one piece for each, (B, k, E) and (B, E).

#include "../vectors.h"

#include <algorithm>
#include <vector>

namespace {

struct Sizes {
    int64_t rows, tokens, width, taps, activation;
};

template <typename T> struct Inputs {
    const T *x;
    int64_t row_stride, token_stride;
    const float *weight, *bias, *initial;
    const int32_t *reach;
};

// Inputs of a vector of channels, those before the first token in front: (k - 1 + T), and the taps.
template <typename T> struct Channels {
    std::vector<Floats> seen, taps;
    Floats shift;

    explicit Channels(const Sizes &sizes) : seen(sizes.taps - 1 + sizes.tokens), taps(sizes.taps), shift{} {}

    void read(const Sizes &sizes, const Inputs<T> &in, int64_t row, int64_t e, int count) {
        const int64_t before = sizes.taps - 1;
        for (int64_t i = 0; i < before; i++)
            seen[i] = in.initial ? load(in.initial + (row * before + i) * sizes.width + e, count) : Floats{};
        for (int64_t t = 0; t < sizes.tokens; t++)
            seen[before + t] = load(in.x + row * in.row_stride + t * in.token_stride + e, count);
        for (int64_t k = 0; k < sizes.taps; k++) taps[k] = load(in.weight + k * sizes.width + e, count);
        shift = in.bias ? load(in.bias + e, count) : Floats{};
    }

    // Before silu; with `back` tokens in reach.
    Floats total(int64_t t, int64_t back) const {
        const int64_t before = taps.size() - 1;
        Floats total = shift;
        for (int64_t k = before - back; k <= before; k++) total += taps[k] * seen[t + k];
        return total;
    }
};

template <typename T> void forward(const Sizes &sizes, int64_t row, const Inputs<T> &in, T *y) {
    Channels<T> channels(sizes);
    for (int64_t e = 0; e < sizes.width; e += W) {
        const int count = std::min<int64_t>(W, sizes.width - e);
        channels.read(sizes, in, row, e, count);
        for (int64_t t = 0; t < sizes.tokens; t++) {
            Floats total = channels.total(t, in.reach[row * sizes.tokens + t]);
            if (sizes.activation) total *= sigmoid(total);
            store(y + (row * sizes.tokens + t) * sizes.width + e, total, count);
        }
    }
}

template <typename T> struct Gradients {
    T *x;
    float *weight, *bias, *initial;
};

template <typename T>
void backward(const Sizes &sizes, int64_t row, const Inputs<T> &in, const T *dy, const Gradients<T> &out) {
    Channels<T> channels(sizes);
    const int64_t before = sizes.taps - 1;
    std::vector<Floats> dseen(before + sizes.tokens), dtaps(sizes.taps);
    for (int64_t e = 0; e < sizes.width; e += W) {
        const int count = std::min<int64_t>(W, sizes.width - e);
        channels.read(sizes, in, row, e, count);
        std::fill(dseen.begin(), dseen.end(), Floats{});
        std::fill(dtaps.begin(), dtaps.end(), Floats{});
        Floats dshift = {};
        for (int64_t t = 0; t < sizes.tokens; t++) {
            const int64_t at = row * sizes.tokens + t, back = in.reach[at];
            Floats d = load(dy + at * sizes.width + e, count);
            if (sizes.activation) {
                const Floats total = channels.total(t, back), open = sigmoid(total);
                d *= open * (1 + total * (1 - open));
            }
            dshift += d;
            for (int64_t k = before - back; k <= before; k++) {
                dtaps[k] += d * channels.seen[t + k];
                dseen[t + k] += d * channels.taps[k];
            }
        }
        for (int64_t t = 0; t < sizes.tokens; t++)
            store(out.x + (row * sizes.tokens + t) * sizes.width + e, dseen[before + t], count);
        for (int64_t i = 0; i < before && out.initial; i++)
            store(out.initial + (row * before + i) * sizes.width + e, dseen[i], count);
        for (int64_t k = 0; k < sizes.taps; k++)
            store(out.weight + (row * sizes.taps + k) * sizes.width + e, dtaps[k], count);
        store(out.bias + row * sizes.width + e, dshift, count);
    }
}

}  // namespace

#define CAUSAL_CONV1D(NAME, T)                                                                                         \
    extern "C" void forward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, T *y) {                        \
        for (int64_t row = from; row < to; row++) forward(sizes, row, in, y);                                          \
    }                                                                                                                  \
    extern "C" void backward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, const T *dy,                  \
                                    Gradients<T> out) {                                                                \
        for (int64_t row = from; row < to; row++) backward(sizes, row, in, dy, out);                                   \
    }

CAUSAL_CONV1D(float32, float)
CAUSAL_CONV1D(bfloat16, bfloat16)
