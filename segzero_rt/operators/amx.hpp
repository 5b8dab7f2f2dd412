// Products of bfloat16 in AMX tiles, summed in float32, and what goes with them in AVX-512.
//
// A tile has 16 rows of 64 bytes. Of a product's left factor it holds 16 rows of 32 numbers; of the right factor, packed
// ahead, 32 rows of 16 columns, two rows interleaved; of the sum 16 rows of 16. Two by two sums use each load twice.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace segzero {

using Bfloat16 = uint16_t;

constexpr size_t kSide = 16;     // rows and columns of a tile of sums
constexpr size_t kDepth = 32;    // numbers of a product that one tile instruction sums up
constexpr size_t kRows = 32;     // rows that are worked on at a time: two tiles
constexpr size_t kTile = 512;    // numbers in a packed tile

constexpr size_t up(size_t count, size_t to) { return (count + to - 1) / to; }

// Memory that begins where a cache line does.
template <typename T>
class Aligned {
public:
    Aligned() = default;
    explicit Aligned(size_t count) { grow(count); }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    ~Aligned() { ::operator delete[](data_, std::align_val_t(64)); }

    // At least so many numbers, zeros where they are new; what was there before is lost.
    T* grow(size_t count) {
        if (count > count_) {
            ::operator delete[](data_, std::align_val_t(64));
            data_ = nullptr;
            data_ = static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64)));
            std::memset(data_, 0, count * sizeof(T));
            count_ = count;
        }
        return data_;
    }
    const T* data() const { return data_; }

private:
    T* data_ = nullptr;
    size_t count_ = 0;
};

inline Bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<Bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_rounded(Bfloat16* to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// The tiles of this thread while it lives: 0 to 3 sums, 4 and 5 left factors, 6 and 7 right ones.
class TileScope {
public:
    TileScope() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = kSide;
        }
        _tile_loadconfig(config);
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
    ~TileScope() { _tile_release(); }
};

// Tiles 0 to 3 are the sums of 32 rows and 32 columns, 0 and 2 those of 16.
template <bool kPair>
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(2);
    if (kPair) {
        _tile_zero(1);
        _tile_zero(3);
    }
}

template <bool kPair>
inline void store_sums(float* sums, size_t wide) {
    _tile_stored(0, sums, wide * sizeof(float));
    _tile_stored(2, sums + kSide * wide, wide * sizeof(float));
    if (kPair) {
        _tile_stored(1, sums + kSide, wide * sizeof(float));
        _tile_stored(3, sums + kSide * wide + kSide, wide * sizeof(float));
    }
}

// Sums of 32 rows and 16 or 32 columns, to rows that are `wide` numbers apart.
//   left: [32, depths * 32]; right: packed tiles, those of a column one behind the other.
template <bool kPair>
inline void multiply(const Bfloat16* left, size_t depths, const Bfloat16* right, float* sums, size_t wide = kRows) {
    const size_t stride = depths * kDepth * sizeof(Bfloat16);
    const Bfloat16* lower = left + kSide * depths * kDepth;
    const Bfloat16* second = right + depths * kTile;
    zero_sums<kPair>();
    for (size_t depth = 0; depth < depths; ++depth) {
        _tile_loadd(4, left + depth * kDepth, stride);
        _tile_loadd(6, right + depth * kTile, 64);
        _tile_loadd(5, lower + depth * kDepth, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (kPair) {
            _tile_loadd(7, second + depth * kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    store_sums<kPair>(sums, wide);
}

// All columns of 32 rows: `take(column, sums)` gets [32, .] sums of 16 columns, 32 apart, for each 16 columns.
template <typename Take>
inline void multiply_rows(const Bfloat16* left, size_t depths, const Bfloat16* right, size_t columns, Take take) {
    alignas(64) float sums[kRows * kRows];
    for (size_t column = 0; column < columns; column += 2 * kSide) {
        const Bfloat16* tiles = right + column / kSide * depths * kTile;
        if (column + kSide < columns) {
            multiply<true>(left, depths, tiles, sums);
            take(column, sums);
            take(column + kSide, sums + kSide);
        } else {
            multiply<false>(left, depths, tiles, sums);
            take(column, sums);
        }
    }
}

// Where a number of a weight [depth, columns] stands among packed tiles, of which every `every`-th is one of them.
constexpr size_t packed_place(size_t row, size_t column, size_t depths, size_t every = 1) {
    const size_t tile = column / kSide * every * depths + row / kDepth;
    return tile * kTile + row % kDepth / 2 * 2 * kSide + column % kSide * 2 + row % 2;
}

// Columns of a weight [depth, columns] to packed tiles, of which every `every`-th is one of them; whole numbers of 8 bits
// are exact in bfloat16.
template <typename T>
inline void pack_weight(const T* weight, size_t depth, size_t columns, Bfloat16* to, size_t every = 1) {
    const size_t depths = up(depth, kDepth);
    for (size_t row = 0; row < depth; ++row)
        for (size_t column = 0; column < columns; ++column)
            to[packed_place(row, column, depths, every)] = rounded(static_cast<float>(weight[row * columns + column]));
}

// 2^x to 8e-5 of it: a cubic for what is behind the point.
inline __m512 power_of_two(__m512 x) {
    constexpr int kBehindPoint = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    const __m512 rest = _mm512_reduce_ps(x, kBehindPoint);
    __m512 sum = _mm512_set1_ps(7.80214238e-2f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.26071758e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.95831851e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.99925318e-1f));
    return _mm512_scalef_ps(sum, x);  // which takes what is before the point
}

constexpr float kLog2E = 1.44269504f;

}  // namespace segzero
