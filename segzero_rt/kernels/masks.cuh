// Pixels of a mask from coarse logits: bilinear interpolation with pinned rounding, and which cells need none.
//
// The arithmetic is PyTorch's for contiguous float32 tensors on processors with fused multiply-add (ATen/native/cpu/
// UpSampleKernel.cpp, `HelperInterpLinear`; align_corners=False, no antialiasing), operation by operation: the same
// bits. `fmaf` stands where that is fused; nothing else may be, see portable.cuh.
#pragma once

#include "portable.cuh"

namespace segzero {

// Where an output pixel reads along one axis, and how much of each of its two neighbours.
struct AxisSample {
    i32 near;
    i32 far;
    float near_weight;
    float far_weight;
};

SZ_HD inline AxisSample axis_sample(i32 pixel, i32 coarse, i32 fine) {
    const float scale = float(coarse) / float(fine);
    float place = fmaf(scale, float(pixel) + 0.5f, -0.5f);
    if (place < 0.0f) place = 0.0f;
    AxisSample sample;
    sample.near = i32(place) < coarse - 1 ? i32(place) : coarse - 1;
    sample.far = sample.near < coarse - 1 ? sample.near + 1 : sample.near;
    float weight = place - float(sample.near);
    if (weight < 0.0f) weight = 0.0f;
    if (weight > 1.0f) weight = 1.0f;
    sample.far_weight = weight;
    sample.near_weight = 1.0f - weight;
    return sample;
}

SZ_HD inline float blend(float near, float near_weight, float far, float far_weight) {
    return fmaf(near, near_weight, far * far_weight);
}

SZ_HD inline float upsampled(const float* logits, i32 width, const AxisSample& row, const AxisSample& column) {
    const float* upper = logits + i64(row.near) * width;
    const float* lower = logits + i64(row.far) * width;
    return blend(blend(upper[column.near], column.near_weight, upper[column.far], column.far_weight), row.near_weight,
                 blend(lower[column.near], column.near_weight, lower[column.far], column.far_weight), row.far_weight);
}

constexpr u8 kMixed = 2;

// Of a cell between four logits: 1 or 0 if every pixel in it lies above or below the threshold, whatever is rounded;
// `kMixed` if that has to be computed, which it also has to for infinite logits and those that are no number. Without a
// branch, so that a row of cells is done many at a time.
SZ_HD inline u8 cell_side(float a, float b, float c, float d, float threshold) {
    const float margin = 1e-5f * (fabsf(a) + fabsf(b) + fabsf(c) + fabsf(d) + fabsf(threshold)) + 1e-30f;
    const float above = threshold + margin, below = threshold - margin;
    const int inside = (a > above) & (b > above) & (c > above) & (d > above);
    const int outside = (a < below) & (b < below) & (c < below) & (d < below);
    return u8(kMixed - inside - 2 * outside);
}

// What a coarse logit counts as when components are labelled: 1 foreground, 0 background, 2 neither (not a number).
SZ_HD inline u8 side_of(float logit, float threshold) { return u8(2 - (logit > threshold) - 2 * (logit <= threshold)); }

// Writes one run length as COCO does, five bits to a character, and returns how many characters it took (up to 13).
SZ_HD inline u32 write_run(i64 number, char* text) {
    u32 length = 0;
    bool more = true;
    while (more) {
        char chunk = char(number & 0x1F);
        number >>= 5;
        more = (chunk & 0x10) != 0 ? number != -1 : number != 0;
        if (more) chunk = char(chunk | 0x20);
        text[length++] = char(chunk + 48);
    }
    return length;
}

}  // namespace segzero
