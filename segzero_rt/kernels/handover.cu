// handover: prompts to a mask decoder's points, and the best of its masks. The contracts and their reference stand in
// handover.py. All of it is small: what counts is that the host is not asked.
#include "answer_objects.cuh"

namespace segzero {

#ifdef __CUDACC__

// What is said of a reply, as parse_prompts.cu writes it (`REPLY` of parse_prompts_device.py).
struct ReplyHead {
    i32 status;
    Span thinking;
    u32 num_objects, num_prompts;
};

struct Placing {
    i32 rows, num_points;
    i32 source_height, source_width;
    double scale_x, scale_y;
};

// One thread for each row: corners, `num_points` points, the filler; `points_xy` [rows, 3 + num_points, 2].
extern "C" __global__ void place_prompts_kernel(const ReplyHead* reply, const Prompt* prompts, Placing placing,
                                                float* points_xy) {
    const i32 row = i32(blockIdx.x * blockDim.x + threadIdx.x);
    if (row >= placing.rows) return;
    const bool named = u32(row) < reply->num_prompts;
    const i32 whole[4] = {0, 0, placing.source_width, placing.source_height};
    const i32* box = named ? prompts[row].box_xyxy : whole;
    i32 given = named ? prompts[row].num_points : 0;
    if (given > placing.num_points) given = placing.num_points;
    const double scale[2] = {placing.scale_x, placing.scale_y};
    float* out = points_xy + i64(row) * (placing.num_points + 3) * 2;
    for (i32 axis = 0; axis < 2; ++axis) {
        out[axis] = float(double(box[axis]) * scale[axis]);
        out[2 + axis] = float(double(box[2 + axis]) * scale[axis]);
        i32 last = i32((i64(box[axis]) + box[2 + axis]) / 2);
        for (i32 k = 0; k < placing.num_points; ++k) {
            if (k < given) last = prompts[row].points_xy[k][axis];
            out[2 * (2 + k) + axis] = float(double(last) * scale[axis]);
        }
        out[2 * (2 + placing.num_points) + axis] = 0.0f;
    }
}

constexpr i32 kMasks = 4;

// One thread for each logit, one blockIdx.y for each object: `logits` [objects, pixels] of `mask_logits` [objects, 4,
// pixels], and the score that goes with them.
extern "C" __global__ void choose_masks_kernel(const float* mask_logits, const float* iou_scores, i64 pixels,
                                               float* logits, float* scores) {
    const i64 object = blockIdx.y, pixel = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const float* own = iou_scores + object * kMasks;
    i32 best = 1;
    for (i32 mask = 2; mask < kMasks; ++mask) {
        // As NumPy's argmax: what is no number counts as the largest.
        if (own[mask] > own[best] || (own[mask] != own[mask] && own[best] == own[best])) best = mask;
    }
    if (pixel == 0) scores[object] = own[best];
    if (pixel < pixels) logits[object * pixels + pixel] = mask_logits[(object * kMasks + best) * pixels + pixel];
}

#endif

}  // namespace segzero
