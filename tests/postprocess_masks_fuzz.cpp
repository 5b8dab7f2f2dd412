// Random jobs for postprocess_masks, to be run with -fsanitize=address,undefined: every array has exactly its size.
// Arguments: how many jobs, and the seed. Exits with a message where a result contradicts itself.
#include "../segzero_rt/kernels/postprocess_masks.cu"
#include "fuzz_check.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace segzero;

namespace {

float random_logit(std::mt19937& random) {
    switch (random() % 12) {
        case 0: return 0.0f;
        case 1: return NAN;
        case 2: return random() % 2 ? HUGE_VALF : -HUGE_VALF;
        case 3: return 3e38f;
        case 4: return -1e-45f;
        default: return float(i32(random() % 9) - 4) * 0.5f;
    }
}

void check_mask(const MaskJob& job, i64 index) {
    const u8* mask = job.masks + index * job.height * job.width;
    i64 area = 0;
    const i32* box = job.boxes_xyxy + 4 * index;
    for (i32 y = 0; y < job.height; ++y) {
        for (i32 x = 0; x < job.width; ++x) {
            const u8 pixel = mask[i64(y) * job.width + x];
            check(pixel <= 1, "a mask holds zeros and ones");
            area += pixel;
            if (pixel) check(box[0] <= x && x < box[2] && box[1] <= y && y < box[3], "pixels lie in the box");
        }
    }
    check(area == job.areas[index], "area");
}

void run(std::mt19937& random) {
    MaskJob job = {};
    job.count = random() % 4;
    job.coarse_height = 1 + i32(random() % 20);
    job.coarse_width = 1 + i32(random() % 20);
    job.height = i32(random() % 90);
    job.width = i32(random() % 90);
    job.max_hole_area = random() % 5;
    job.max_sprinkle_area = random() % 5;
    job.clean_after = random() % 2;
    job.threshold = random() % 2 ? 0.0f : 0.5f;
    job.hole_value = job.threshold + 10;
    job.sprinkle_value = job.threshold - 10;
    job.stable_above = job.threshold + 0.05f;
    job.stable_below = job.threshold - 0.05f;
    std::vector<float> logits(size_t(job.count) * size_t(job.coarse_height * job.coarse_width)), stability(job.count);
    for (float& logit : logits) logit = random_logit(random);
    std::vector<u8> masks(size_t(job.count) * size_t(job.height * job.width), 7);
    std::vector<i32> boxes(size_t(4 * job.count));
    std::vector<i64> areas(job.count), ends(job.count);
    std::vector<char> text(random() % 400);
    job.logits = logits.data();
    job.masks = masks.data();
    job.boxes_xyxy = boxes.data();
    job.areas = areas.data();
    job.stability = stability.data();
    job.rle_ends = ends.data();
    job.rle_text = text.data();
    job.rle_capacity = i64(text.size());
    const i32 outcome = segzero_postprocess_masks(&job);
    check(outcome == (job.rle_used > job.rle_capacity ? 1 : 0), "outcome");
    for (i64 i = 0; i < job.count; ++i) {
        check_mask(job, i);
        const i64 characters = ends[size_t(i)] - (i > 0 ? ends[size_t(i) - 1] : 0);
        std::vector<char> alone(static_cast<size_t>(characters));
        const u8* mask = job.masks + i * job.height * job.width;
        check(segzero_encode_rle(mask, job.height, job.width, alone.data(), characters) == characters, "run lengths");
        check(outcome != 0 || std::equal(alone.begin(), alone.end(), text.begin() + (ends[size_t(i)] - characters)),
              "run lengths alone and together");
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    std::mt19937 random(u32(std::atoi(arguments[2])));
    for (int jobs = std::atoi(arguments[1]); jobs > 0; --jobs) run(random);
    return 0;
}
