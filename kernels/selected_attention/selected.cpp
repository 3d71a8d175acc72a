// Attention to selected blocks on a CPU: a query's keys are few, so its scores stay in the first cache, and so do the
// rows of keys and values that adjacent queries share.
//
// Layouts: q, o and their gradients (B, T, H, h or w), k, v (B, S, G, h or w) in T; starts (B, T, G, N), positions
// (B, T); totals (B, T, H): logarithms to the base 2 of sums of exponentials, +inf for a query without keys. An item of
// work is a row, a group, and a slice of the queries. Gradients of keys and values come in one piece for each slice,
// (slices, B, S, G, h or w) in fp32.

#include "../vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int HEADS = 4, KEYS = W == 16 ? 4 : 2;  // at a time: as many sums as there are registers for
constexpr float INF = std::numeric_limits<float>::infinity();

struct Sizes {
    int64_t rows, queries, keys, heads, groups, width, wide, block, count, slices, slice;  // heads of a group
    float scale;
};

template <typename T> struct Inputs {
    const T *q, *k, *v;
    const int32_t *starts;
    const int64_t *positions;
};

// Keys or values of a row and a group in fp32: token after token, and number after number. Rows are whole vectors,
// with zeros behind the last number and behind the last token.
struct Packed {
    int64_t tokens, width, row, column;
    std::vector<float> by_token, by_number;

    Packed(int64_t tokens, int64_t width)
        : tokens(tokens), width(width), row((width + W - 1) / W * W), column(tokens + W),
          by_token(tokens * row), by_number(width * column) {}

    template <typename T> void read(const T *from, int64_t stride) {
        for (int64_t s = 0; s < tokens; s++) {
            for (int64_t e = 0; e < width; e += W)
                store(&by_token[s * row + e], load(from + s * stride + e, std::min<int64_t>(W, width - e)), W);
            for (int64_t e = 0; e < width; e++) by_number[e * column + s] = by_token[s * row + e];
        }
    }
};

struct Span {
    int64_t first;
    int seen;  // of W tokens from there on
};

// What a query sees, in vectors; as many as a multiple of KEYS.
struct Seen {
    std::vector<Span> spans;

    void read(const Sizes &sizes, const int32_t *starts, int64_t position) {
        spans.clear();
        for (int64_t n = 0; n < sizes.count; n++) {
            if (starts[n] < 0) continue;
            const int64_t end = std::min({starts[n] + sizes.block, position + 1, sizes.keys});
            for (int64_t s = starts[n]; s < end; s += W) spans.push_back({s, int(std::min<int64_t>(W, end - s))});
        }
        while (spans.size() % KEYS) spans.push_back({0, 0});
    }
};

// products[r][i] = rows[r] . tokens of span i, of R rows that lie `stride` apart.
template <int R>
void against(const Packed &packed, const float *rows, int64_t stride, const std::vector<Span> &spans, Floats *products) {
    for (size_t i = 0; i < spans.size(); i += KEYS) {
        const float *columns[KEYS];
        for (int j = 0; j < KEYS; j++) columns[j] = &packed.by_number[spans[i + j].first];
        Floats sums[R][KEYS] = {};
        for (int64_t e = 0; e < packed.width; e++) {
            for (int j = 0; j < KEYS; j++) {
                const Floats tokens = load(columns[j] + e * packed.column, W);
                for (int r = 0; r < R; r++) sums[r][j] += tokens * rows[r * stride + e];
            }
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < KEYS; j++) products[r * spans.size() + i + j] = sums[r][j];
    }
}

// to[r] = sum over tokens of shares[r] times the token's row.
template <int R> void along(const Packed &packed, const Floats *shares, const std::vector<Span> &spans, float *to) {
    for (int64_t e = 0; e < packed.row; e += 2 * W) {
        const bool both = e + W < packed.row;
        Floats first[R] = {}, second[R] = {};
        for (size_t i = 0; i < spans.size(); i++) {
            const float *rows = &packed.by_token[spans[i].first * packed.row + e];
            const float *share = reinterpret_cast<const float *>(shares + i);
            for (int lane = 0; lane < spans[i].seen; lane++, rows += packed.row) {
                const Floats one = load(rows, W), other = both ? load(rows + W, W) : Floats{};
                for (int r = 0; r < R; r++) {
                    const float times = share[r * spans.size() * W + lane];
                    first[r] += one * times;
                    second[r] += other * times;
                }
            }
        }
        for (int r = 0; r < R; r++) {
            store(to + r * packed.row + e, first[r], W);
            if (both) store(to + r * packed.row + e + W, second[r], W);
        }
    }
}

// The row in `to` of each token grows by the sum over r of shares[r] times rows[r].
template <int R>
void onto(float *to, int64_t row, const Floats *shares, const std::vector<Span> &spans, const float *rows) {
    for (int64_t e = 0; e < row; e += W) {
        Floats here[R];
        for (int r = 0; r < R; r++) here[r] = load(rows + r * row + e, W);
        for (size_t i = 0; i < spans.size(); i++) {
            float *at = to + spans[i].first * row + e;
            const float *share = reinterpret_cast<const float *>(shares + i);
            for (int lane = 0; lane < spans[i].seen; lane++, at += row) {
                Floats sum = load(at, W);
                for (int r = 0; r < R; r++) sum += here[r] * share[r * spans.size() * W + lane];
                store(at, sum, W);
            }
        }
    }
}

// Scores but for the tokens that are not seen: -inf.
void hide(const std::vector<Span> &spans, Floats *scores) {
    for (size_t i = 0; i < spans.size(); i++)
        for (int lane = spans[i].seen; lane < W; lane++) scores[i][lane] = -INF;
}

template <typename T> void read(const T *from, int64_t width, float *to, float times) {
    for (int64_t e = 0; e < width; e += W)
        store(to + e, load(from + e, std::min<int64_t>(W, width - e)) * times, W);
}

template <typename T> void write(T *to, int64_t width, const float *from, float times) {
    for (int64_t e = 0; e < width; e += W) store(to + e, load(from + e, W) * times, std::min<int64_t>(W, width - e));
}

// A row, a group and a slice of queries, with the keys and values that these may see.
struct Place {
    int64_t slice, row, group, from, to, tokens;

    template <typename T> Place(const Sizes &sizes, int64_t item, const Inputs<T> &in) {
        slice = item % sizes.slices;
        group = item / sizes.slices % sizes.groups;
        row = item / sizes.slices / sizes.groups;
        from = std::min(slice * sizes.slice, sizes.queries);
        to = std::min(from + sizes.slice, sizes.queries);
        tokens = 0;
        for (int64_t t = from; t < to; t++) tokens = std::max(tokens, in.positions[row * sizes.queries + t] + 1);
        tokens = std::min(tokens, sizes.keys);
    }
};

template <typename T> struct Slice : Place {
    Packed keys, values;
    Seen seen;

    Slice(const Sizes &sizes, int64_t item, const Inputs<T> &in)
        : Place(sizes, item, in), keys(tokens, sizes.width), values(tokens, sizes.wide) {
        const int64_t first = row * sizes.keys * sizes.groups + group;
        keys.read(in.k + first * sizes.width, sizes.groups * sizes.width);
        values.read(in.v + first * sizes.wide, sizes.groups * sizes.wide);
    }

    // -> the query, of B T.
    int64_t look(const Sizes &sizes, const Inputs<T> &in, int64_t t) {
        const int64_t query = row * sizes.queries + t;
        seen.read(sizes, in.starts + (query * sizes.groups + group) * sizes.count, in.positions[query]);
        return query;
    }
};

template <int R, typename T>
void attend(const Sizes &sizes, const Inputs<T> &in, const Slice<T> &slice, int64_t at, T *o, float *totals,
            std::vector<Floats> &scores, std::vector<float> &asked, std::vector<float> &found) {
    const std::vector<Span> &spans = slice.seen.spans;
    const int64_t asked_row = slice.keys.row, found_row = slice.values.row;
    scores.resize(R * spans.size());
    for (int r = 0; r < R; r++)
        read(in.q + (at + r) * sizes.width, sizes.width, &asked[r * asked_row], sizes.scale * LOG2_E);
    against<R>(slice.keys, asked.data(), asked_row, spans, scores.data());
    float sums[R];
    for (int r = 0; r < R; r++) {
        Floats *own = &scores[r * spans.size()], largest = all(-INF), total = {};
        hide(spans, own);
        for (size_t i = 0; i < spans.size(); i++) largest = own[i] > largest ? own[i] : largest;
        float top = -INF;
        for (int lane = 0; lane < W; lane++) top = std::max(top, largest[lane]);
        const float least = top == -INF ? 0 : top;
        for (size_t i = 0; i < spans.size(); i++) total += own[i] = exp2(own[i] - least);
        sums[r] = sum(total);
        totals[at + r] = spans.empty() ? INF : least + log2f(sums[r]);
    }
    along<R>(slice.values, scores.data(), spans, found.data());
    for (int r = 0; r < R; r++)
        write(o + (at + r) * sizes.wide, sizes.wide, &found[r * found_row], spans.empty() ? 0 : 1 / sums[r]);
}

template <typename T> struct Given {  // to the backward pass
    const T *o, *d_o;
    const float *totals;
};

template <typename T> struct Gradients {
    T *q;
    float *k, *v;
};

struct Buffers {
    std::vector<Floats> shares, reached;
    std::vector<float> asked, grads, found;
};

template <int R, typename T>
void differentiate(const Sizes &sizes, const Inputs<T> &in, const Given<T> &given, const Slice<T> &slice, int64_t at,
                   T *dq, float *dk, float *dv, Buffers &b) {
    const std::vector<Span> &spans = slice.seen.spans;
    const int64_t row = slice.keys.row, wide = slice.values.row;
    b.shares.resize(R * spans.size());
    b.reached.resize(R * spans.size());
    for (int r = 0; r < R; r++) {
        read(in.q + (at + r) * sizes.width, sizes.width, &b.asked[r * row], sizes.scale * LOG2_E);
        read(given.d_o + (at + r) * sizes.wide, sizes.wide, &b.grads[r * wide], 1);
    }
    against<R>(slice.keys, b.asked.data(), row, spans, b.shares.data());
    against<R>(slice.values, b.grads.data(), wide, spans, b.reached.data());
    for (int r = 0; r < R; r++) {
        const T *o = given.o + (at + r) * sizes.wide;
        Floats products = {};
        for (int64_t e = 0; e < sizes.wide; e += W)
            products += load(o + e, std::min<int64_t>(W, sizes.wide - e)) * load(&b.grads[r * wide + e], W);
        const float mean = sum(products), total = given.totals[at + r];
        Floats *shares = &b.shares[r * spans.size()], *reached = &b.reached[r * spans.size()];
        for (size_t i = 0; i < spans.size(); i++) {
            shares[i] = exp2(shares[i] - total);
            reached[i] = shares[i] * (reached[i] - mean);
        }
    }
    along<R>(slice.keys, b.reached.data(), spans, b.found.data());
    for (int r = 0; r < R; r++) write(dq + (at + r) * sizes.width, sizes.width, &b.found[r * row], sizes.scale);
    onto<R>(dk, row, b.reached.data(), spans, b.asked.data());
    onto<R>(dv, wide, b.shares.data(), spans, b.grads.data());
}

// `run<R>(heads)` of all heads of a group, R at a time.
template <typename F> void by_heads(int64_t heads, const F &run) {
    int64_t at = 0;
    for (; at + HEADS <= heads; at += HEADS) run(std::integral_constant<int, HEADS>(), at);
    switch (heads - at) {
    case 3: return run(std::integral_constant<int, 3>(), at);
    case 2: return run(std::integral_constant<int, 2>(), at);
    case 1: return run(std::integral_constant<int, 1>(), at);
    }
}

template <typename T>
void forward(const Sizes &sizes, int64_t item, const Inputs<T> &in, T *o, float *totals) {
    Slice<T> slice(sizes, item, in);
    std::vector<Floats> scores;
    std::vector<float> asked(HEADS * slice.keys.row), found(HEADS * slice.values.row);
    for (int64_t t = slice.from; t < slice.to; t++) {
        const int64_t first = (slice.look(sizes, in, t) * sizes.groups + slice.group) * sizes.heads;
        by_heads(sizes.heads, [&](auto r, int64_t head) {
            attend<decltype(r)::value>(sizes, in, slice, first + head, o, totals, scores, asked, found);
        });
    }
}

template <typename T>
void backward(const Sizes &sizes, int64_t item, const Inputs<T> &in, const Given<T> &given,
              const Gradients<T> &out) {
    Slice<T> slice(sizes, item, in);
    const int64_t row = slice.keys.row, wide = slice.values.row;
    Buffers buffers;
    buffers.asked.resize(HEADS * row), buffers.found.resize(HEADS * row), buffers.grads.resize(HEADS * wide);
    std::vector<float> dk(slice.tokens * row), dv(slice.tokens * wide);
    for (int64_t t = slice.from; t < slice.to; t++) {
        const int64_t first = (slice.look(sizes, in, t) * sizes.groups + slice.group) * sizes.heads;
        by_heads(sizes.heads, [&](auto r, int64_t head) {
            differentiate<decltype(r)::value>(sizes, in, given, slice, first + head, out.q, dk.data(), dv.data(),
                                              buffers);
        });
    }
    const int64_t piece = (slice.slice * sizes.rows + slice.row) * sizes.keys;
    for (int64_t s = 0; s < slice.tokens; s++) {
        const int64_t at = (piece + s) * sizes.groups + slice.group;
        write(out.k + at * sizes.width, sizes.width, &dk[s * row], 1 / LOG2_E);  // queries were multiplied by it
        write(out.v + at * sizes.wide, sizes.wide, &dv[s * wide], 1);
    }
}

}  // namespace

#define SELECTED_ATTENTION(NAME, T)                                                                                    \
    extern "C" void forward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, T *o, float *totals) {         \
        for (int64_t i = from; i < to; i++) forward(sizes, i, in, o, totals);                                          \
    }                                                                                                                  \
    extern "C" void backward_##NAME(int64_t from, int64_t to, Sizes sizes, Inputs<T> in, Given<T> given,               \
                                    Gradients<T> out) {                                                                \
        for (int64_t i = from; i < to; i++) backward(sizes, i, in, given, out);                                        \
    }

SELECTED_ATTENTION(float32, float)
SELECTED_ATTENTION(bfloat16, bfloat16)
