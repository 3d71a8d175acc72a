// Gated normalisation on a CPU, a row at a time.
//
// Layouts: y, its gradient and results (N, D) in T; z (N, D) with a stride of rows; weight (D,) in fp32. An item of work
// is a slice of rows: the gradient of the weight comes in one piece for each, (slices, D).

#include "../vectors.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

struct Sizes {
    int64_t rows, width, groups, slice, z_stride;  // rows of a slice
    float eps;
};

template <typename T> struct Inputs {
    const T *y, *z;
    const float *weight;
};

// A group of a row: x = y silu(z), and what it is to be multiplied by.
template <typename T>
float gated(const T *y, const T *z, int64_t width, float eps, std::vector<Floats> &x) {
    Floats squares = {};
    for (int64_t e = 0, v = 0; e < width; e += W, v++) {
        const int count = std::min<int64_t>(W, width - e);
        const Floats gate = load(z + e, count);
        x[v] = load(y + e, count) * gate * sigmoid(gate);
        squares += x[v] * x[v];
    }
    return 1 / std::sqrt(sum(squares) / width + eps);
}

template <typename T> void forward(const Sizes &sizes, int64_t item, const Inputs<T> &in, T *out) {
    const int64_t width = sizes.width / sizes.groups;
    std::vector<Floats> x((width + W - 1) / W);
    for (int64_t row = item * sizes.slice; row < std::min(sizes.rows, (item + 1) * sizes.slice); row++) {
        for (int64_t start = 0; start < sizes.width; start += width) {
            const T *y = in.y + row * sizes.width + start, *z = in.z + row * sizes.z_stride + start;
            const float scale = gated(y, z, width, sizes.eps, x);
            for (int64_t e = 0, v = 0; e < width; e += W, v++) {
                const int count = std::min<int64_t>(W, width - e);
                store(out + row * sizes.width + start + e, x[v] * scale * load(in.weight + start + e, count), count);
            }
        }
    }
}

template <typename T> struct Gradients {
    T *y, *z;
    float *weight;
};

// Of u = x r and r = 1 / sqrt(mean(x^2) + eps), with p = dout weight: dx = r (p - u mean(p u)).
template <typename T>
void backward(const Sizes &sizes, int64_t item, const Inputs<T> &in, const T *dout, const Gradients<T> &made) {
    const int64_t width = sizes.width / sizes.groups, vectors = (width + W - 1) / W;
    std::vector<Floats> x(vectors), dweight(sizes.groups * vectors);
    for (int64_t row = item * sizes.slice; row < std::min(sizes.rows, (item + 1) * sizes.slice); row++) {
        for (int64_t group = 0; group < sizes.groups; group++) {
            const int64_t start = group * width, at = row * sizes.width + start;
            const T *y = in.y + at, *z = in.z + row * sizes.z_stride + start;
            const float scale = gated(y, z, width, sizes.eps, x);
            Floats pulls = {};
            for (int64_t e = 0, v = 0; e < width; e += W, v++) {
                const int count = std::min<int64_t>(W, width - e);
                x[v] *= scale;
                const Floats d = load(dout + at + e, count);
                dweight[group * vectors + v] += d * x[v];
                pulls += d * load(in.weight + start + e, count) * x[v];
            }
            const float mean = sum(pulls) / width;
            for (int64_t e = 0, v = 0; e < width; e += W, v++) {
                const int count = std::min<int64_t>(W, width - e);
                const Floats p = load(dout + at + e, count) * load(in.weight + start + e, count);
                const Floats dx = (p - x[v] * mean) * scale, gate = load(z + e, count), open = sigmoid(gate);
                store(made.y + at + e, dx * gate * open, count);
                store(made.z + at + e, dx * load(y + e, count) * open * (1 + gate * (1 - open)), count);
            }
        }
    }
    for (int64_t group = 0; group < sizes.groups; group++)
        for (int64_t e = 0, v = 0; e < width; e += W, v++)
            store(made.weight + item * sizes.width + group * width + e, dweight[group * vectors + v],
                  std::min<int64_t>(W, width - e));
}

}  // namespace

#define GATED_RMS_NORM(NAME, T)                                                                                        \
    extern "C" void forward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, T *out) {                      \
        for (int64_t i = from; i < to; i++) forward(sizes, i, in, out);                                                \
    }                                                                                                                  \
    extern "C" void backward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, const T *dout,                \
                                    Gradients<T> made) {                                                               \
        for (int64_t i = from; i < to; i++) backward(sizes, i, in, dout, made);                                        \
    }

GATED_RMS_NORM(float32, float)
GATED_RMS_NORM(bfloat16, bfloat16)
