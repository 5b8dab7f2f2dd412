// Pixels of a mask from coarse logits: bilinear interpolation with pinned rounding, and which pixels need none.
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

// Which logits are surely above the threshold, and which surely below, whatever is rounded: `kAbove`, `kBelow`, or 0 for
// those near it, those so large that a sum may overflow, and those that are no number. A pixel between logits of one side
// is on that side: its weights are positive, no term of its sum is rounded more than four times, and the weights sum to 1
// within 2^-24, so that 3e-5 of the threshold is a wide margin.
constexpr u8 kAbove = 1, kBelow = 2;

struct SureSides {
    float above, below;

    SZ_HD explicit SureSides(float threshold) {
        const float margin = 3e-5f * fabsf(threshold) + 2e-30f;
        above = threshold + margin;
        below = threshold - margin;
    }
    SZ_HD u8 of(float logit) const {  // without a branch, so that many are done at a time
        constexpr float kMost = 1e37f;
        return u8(((logit > above) & (logit < kMost)) | (((logit < below) & (logit > -kMost)) << 1));
    }
};

// What a coarse logit counts as when components are labelled: 1 foreground, 0 background, 2 neither (not a number).
SZ_HD inline u8 side_of(float logit, float threshold) { return u8(2 - (logit > threshold) - 2 * (logit <= threshold)); }

// Writes one run length as COCO does, five bits to a character, and returns how many characters it took (up to 13).
// `text` has room for 16.
SZ_HD inline u32 write_run(i64 number, char* text) {
    // A sign and up to 19 bits fit four characters, which are made without asking how many there are.
    if (number >= -(1 << 19) && number < 1 << 19) {
        const u32 bits = u32(i32(number)), magnitude = u32(number < 0 ? ~number : number);
        const u32 length = 1 + (magnitude >= 1u << 4) + (magnitude >= 1u << 9) + (magnitude >= 1u << 14);
        const u32 chunks = (bits & 0x1F) | (bits & 0x3E0) << 3 | (bits & 0x7C00) << 6 | (bits & 0xF8000) << 9;
        const u32 more = 0x00202020u & ((1u << (8 * (length - 1))) - 1);  // each but the last says that more come
        const u32 word = chunks + 0x30303030u + more;
        for (u32 i = 0; i < 4; ++i) text[i] = char(word >> 8 * i);
        return length;
    }
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
