// The selective scan on a CPU: a row's steps in order, a vector of channels at a time, its states in the first cache.
//
// Layouts: u, delta, z, y and their gradients (B, T, E) in T; A (N, E), D and bias (E,), states (B, N, E) in fp32; B, C
// (B, T, N) in fp32; reset (B, T) bytes or null. The backward pass starts from the states that the forward pass kept
// every STEPS steps, (blocks, B, N, E); of a block it holds all decays and states of a vector of channels.
// An item of work is a row, or one of `parts` shares of its channels: what is summed over channels comes in as many
// pieces, (parts, B, T, N), whatever the number of threads, so that results do not depend on it.

#include "../vectors.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t STEPS = 16;

struct Sizes {
    int64_t rows, length, width, states, parts;

    // Channels of a share, whole vectors.
    int64_t share() const { return ((width + W - 1) / W + parts - 1) / parts * W; }
};

struct Item {
    int64_t row, part, first, last;

    Item(const Sizes &sizes, int64_t i)
        : row(i / sizes.parts), part(i % sizes.parts), first(std::min(sizes.width, part * sizes.share())),
          last(std::min(sizes.width, first + sizes.share())) {}
};

template <typename T> struct Inputs {
    const T *u, *delta, *z;
    const float *A, *B, *C, *D, *bias, *initial;
    const uint8_t *reset;
};

template <typename T>
void forward(const Sizes &sizes, const Item &item, const Inputs<T> &in, T *y, float *final, float *kept) {
    const int64_t length = sizes.length, width = sizes.width, states = sizes.states;
    std::vector<Floats> h(states), A(states);
    for (int64_t e = item.first; e < item.last; e += W) {
        const int count = std::min<int64_t>(W, item.last - e);
        for (int64_t n = 0; n < states; n++) {
            h[n] = in.initial ? load(in.initial + (item.row * states + n) * width + e, count) : Floats{};
            A[n] = load(in.A + n * width + e, count) * LOG2_E;
        }
        const Floats D = in.D ? load(in.D + e, count) : Floats{}, bias = in.bias ? load(in.bias + e, count) : Floats{};
        for (int64_t t = 0; t < length; t++) {
            const int64_t at = item.row * length + t, channel = at * width + e;
            if (kept && t % STEPS == 0) {
                float *to = kept + ((t / STEPS * sizes.rows + item.row) * states) * width + e;
                for (int64_t n = 0; n < states; n++) store(to + n * width, h[n], count);
            }
            if (in.reset && in.reset[at]) std::fill(h.begin(), h.end(), Floats{});
            const Floats step = softplus(load(in.delta + channel, count) + bias);
            const Floats u = load(in.u + channel, count), x = step * u;
            const float *B = in.B + at * states, *C = in.C + at * states;
            Floats out = {};
            for (int64_t n = 0; n < states; n++) {
                h[n] = exp2(step * A[n]) * h[n] + x * B[n];
                out += h[n] * C[n];
            }
            if (in.D) out += D * u;
            if (in.z) {
                const Floats z = load(in.z + channel, count);
                out *= z * sigmoid(z);
            }
            store(y + channel, out, count);
        }
        for (int64_t n = 0; n < states; n++) store(final + (item.row * states + n) * width + e, h[n], count);
    }
}

template <typename T> struct Gradients {
    T *u, *delta, *z;
    float *A, *B, *C, *D, *bias, *initial;  // A, D, bias: (B, ...), of each row
};

template <typename T>
void backward(const Sizes &sizes, const Item &item, const Inputs<T> &in, const float *kept, const T *dy,
              const float *dfinal, const Gradients<T> &out) {
    const int64_t length = sizes.length, width = sizes.width, states = sizes.states;
    const int64_t vectors = (item.last - item.first + W - 1) / W;
    // Of all channels: gradients of the states behind a block, and what A, D and bias have gathered.
    std::vector<Floats> arriving(vectors * states), dA(vectors * states), dD(vectors), dbias(vectors);
    // Of a block: of one vector of channels, but for the two sums over channels, whose lanes are added at its end.
    std::vector<Floats> decay(STEPS * states), h((STEPS + 1) * states), dB(STEPS * states), dC(STEPS * states);
    std::vector<Floats> before(STEPS), step_sizes(STEPS), slopes(STEPS), A(states);
    for (int64_t v = 0; v < vectors && dfinal; v++) {
        const int64_t e = item.first + v * W;
        const int count = std::min<int64_t>(W, item.last - e);
        for (int64_t n = 0; n < states; n++)
            arriving[v * states + n] = load(dfinal + (item.row * states + n) * width + e, count);
    }
    for (int64_t block = (length - 1) / STEPS; length && block >= 0; block--) {
        const int64_t start = block * STEPS, steps = std::min(STEPS, length - start);
        std::fill(dB.begin(), dB.end(), Floats{});
        std::fill(dC.begin(), dC.end(), Floats{});
        for (int64_t v = 0; v < vectors; v++) {
            const int64_t e = item.first + v * W;
            const int count = std::min<int64_t>(W, item.last - e);
            const Floats D = in.D ? load(in.D + e, count) : Floats{};
            const Floats bias = in.bias ? load(in.bias + e, count) : Floats{};
            for (int64_t n = 0; n < states; n++) {
                A[n] = load(in.A + n * width + e, count);
                h[n] = load(kept + ((block * sizes.rows + item.row) * states + n) * width + e, count);
            }
            for (int64_t s = 0; s < steps; s++) {
                const int64_t at = item.row * length + start + s, channel = at * width + e;
                const Floats raw = load(in.delta + channel, count) + bias, step = softplus(raw);
                const Floats u = load(in.u + channel, count), x = step * u, scaled = step * LOG2_E;
                step_sizes[s] = step;
                slopes[s] = sigmoid(raw);
                const float *B = in.B + at * states, *C = in.C + at * states;
                Floats *a = &decay[s * states], *old = &h[s * states], *now = old + states;
                Floats y = {};
                const bool begins = in.reset && in.reset[at];
                for (int64_t n = 0; n < states; n++) {
                    a[n] = exp2(scaled * A[n]);
                    now[n] = begins ? x * B[n] : a[n] * old[n] + x * B[n];
                    y += now[n] * C[n];
                }
                before[s] = y + D * u;
            }
            Floats *g = &arriving[v * states], *rates = &dA[v * states];
            for (int64_t s = steps - 1; s >= 0; s--) {
                const int64_t at = item.row * length + start + s, channel = at * width + e;
                const Floats step = step_sizes[s], u = load(in.u + channel, count), x = step * u;
                const float *B = in.B + at * states, *C = in.C + at * states;
                Floats d = load(dy + channel, count);
                if (in.z) {
                    const Floats z = load(in.z + channel, count), open = sigmoid(z);
                    store(out.z + channel, d * before[s] * open * (1 + z * (1 - open)), count);
                    d *= z * open;
                }
                const Floats *a = &decay[s * states], *old = &h[s * states], *now = old + states;
                Floats *into = &dB[s * states], *from = &dC[s * states];
                Floats dx = {}, dstep = {};
                const bool begins = in.reset && in.reset[at];
                for (int64_t n = 0; n < states; n++) {
                    const Floats total = g[n] + d * C[n];
                    from[n] += now[n] * d;
                    into[n] += total * x;
                    dx += total * B[n];
                    if (begins) {
                        g[n] = Floats{};
                    } else {
                        g[n] = total * a[n];
                        const Floats grown = g[n] * old[n];
                        rates[n] += grown * step;
                        dstep += grown * A[n];
                    }
                }
                dstep = (dstep + dx * u) * slopes[s];
                dbias[v] += dstep;
                store(out.delta + channel, dstep, count);
                store(out.u + channel, dx * step + d * D, count);
                dD[v] += d * u;
            }
        }
        for (int64_t s = 0; s < steps; s++) {
            const int64_t at = ((item.part * sizes.rows + item.row) * length + start + s) * states;
            for (int64_t n = 0; n < states; n++) {
                out.B[at + n] = sum(dB[s * states + n]);
                out.C[at + n] = sum(dC[s * states + n]);
            }
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t e = item.first + v * W;
        const int count = std::min<int64_t>(W, item.last - e);
        for (int64_t n = 0; n < states; n++) {
            const int64_t at = (item.row * states + n) * width + e;
            store(out.A + at, dA[v * states + n], count);
            if (out.initial) store(out.initial + at, arriving[v * states + n], count);
        }
        if (out.D) store(out.D + item.row * width + e, dD[v], count);
        if (out.bias) store(out.bias + item.row * width + e, dbias[v], count);
    }
}

}  // namespace

#define SELECTIVE_SCAN(NAME, T)                                                                                        \
    extern "C" void forward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, T *y, float *final,            \
                                   float *kept) {                                                                      \
        for (int64_t i = from; i < to; i++) forward(sizes, Item(sizes, i), in, y, final, kept);                        \
    }                                                                                                                  \
    extern "C" void backward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, const float *kept,            \
                                    const T *dy, const float *dfinal, Gradients<T> out) {                              \
        for (int64_t i = from; i < to; i++) backward(sizes, Item(sizes, i), in, kept, dy, dfinal, out);                \
    }

SELECTIVE_SCAN(float32, float)
SELECTIVE_SCAN(bfloat16, bfloat16)
