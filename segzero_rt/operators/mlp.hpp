// x + fc2(act(fc1(norm(x)))), 32 rows at a time: nothing between x and the result leaves the core's cache.
#pragma once

#include "amx.hpp"

namespace segzero {

// x * (1 + erf(x / sqrt 2)) / 2, to 3e-4: half the erf as an odd polynomial, fitted by least largest error within 4.
inline __m512 gelu(__m512 x) {
    constexpr float kTerms[] = {-1.58034613e-09f, 1.21685078e-07f,  -4.10025206e-06f, 8.06600333e-05f,
                                -1.04815735e-03f, 9.66472071e-03f, -6.61751602e-02f, 3.98847420e-01f};
    const __m512 near = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-4.0f)), _mm512_set1_ps(4.0f));
    const __m512 square = _mm512_mul_ps(near, near);
    __m512 sum = _mm512_set1_ps(kTerms[0]);
    for (size_t term = 1; term < sizeof kTerms / sizeof *kTerms; ++term)
        sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(kTerms[term]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(sum, near, _mm512_set1_ps(0.5f)));
}

// x / (1 + e^-x).
inline __m512 silu(__m512 x) {
    const __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-kLog2E)));
    return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0f))));
}

// The norm of a row's `width` numbers, a multiple of 16: by mean and variance, or without `shift` by the mean square.
struct Norm {
    size_t width = 0;
    float epsilon = 0;
    std::vector<float> scale, shift;

    void row(const float* x, Bfloat16* to) const {
        row(x, [to](size_t column, __m512 normed) { store_rounded(to + column, normed); });
    }

    // Calls `take(column, 16 numbers of the norm)` for each 16 columns.
    template <typename Take>
    void row(const float* x, Take take) const {
        const __m512 mean = shift.empty() ? _mm512_setzero_ps() : _mm512_set1_ps(sum(x) / static_cast<float>(width));
        __m512 squares = _mm512_setzero_ps();
        for (size_t column = 0; column < width; column += kSide) {
            const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(x + column), mean);
            squares = _mm512_fmadd_ps(away, away, squares);
        }
        const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
        const __m512 by = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + epsilon));
        for (size_t column = 0; column < width; column += kSide) {
            const __m512 away = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + column), mean), by);
            const __m512 added = shift.empty() ? _mm512_setzero_ps() : _mm512_loadu_ps(&shift[column]);
            take(column, _mm512_fmadd_ps(away, _mm512_loadu_ps(&scale[column]), added));
        }
    }

private:
    float sum(const float* x) const {
        __m512 total = _mm512_setzero_ps();
        for (size_t column = 0; column < width; column += kSide) total = _mm512_add_ps(total, _mm512_loadu_ps(x + column));
        return _mm512_reduce_add_ps(total);
    }
};

// One linear layer, its weight packed.
struct Linear {
    size_t depth = 0, columns = 0;
    Aligned<Bfloat16> weight;
    std::vector<float> scale, bias;

    size_t depths() const { return up(depth, kDepth); }

    // 16 of the layer's outputs from 16 sums.
    __m512 finished(const float* sums, size_t column) const {
        return _mm512_fmadd_ps(_mm512_load_ps(sums), _mm512_loadu_ps(&scale[column]), _mm512_loadu_ps(&bias[column]));
    }
};

// Hidden layers: gelu of the first, or silu of its even tiles times its odd ones.
struct Mlp {
    bool gated = false;
    Norm norm;
    Linear first, second;

    // Rows from 32 * `block` on, of `rows` in all.
    void run(const float* x, float* y, size_t rows, size_t block) const {
        static thread_local Aligned<Bfloat16> normed_memory, hidden_memory;
        const size_t width = norm.width, stride = first.depths() * kDepth, hidden_stride = second.depths() * kDepth;
        Bfloat16* normed = normed_memory.grow(kRows * stride);
        Bfloat16* hidden = hidden_memory.grow(kRows * hidden_stride);
        const size_t begin = block * kRows, count = rows - begin < kRows ? rows - begin : kRows;
        if (count < kRows || stride != width) std::memset(normed, 0, kRows * stride * sizeof(Bfloat16));
        if (hidden_stride != second.depth) std::memset(hidden, 0, kRows * hidden_stride * sizeof(Bfloat16));
        for (size_t row = 0; row < count; ++row) norm.row(x + (begin + row) * width, normed + row * stride);
        const TileScope tiles;
        if (gated) {
            gate(normed, hidden);
        } else {
            multiply_rows(normed, first.depths(), first.weight.data(), first.columns, [&](size_t column, const float* sums) {
                for (size_t row = 0; row < kRows; ++row)
                    store_rounded(hidden + row * hidden_stride + column, gelu(first.finished(sums + row * kRows, column)));
            });
        }
        multiply_rows(hidden, second.depths(), second.weight.data(), width, [&](size_t column, const float* sums) {
            for (size_t row = 0; row < count; ++row) {
                const size_t place = (begin + row) * width + column;
                const __m512 before = _mm512_loadu_ps(x + place);
                _mm512_storeu_ps(y + place, _mm512_add_ps(before, second.finished(sums + row * kRows, column)));
            }
        });
    }

private:
    void gate(const Bfloat16* normed, Bfloat16* hidden) const {
        const size_t depths = first.depths(), stride = second.depths() * kDepth;
        alignas(64) float sums[kRows * kRows];
        for (size_t column = 0; column < first.columns; column += 2 * kSide) {
            multiply<true>(normed, depths, first.weight.data() + column / kSide * depths * kTile, sums);
            for (size_t row = 0; row < kRows; ++row) {
                const float* from = sums + row * kRows;
                const __m512 opened = silu(first.finished(from, column));
                const __m512 values = first.finished(from + kSide, column + kSide);
                store_rounded(hidden + row * stride + column / 2, _mm512_mul_ps(opened, values));
            }
        }
    }
};

}  // namespace segzero
