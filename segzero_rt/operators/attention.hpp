// Softmax attention of one head, 32 queries at a time.
#pragma once

#include "amx.hpp"

namespace segzero {

// Of a batch; queries [batch, queries, heads * key_width], keys [batch, keys, heads * key_width], values and the result
// as wide as `heads * value_width`.
struct Attention {
    size_t heads = 0, queries = 0, keys = 0, key_width = 0, value_width = 0;
    float scale = 1.0f;

    // One head of one in the batch: `unit` counts heads through the batch.
    void run(const float* query, const float* key, const float* value, float* mixed, size_t unit) const {
        const size_t batch = unit / heads, head = unit % heads;
        const size_t wide = heads * key_width, wide_value = heads * value_width;
        const float* query_rows = query + batch * queries * wide + head * key_width;
        const float* key_rows = key + batch * keys * wide + head * key_width;
        const float* value_rows = value + batch * keys * wide_value + head * value_width;
        float* mixed_rows = mixed + batch * queries * wide_value + head * value_width;

        const size_t depths = up(key_width, kDepth), key_tiles = up(keys, kSide), steps = up(keys, kDepth);
        static thread_local Aligned<Bfloat16> keys_memory, values_memory, query_memory, shares_memory;
        static thread_local Aligned<float> scores_memory;
        Bfloat16* packed_keys = keys_memory.grow(key_tiles * depths * kTile);
        Bfloat16* packed_values = values_memory.grow(value_width / kSide * steps * kTile);
        Bfloat16* rounded_query = query_memory.grow(kRows * depths * kDepth);
        Bfloat16* shares = shares_memory.grow(kRows * steps * kDepth);
        float* scores = scores_memory.grow(kRows * key_tiles * kSide);
        pack_keys(key_rows, wide, depths, packed_keys);
        pack_values(value_rows, wide_value, steps, packed_values);
        if (depths * kDepth != key_width) std::memset(rounded_query, 0, kRows * depths * kDepth * sizeof(Bfloat16));

        const TileScope tiles;
        for (size_t begin = 0; begin < queries; begin += kRows) {
            const size_t count = queries - begin < kRows ? queries - begin : kRows;
            for (size_t row = 0; row < count; ++row)
                for (size_t column = 0; column < key_width; column += kSide)
                    store_rounded(rounded_query + row * depths * kDepth + column,
                                  _mm512_loadu_ps(query_rows + (begin + row) * wide + column));
            for (size_t tile = 0; tile < key_tiles; tile += 2) {
                const auto product = tile + 1 < key_tiles ? multiply<true> : multiply<false>;
                product(rounded_query, depths, packed_keys + tile * depths * kTile, scores + tile * kSide, key_tiles * kSide);
            }
            float totals[kRows];
            for (size_t row = 0; row < count; ++row)
                totals[row] = share(scores + row * key_tiles * kSide, shares + row * steps * kDepth, steps);
            multiply_rows(shares, steps, packed_values, value_width, [&](size_t column, const float* sums) {
                for (size_t row = 0; row < count; ++row)
                    _mm512_storeu_ps(mixed_rows + (begin + row) * wide_value + column,
                                     _mm512_div_ps(_mm512_load_ps(sums + row * kRows), _mm512_set1_ps(totals[row])));
            });
        }
    }

private:
    // Of 16 keys from `first` on, those that there are.
    __mmask16 behind(size_t first) const { return static_cast<__mmask16>((1u << (keys - first)) - 1); }

    // Scores of a row to shares that are not divided by their sum yet, which is returned; zeros behind the last key.
    float share(const float* scores, Bfloat16* shares, size_t steps) const {
        const __m512 nothing = _mm512_set1_ps(-3.4e38f);
        const size_t whole = keys / kSide * kSide;
        __m512 largest = nothing;
        for (size_t first = 0; first < whole; first += kSide)
            largest = _mm512_max_ps(largest, _mm512_load_ps(scores + first));
        if (whole < keys) largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(nothing, behind(whole), scores + whole));
        const __m512 by = _mm512_set1_ps(scale * kLog2E);
        const __m512 top = _mm512_set1_ps(-_mm512_reduce_max_ps(largest) * scale * kLog2E);
        __m512 sum = _mm512_setzero_ps();
        for (size_t first = 0; first < whole; first += kSide) {
            const __m512 one = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + first), by, top));
            sum = _mm512_add_ps(sum, one);
            store_rounded(shares + first, one);
        }
        if (whole < keys) {
            const __m512 last = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + whole), by, top));
            const __m512 one = _mm512_maskz_mov_ps(behind(whole), last);
            sum = _mm512_add_ps(sum, one);
            store_rounded(shares + whole, one);
        }
        const size_t filled = up(keys, kSide) * kSide;
        if (filled < steps * kDepth) std::memset(shares + filled, 0, kSide * sizeof(Bfloat16));
        return _mm512_reduce_add_ps(sum);
    }

    // Keys become columns: two numbers of a key stand together as they do in its row, so rows are turned in pairs.
    void pack_keys(const float* rows, size_t wide, size_t depths, Bfloat16* to) const {
        if (depths * kDepth != key_width || keys % kSide)
            std::memset(to, 0, up(keys, kSide) * depths * kTile * sizeof(Bfloat16));
        for (size_t key = 0; key < keys; ++key)
            for (size_t column = 0; column < key_width; column += kSide) {
                alignas(32) Bfloat16 row[kSide];
                store_rounded(row, _mm512_loadu_ps(rows + key * wide + column));
                Bfloat16* tile = to + (key / kSide * depths + column / kDepth) * kTile;
                Bfloat16* place = tile + column % kDepth / 2 * 2 * kSide + key % kSide * 2;
                for (size_t pair = 0; pair < kSide / 2; ++pair)
                    std::memcpy(place + pair * 2 * kSide, row + 2 * pair, 2 * sizeof *row);
            }
    }

    // Two values' rows interleaved.
    void pack_values(const float* rows, size_t wide, size_t steps, Bfloat16* to) const {
        for (size_t column = 0; column < value_width; column += kSide)
            for (size_t pair = 0; pair < steps * kSide; ++pair) {
                const __m512i even = widened(rows, wide, 2 * pair, column), odd = widened(rows, wide, 2 * pair + 1, column);
                const size_t tile = column / kSide * steps + pair / kSide;
                _mm512_store_si512(to + tile * kTile + pair % kSide * 2 * kSide,
                                   _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
    }

    __m512i widened(const float* rows, size_t wide, size_t row, size_t column) const {
        if (row >= keys) return _mm512_setzero_si512();
        const __m512 values = _mm512_loadu_ps(rows + row * wide + column);
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
    }
};

}  // namespace segzero
