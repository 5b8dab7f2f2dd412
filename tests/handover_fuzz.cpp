// Under the sanitizers: the kernels between parser, mask decoder and masks, on arrays of exactly their size; what they
// write is held to the contract in handover.py. Arguments: how many jobs, and the seed.
#include "cuda_on_host.hpp"
//
#include "../segzero_rt/kernels/handover.cu"
#include "fuzz_check.hpp"

#include <random>

using namespace segzero;

namespace {

constexpr unsigned kThreads = 256;

Dim3 grid_of(i64 threads, unsigned rows) { return {unsigned((threads + kThreads - 1) / kThreads), rows, 1}; }

i32 random_side(std::mt19937& random) { return 1 + i32(random() % (random() % 3 ? 2000 : 1 << 30)); }

void place(std::mt19937& random) {
    const i32 rows = i32(random() % 9);
    Placing placing = {rows, i32(random() % (kMaxPoints + 1)), random_side(random), random_side(random), 0, 0};
    placing.scale_x = double(1 + random() % 1024) / placing.source_width;
    placing.scale_y = double(1 + random() % 1024) / placing.source_height;
    const ReplyHead reply = {0, {0, 0}, u32(random() % 12), u32(random() % 12)};  // more than there are rows, too
    std::vector<Prompt> prompts(size_t(rows), Prompt{});
    for (Prompt& prompt : prompts) {
        for (i32& side : prompt.box_xyxy) side = random_side(random);
        prompt.num_points = i32(random() % (kMaxPoints + 1));
        for (i32 k = 0; k < prompt.num_points; ++k) {
            for (i32& side : prompt.points_xy[k]) side = random_side(random);
        }
    }
    const size_t places = size_t(placing.num_points) + 3;
    std::vector<float> points(size_t(rows) * places * 2, NAN);
    launch_in_turn(grid_of(rows, 1), {kThreads, 1, 1},
                   [&] { place_prompts_kernel(&reply, prompts.data(), placing, points.data()); });
    for (i32 row = 0; row < rows; ++row) {
        const float* out = points.data() + size_t(row) * places * 2;
        for (size_t i = 0; i < 2 * places; ++i) check(out[i] - out[i] == 0.0f, "every place is written");
        const bool named = u32(row) < reply.num_prompts;
        const i32 right = named ? prompts[size_t(row)].box_xyxy[2] : placing.source_width;
        check(out[2] == float(right * placing.scale_x), "the box, or the whole picture");
        check(out[2 * places - 2] == 0.0f && out[2 * places - 1] == 0.0f, "the filler");
    }
}

float random_score(std::mt19937& random) {
    const float values[] = {NAN, HUGE_VALF, -HUGE_VALF, 0.0f, 0.25f, 0.5f, -1.0f};
    return values[random() % 7];
}

// Of masks 1 to 3 the best scored, what is no number before all others, of equals the first.
size_t best_of(const float* scores) {
    for (size_t mask = 1; mask < kMasks; ++mask) {
        if (scores[mask] != scores[mask]) return mask;
    }
    return size_t(std::max_element(scores + 1, scores + kMasks) - scores);
}

void choose(std::mt19937& random) {
    const size_t objects = random() % 4, pixels = 1 + random() % 700;
    std::vector<float> masks(objects * kMasks * pixels), scores(objects * kMasks);
    for (float& logit : masks) logit = float(random() % 1000);
    for (float& score : scores) score = random_score(random);
    std::vector<float> logits(objects * pixels, -7.0f), chosen(objects, -7.0f);
    launch_in_turn(grid_of(i64(pixels), unsigned(objects)), {kThreads, 1, 1}, [&] {
        choose_masks_kernel(masks.data(), scores.data(), i64(pixels), logits.data(), chosen.data());
    });
    for (size_t object = 0; object < objects; ++object) {
        const size_t best = best_of(scores.data() + object * kMasks);
        const float* expected = masks.data() + (object * kMasks + best) * pixels;
        check(std::equal(expected, expected + pixels, logits.data() + object * pixels), "the best mask");
        check(std::memcmp(&chosen[object], &scores[object * kMasks + best], sizeof(float)) == 0, "and its score");
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    std::mt19937 random(u32(std::atoi(arguments[2])));
    for (int jobs = std::atoi(arguments[1]); jobs > 0; --jobs) {
        place(random);
        choose(random);
    }
    return 0;
}
