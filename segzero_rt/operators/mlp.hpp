// x + fc2(gelu(fc1(norm(x)))), 32 rows at a time: nothing between x and the result leaves the core's cache.
#pragma once

#include "amx.hpp"

namespace segzero {

// x * (1 + erf(x / sqrt 2)) / 2, to 6e-5: erf as an odd polynomial, fitted by least largest error within 4.3.
inline __m512 gelu(__m512 x) {
    constexpr float kReach = 4.3f;
    constexpr float kTerms[] = {1.03168741e-10f, -1.00684067e-08f, 4.33721927e-07f, -1.09821562e-05f, 1.84452528e-04f,
                                -2.20531414e-03f, 1.96012943e-02f, -1.32653778e-01f, 7.97793100e-01f};
    const __m512 near = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-kReach)), _mm512_set1_ps(kReach));
    const __m512 square = _mm512_mul_ps(near, near);
    __m512 sum = _mm512_set1_ps(kTerms[0]);
    for (size_t term = 1; term < sizeof kTerms / sizeof *kTerms; ++term)
        sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(kTerms[term]));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 erf = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(sum, near), _mm512_sub_ps(_mm512_setzero_ps(), one)), one);
    const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(half, erf, half);
}

// Layer norm of a row of `width` numbers, a multiple of 16.
inline void normalise(const float* row, size_t width, float epsilon, const float* scale, const float* shift, Bfloat16* to) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t column = 0; column < width; column += kSide) sum = _mm512_add_ps(sum, _mm512_loadu_ps(row + column));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(width));
    __m512 squares = _mm512_setzero_ps();
    for (size_t column = 0; column < width; column += kSide) {
        const __m512 away = _mm512_sub_ps(_mm512_loadu_ps(row + column), mean);
        squares = _mm512_fmadd_ps(away, away, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 by = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + epsilon));
    for (size_t column = 0; column < width; column += kSide) {
        const __m512 away = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + column), mean), by);
        store_rounded(to + column, _mm512_fmadd_ps(away, _mm512_loadu_ps(scale + column), _mm512_loadu_ps(shift + column)));
    }
}

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

struct Mlp {
    size_t width = 0;
    float epsilon = 0;
    std::vector<float> norm_scale, norm_shift;
    Linear first, second;

    // Rows from 32 * `block` on, of `rows` in all.
    void run(const float* x, float* y, size_t rows, size_t block) const {
        static thread_local Aligned<Bfloat16> normed_memory, hidden_memory;
        Bfloat16* normed = normed_memory.grow(kRows * first.depths() * kDepth);
        Bfloat16* hidden = hidden_memory.grow(kRows * second.depths() * kDepth);
        const size_t begin = block * kRows, count = rows - begin < kRows ? rows - begin : kRows;
        const size_t stride = first.depths() * kDepth, hidden_stride = second.depths() * kDepth;
        std::memset(normed, 0, kRows * stride * sizeof(Bfloat16));
        for (size_t row = 0; row < count; ++row)
            normalise(x + (begin + row) * width, width, epsilon, norm_scale.data(), norm_shift.data(), normed + row * stride);
        if (hidden_stride != first.columns) std::memset(hidden, 0, kRows * hidden_stride * sizeof(Bfloat16));
        const TileScope tiles;
        multiply_rows(normed, first.depths(), first.weight.data(), first.columns, [&](size_t column, const float* sums) {
            for (size_t row = 0; row < kRows; ++row)
                store_rounded(hidden + row * hidden_stride + column, gelu(first.finished(sums + row * kRows, column)));
        });
        multiply_rows(hidden, second.depths(), second.weight.data(), width, [&](size_t column, const float* sums) {
            for (size_t row = 0; row < count; ++row) {
                const size_t place = (begin + row) * width + column;
                const __m512 before = _mm512_loadu_ps(x + place);
                _mm512_storeu_ps(y + place, _mm512_add_ps(before, second.finished(sums + row * kRows, column)));
            }
        });
    }
};

}  // namespace segzero
