// Pixels of a resized picture, as Pillow makes them: weights in 22 bits of fixed point, columns first, eight bits between
// the two passes (Pillow 12, src/libImaging/Resample.c, `precompute_coeffs`, `normalize_coeffs_8bpc`). Then a pixel's
// place and value in what a model takes.
#pragma once

#include "portable.cuh"

namespace segzero {

constexpr i32 kWeightBits = 22;
constexpr i32 kHalf = 1 << (kWeightBits - 1);
constexpr i32 kYuvBits = 20;

// What one output pixel reads along an axis: `count` neighbours from `begin` on, their weights from `first` on.
struct Taps {
    i32 begin, count;
    i64 first;
};

// Conversion of luma and chroma to colours, in `kYuvBits` of fixed point.
struct YuvRule {
    i32 black, luma, red_of_v, green_of_v, green_of_u, blue_of_u;
};

enum class PixelFormat : i32 { kRgb = 0, kBgr = 1, kNv12 = 2 };

// Where a value goes. With a patch side the output is [patches, 3, patch, patch], the `merge` x `merge` patches of a
// token consecutive; without it [3, height, width].
struct TensorLayout {
    i32 height, width;
    i32 patch, merge;
    const i32* places;  // [patches] where each patch of that order goes; nullptr: where it is
    float scale, mean[3], deviation[3];
};

SZ_HD inline double filter_weight(double x, bool cubic) {
    if (x < 0.0) x = -x;
    if (!cubic) return x < 1.0 ? 1.0 - x : 0.0;
    const double a = -0.5;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

SZ_HD inline i32 fixed_weight(double weight) {
    const double scaled = weight * double(1 << kWeightBits);
    return weight < 0 ? i32(-0.5 + scaled) : i32(0.5 + scaled);
}

// No pixel has more neighbours.
SZ_HD inline i32 most_taps(i32 from, i32 to, bool cubic) {
    const double scale = double(from) / to;
    return i32(2.0 * (cubic ? 2.0 : 1.0) * (scale < 1.0 ? 1.0 : scale)) + 2;
}

// The neighbours of one output pixel along an axis of `from` pixels made `to`; their weights go to `weights`, where there
// is room for `most_taps`. Weights of 0 at either end are left out: they change nothing.
SZ_HD inline Taps axis_taps(i32 pixel, i32 from, i32 to, bool cubic, i64 first, i32* weights) {
    const double scale = double(from) / to, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = (cubic ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch, centre = (pixel + 0.5) * scale;
    i32 begin = i32(centre - support + 0.5), end = i32(centre + support + 0.5);
    if (begin < 0) begin = 0;
    if (end > from) end = from;
    double sum = 0.0;
    for (i32 i = begin; i < end; ++i) sum += filter_weight((i - centre + 0.5) * inverse, cubic);
    i32 count = 0, used = 0, skipped = 0;
    for (i32 i = begin; i < end; ++i) {
        const double weight = filter_weight((i - centre + 0.5) * inverse, cubic);
        const i32 fixed = fixed_weight(sum != 0.0 ? weight / sum : weight);
        if (fixed == 0 && count == 0) {
            ++skipped;
        } else {
            weights[count++] = fixed;
            if (fixed != 0) used = count;
        }
    }
    return {begin + skipped, used, first};
}

SZ_HD inline u8 settled(i32 sum) {
    const i32 level = sum >> kWeightBits;
    return u8(level < 0 ? 0 : level > 255 ? 255 : level);
}

SZ_HD inline u8 yuv_level(i32 sum) {
    const i32 level = sum >> kYuvBits;
    return u8(level < 0 ? 0 : level > 255 ? 255 : level);
}

// Red, green and blue in the three low bytes.
SZ_HD inline u32 yuv_colour(u8 luma, u8 u, u8 v, const YuvRule& rule) {
    const i32 above = i32(luma) - rule.black, du = i32(u) - 128, dv = i32(v) - 128;
    const i32 base = (above > 0 ? above : 0) * rule.luma + (1 << (kYuvBits - 1));
    const u32 red = yuv_level(base + rule.red_of_v * dv);
    const u32 green = yuv_level(base + rule.green_of_v * dv + rule.green_of_u * du);
    const u32 blue = yuv_level(base + rule.blue_of_u * du);
    return red | green << 8 | blue << 16;
}

SZ_HD inline float normalised(u32 level, float scale, float mean, float deviation) {
    return (float(level) * scale - mean) / deviation;
}

// The first of `patch` values in a row of the output: channel, row and the column of a patch, counted in patches.
SZ_HD inline i64 run_place(const TensorLayout& to, i32 channel, i32 y, i32 patch_column) {
    const i32 merge = to.merge, patch_row = y / to.patch, columns = to.width / (to.patch * merge);
    const i32 token = patch_row / merge * columns + patch_column / merge;
    const i32 index = (token * merge + patch_row % merge) * merge + patch_column % merge;
    const i64 place = to.places == nullptr ? index : to.places[index];
    return ((place * 3 + channel) * to.patch + y % to.patch) * to.patch;
}

}  // namespace segzero
