// Linear layers in float32 by products of bfloat16, each number as the sum of two.
//
// A number is its bfloat16 and the bfloat16 of what that leaves; a product of two is three products, the fourth being
// too small to matter. A product so made is off by less than 2^-14 of itself (sums are by 4e-6), and tiles make three in
// less time than vectors take for one of float32 (Henry, Tang, Heinecke: Leveraging the bfloat16 Artificial Intelligence
// Datatype For Higher-Precision Computations, ARITH 2019, arXiv:1904.06376).
#pragma once

#include <algorithm>

#include "mlp.hpp"

namespace segzero {

// A float32 weight, or rows of one, in two parts.
struct Split {
    Bfloat16* high;
    Bfloat16* low;

    Split at(size_t offset) const { return {high + offset, low + offset}; }
};

inline void store_split(const Split& to, __m512 values) {
    const __m256i high = (__m256i)_mm512_cvtneps_pbh(values);
    const __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.high), high);
    store_rounded(to.low, _mm512_sub_ps(values, rounded));
}

// As `multiply`, of factors in two parts: low by high, high by high, high by low, so that each tile is loaded once.
template <bool kPair>
inline void multiply_split(const Split& left, size_t depths, const Split& right, float* sums, size_t wide = kRows) {
    const size_t stride = depths * kDepth * sizeof(Bfloat16);
    const Split lower = left.at(kSide * depths * kDepth), second = right.at(depths * kTile);
    zero_sums<kPair>();
    for (size_t depth = 0; depth < depths; ++depth) {
        const size_t row = depth * kDepth, tile = depth * kTile;
        _tile_loadd(4, left.low + row, stride);
        _tile_loadd(6, right.high + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower.low + row, stride);
        _tile_dpbf16ps(2, 5, 6);
        if (kPair) {
            _tile_loadd(7, second.high + tile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(4, left.high + row, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, lower.high + row, stride);
        _tile_dpbf16ps(2, 5, 6);
        if (kPair) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_loadd(6, right.low + tile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (kPair) {
            _tile_loadd(7, second.low + tile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums<kPair>(sums, wide);
}

// x @ weight + bias. A weight passes through the cache once for each block of rows, whose parts stay there meanwhile.
struct SplitLinear {
    static constexpr size_t kBlockRows = 128;  // of 128, 256 and 512 the fastest over SAM 2.1 large's widths

    size_t depth = 0, columns = 0;
    Aligned<Bfloat16> high, low;  // packed tiles, those of 16 columns one behind the other
    std::vector<float> bias;      // none, or one number for each column

    size_t depths() const { return up(depth, kDepth); }

    void pack(const float* weight) {
        Split to{high.grow(columns / kSide * depths() * kTile), low.grow(columns / kSide * depths() * kTile)};
        for (size_t row = 0; row < depth; ++row)
            for (size_t column = 0; column < columns; ++column) {
                const float value = weight[row * columns + column];
                const size_t place = packed_place(row, column, depths());
                to.high[place] = rounded(value);
                to.low[place] = rounded(value - widened(to.high[place]));
            }
    }

    // Where rows are kept in two parts: behind the depth stand zeros.
    struct Rows {
        Aligned<Bfloat16> high, low;

        Split grow(size_t rows, size_t depth) {
            const size_t stride = up(depth, kDepth) * kDepth, count = up(rows, kRows) * kRows * stride;
            const Split to{high.grow(count), low.grow(count)};
            if (rows % kRows != 0 || stride != depth)
                for (Bfloat16* part : {to.high, to.low}) std::memset(part, 0, count * sizeof(Bfloat16));
            return to;
        }
    };

    // Rows from `block * kBlockRows` on, of `rows` in all.
    void run(const float* x, float* y, size_t rows, size_t block) const {
        static thread_local Rows memory;
        const size_t begin = block * kBlockRows, count = std::min(rows - begin, kBlockRows), stride = depths() * kDepth;
        const Split left = memory.grow(count, depth);
        for (size_t row = 0; row < count; ++row)
            for (size_t column = 0; column < depth; column += kSide)
                store_split(left.at(row * stride + column), _mm512_loadu_ps(x + (begin + row) * depth + column));
        products(left, count, [&](size_t row, size_t column, __m512 values) {
            _mm512_storeu_ps(y + (begin + row) * columns + column, values);
        });
    }

    // Calls `take(row, column, 16 numbers of the result)` for each 16 columns of up to `kBlockRows` rows.
    template <typename Take>
    void products(const Split& left, size_t count, Take take) const {
        const TileScope tiles;
        alignas(64) float sums[kRows * kRows];
        for (size_t column = 0; column < columns; column += 2 * kSide) {
            const size_t offset = column / kSide * depths() * kTile;
            const Split right{const_cast<Bfloat16*>(high.data()) + offset, const_cast<Bfloat16*>(low.data()) + offset};
            const bool pair = column + kSide < columns;
            for (size_t row = 0; row < count; row += kRows) {
                const auto product = pair ? multiply_split<true> : multiply_split<false>;
                product(left.at(row * depths() * kDepth), depths(), right, sums, kRows);
                for (size_t part = 0; part < (pair ? 2 * kSide : kSide); part += kSide) {
                    const __m512 added = bias.empty() ? _mm512_setzero_ps() : _mm512_loadu_ps(&bias[column + part]);
                    for (size_t under = 0; under < std::min(count - row, kRows); ++under)
                        take(row + under, column + part,
                             _mm512_add_ps(_mm512_load_ps(sums + under * kRows + part), added));
                }
            }
        }
    }

private:
    static float widened(Bfloat16 value) {
        const uint32_t bits = uint32_t(value) << 16;
        float wide;
        std::memcpy(&wide, &bits, sizeof wide);
        return wide;
    }
};

// e^x for x from -87 to 0, to 2e-7 of it: a power of two, and the series of what is behind its point.
inline __m512 exponential(__m512 x) {
    constexpr float kTerms[] = {1.52527338e-5f, 1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f,
                                5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f};
    const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(kLog2E));
    const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(power, whole);
    __m512 sum = _mm512_set1_ps(kTerms[0]);
    for (size_t term = 1; term < sizeof kTerms / sizeof *kTerms; ++term)
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(kTerms[term]));
    return _mm512_scalef_ps(sum, whole);
}

// x * (1 + erf(x / sqrt 2)) / 2, to 2e-7: the erf by 7.1.26 of Abramowitz and Stegun's handbook.
inline __m512 exact_gelu(__m512 x) {
    constexpr float kTerms[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
    const __m512 one = _mm512_set1_ps(1.0f), z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
    __m512 sum = _mm512_set1_ps(kTerms[0]);
    for (size_t term = 1; term < sizeof kTerms / sizeof *kTerms; ++term)
        sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(kTerms[term]));
    const __m512 square = _mm512_min_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(87.0f));
    // 1 - erf(z), halved: what x times is taken off for a positive x, and left for a negative one.
    const __m512 power = exponential(_mm512_sub_ps(_mm512_setzero_ps(), square));
    const __m512 beyond = _mm512_mul_ps(_mm512_mul_ps(sum, t), _mm512_mul_ps(power, _mm512_set1_ps(0.5f)));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(beyond, static_cast<__mmask16>(~negative), one, beyond));
}

// x + second(gelu(first(norm(x)))).
struct SplitMlp {
    Norm norm;
    SplitLinear first, second;

    void run(const float* x, float* y, size_t rows, size_t block) const {
        static thread_local SplitLinear::Rows normed_memory, hidden_memory;
        constexpr size_t kBlockRows = SplitLinear::kBlockRows;
        const size_t begin = block * kBlockRows, count = std::min(rows - begin, kBlockRows), width = norm.width;
        const Split normed = normed_memory.grow(count, width), hidden = hidden_memory.grow(count, second.depth);
        for (size_t row = 0; row < count; ++row)
            norm.row(x + (begin + row) * width, [&](size_t column, __m512 values) {
                store_split(normed.at(row * first.depths() * kDepth + column), values);
            });
        first.products(normed, count, [&](size_t row, size_t column, __m512 values) {
            store_split(hidden.at(row * second.depths() * kDepth + column), exact_gelu(values));
        });
        second.products(hidden, count, [&](size_t row, size_t column, __m512 values) {
            const size_t place = (begin + row) * width + column;
            _mm512_storeu_ps(y + place, _mm512_add_ps(_mm512_loadu_ps(x + place), values));
        });
    }
};

}  // namespace segzero
