// State-space duality on a CPU, but for the products: `Passes` of chunked.py. Between the tokens of a chunk, a head's
// matrix of tokens and tokens at a time, which stays in the first cache; between chunks, states.
//
// Layouts: products and their gradients (B K, G, Q, Q), pairs and weights (B K, H, Q, Q) in T; steps and gradients of
// them (B K, H, Q), A and D (H,) in fp32; run (B K, Q). An item of work is a chunk and a group.

#include "../vectors.h"

#include <algorithm>
#include <vector>

namespace {

struct Sizes {
    int64_t groups, heads, length;  // heads of a group
};

struct Inputs {
    const float *steps, *A, *D;
    const int32_t *run;
};

// A head's steps as vectors over tokens j, and what is left of token j's input as token i goes from 0 upwards.
struct Head {
    int64_t length, vectors;
    std::vector<Floats> steps, sums;
    std::vector<Ints> run, place;
    const float *step;
    const int32_t *runs;
    float A;

    explicit Head(const Sizes &sizes)
        : length(sizes.length), vectors((sizes.length + W - 1) / W), steps(vectors), sums(vectors), run(vectors),
          place(vectors) {
        for (int64_t v = 0; v < vectors; v++)
            for (int lane = 0; lane < W; lane++) place[v][lane] = v * W + lane;
    }

    int count(int64_t v) const { return std::min<int64_t>(W, length - v * W); }

    void begin(const Sizes &sizes, const Inputs &in, int64_t chunk, int64_t head) {
        step = in.steps + (chunk * sizes.groups * sizes.heads + head) * length;
        runs = in.run ? in.run + chunk * length : nullptr;
        A = in.A[head];
        for (int64_t v = 0; v < vectors; v++) {
            steps[v] = load(step + v * W, count(v));
            sums[v] = Floats{};
            if (runs) memcpy(&run[v], runs + v * W, count(v) * sizeof(int32_t));
        }
    }

    // Of tokens j of vector v, for token i; after tokens 0 to i - 1. 0 where token i does not see token j.
    Floats left(int64_t i, int64_t v) {
        sums[v] += place[v] < int32_t(i) ? all(step[i] * A) : Floats{};
        Ints seen = place[v] <= int32_t(i);
        if (runs) seen &= run[v] == runs[i];
        return seen ? exp2(sums[v] * LOG2_E) : Floats{};
    }
};

template <typename T>
void weights(const Sizes &sizes, int64_t item, const Inputs &in, const T *products, T *weights) {
    const int64_t chunk = item / sizes.groups, group = item % sizes.groups, length = sizes.length;
    Head head(sizes);
    for (int64_t j = 0; j < sizes.heads; j++) {
        const int64_t h = group * sizes.heads + j;
        head.begin(sizes, in, chunk, h);
        for (int64_t i = 0; i < length; i++) {
            const T *product = products + (item * length + i) * length;
            T *to = weights + ((chunk * sizes.groups * sizes.heads + h) * length + i) * length;
            for (int64_t v = 0; v < head.vectors; v++) {
                Floats weight = {};
                if (v * W <= i) {
                    const Floats left = head.left(i, v);
                    weight = left != 0 ? left * load(product + v * W, head.count(v)) * head.steps[v] : Floats{};
                    if (in.D) weight += head.place[v] == int32_t(i) ? all(in.D[h]) : Floats{};
                }
                store(to + v * W, weight, head.count(v));
            }
        }
    }
}

template <typename T> struct Outputs {
    T *weights, *products;
    float *steps, *logs, *D;  // D: (B K, H)
};

template <typename T>
void pulled(const Sizes &sizes, int64_t item, const Inputs &in, const T *pairs, const T *products,
            const Outputs<T> &out) {
    const int64_t chunk = item / sizes.groups, group = item % sizes.groups, length = sizes.length;
    Head head(sizes);
    const int64_t vectors = head.vectors;
    std::vector<Floats> left(length * vectors), dproducts(length * vectors), dsteps(vectors), later(vectors);
    for (int64_t j = 0; j < sizes.heads; j++) {
        const int64_t h = group * sizes.heads + j, matrix = chunk * sizes.groups * sizes.heads + h;
        head.begin(sizes, in, chunk, h);
        for (int64_t i = 0; i < length; i++)
            for (int64_t v = 0; v * W <= i; v++) left[i * vectors + v] = head.left(i, v);
        std::fill(dsteps.begin(), dsteps.end(), Floats{});
        std::fill(later.begin(), later.end(), Floats{});
        float dD = 0;
        // A decay stands between all pairs before and behind it: `later` has the sums over tokens i from here on.
        for (int64_t i = length - 1; i >= 0; i--) {
            const T *pair = pairs + (matrix * length + i) * length, *product = products + (item * length + i) * length;
            T *to = out.weights + (matrix * length + i) * length;
            Floats between = {};
            for (int64_t v = 0; v < vectors; v++) {
                Floats weight = {};
                if (v * W <= i) {
                    const int count = head.count(v);
                    const Floats remains = left[i * vectors + v], met = load(pair + v * W, count);
                    const Floats p = load(product + v * W, count), step = head.steps[v];
                    const Floats gradient = remains != 0 ? met * remains : Floats{};
                    weight = remains != 0 ? remains * p * step : Floats{};
                    dproducts[i * vectors + v] += gradient * step;
                    const Floats of_step = remains != 0 ? gradient * p : Floats{};
                    dsteps[v] += of_step;
                    later[v] += of_step * step;
                    between += head.place[v] < int32_t(i) ? later[v] : Floats{};
                    if (in.D) {
                        const Ints self = head.place[v] == int32_t(i);
                        weight += self ? all(in.D[h]) : Floats{};
                        if (i < (v + 1) * W) dD += met[i - v * W];
                    }
                }
                store(to + v * W, weight, head.count(v));
            }
            out.logs[matrix * length + i] = sum(between);
        }
        for (int64_t v = 0; v < vectors; v++) store(out.steps + matrix * length + v * W, dsteps[v], head.count(v));
        if (out.D) out.D[matrix] = dD;
    }
    for (int64_t i = 0; i < length; i++)
        for (int64_t v = 0; v < vectors; v++)
            store(out.products + (item * length + i) * length + v * W, dproducts[i * vectors + v], head.count(v));
}

struct Carry {
    int64_t chunks, heads, states, back;  // states of a head
};

// An item of work is a row and a head. added, met (B, K, H, states) in T; decay (B, K, H), state (B, H, states): the
// one before the first chunk, or behind the last if `back`; it becomes the one at the other end.
template <typename T>
void carried(const Carry &sizes, int64_t item, const T *added, const float *decay, float *state, T *met) {
    const int64_t row = item / sizes.heads, head = item % sizes.heads;
    float *own = state + item * sizes.states;
    for (int64_t k = 0; k < sizes.chunks; k++) {
        const int64_t chunk = sizes.back ? sizes.chunks - 1 - k : k;
        const int64_t at = (row * sizes.chunks + chunk) * sizes.heads + head;
        for (int64_t n = 0; n < sizes.states; n += W) {
            const int count = std::min<int64_t>(W, sizes.states - n);
            const Floats now = load(own + n, count);
            store(met + at * sizes.states + n, now, count);
            store(own + n, now * decay[at] + load(added + at * sizes.states + n, count), count);
        }
    }
}

}  // namespace

#define SSD(NAME, T)                                                                                                   \
    extern "C" void weights_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs in, const T *products, T *to_) {      \
        for (int64_t i = from; i < to; i++) weights(sizes, i, in, products, to_);                                      \
    }                                                                                                                  \
    extern "C" void pulled_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs in, const T *pairs, const T *products, \
                                  Outputs<T> out) {                                                                    \
        for (int64_t i = from; i < to; i++) pulled(sizes, i, in, pairs, products, out);                                \
    }                                                                                                                  \
    extern "C" void carried_##NAME(int64_t from, int64_t to, Carry sizes, const T *added, const float *decay,          \
                                   float *state, T *met) {                                                             \
        for (int64_t i = from; i < to; i++) carried(sizes, i, added, decay, state, met);                               \
    }

SSD(float32, float)
SSD(bfloat16, bfloat16)
