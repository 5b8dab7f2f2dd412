// A fuzzing target for parse_prompts, for three drivers:
//   clang++ -fsanitize=fuzzer,address,undefined -std=c++17 -ffp-contract=off -DLIBFUZZER -x c++ parse_prompts_fuzz.cpp
//   afl-clang-fast++ or g++ (with -fsanitize=address,undefined): a program that reads records from standard input,
// each 32 bits of length and so many bytes, and prints one line per record for a comparison with the reference. Its
// argument is a file with the two formats' rules, as the Python side writes them.
//
// The first bytes of a record choose mode, format, sizes and `finished`; the rest is the reply. It is copied to memory of
// exactly its size, so that a read beyond either end is seen, and parsed with a short tape and then with longer ones.
#include "../segzero_rt/kernels/answer_parser.cuh"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace segzero;

namespace {

// Of VisionReasoner and Seg-Zero, as the Python side fills them in; without those, near enough for libFuzzer.
std::vector<Rules> given_rules;

Rules rules_of(bool seg_zero) {
    if (!given_rules.empty()) return given_rules[seg_zero ? 1 : 0];
    Rules rules = {};
    rules.multiple = !seg_zero;
    rules.half_up = !seg_zero;
    rules.own_names = 1;
    const char* box_key = seg_zero ? "bbox" : "bbox_2d";
    const char* point_keys[2] = {seg_zero ? "points_1" : "point_2d", "points_2"};
    rules.box_key_bytes = u32(std::strlen(box_key));
    std::memcpy(rules.box_key, box_key, rules.box_key_bytes);
    rules.num_point_keys = seg_zero ? 2 : 1;
    for (u32 i = 0; i < rules.num_point_keys; ++i) {
        rules.point_key_bytes[i] = u32(std::strlen(point_keys[i]));
        std::memcpy(rules.point_keys[i], point_keys[i], rules.point_key_bytes[i]);
    }
    rules.num_examples = 1;  // one of one object is enough to go through the comparison
    Rules::Example& example = rules.examples[0];
    example.num_objects = 1;
    example.num_points[0] = 2;
    const double box[4] = {10, 100, 200, 210}, points[2][2] = {{30, 110}, {35, 180}};
    std::memcpy(example.boxes[0], box, sizeof(box));
    std::memcpy(example.points[0], points, sizeof(points));
    return rules;
}

constexpr i32 kSides[] = {1, 27, 480, 840, 1080, 1 << 30};

// Fails loudly where a result breaks the contract whatever the reply was.
void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

void check_result(const Parsed& parsed, u32 length, const Sizes& sizes) {
    check(parsed.status != Status::kNoRoom, "a tape of a node per byte is enough");
    check(parsed.thinking.begin <= parsed.thinking.end && parsed.thinking.end <= length, "thinking lies in the reply");
    check((parsed.status == Status::kOk) == (parsed.num_prompts > 0), "ok and prompts go together");
    check(parsed.num_prompts <= kMaxObjects && parsed.num_prompts <= parsed.num_objects, "number of prompts");
    for (u32 k = 0; k < parsed.num_prompts; ++k) {
        const Prompt& prompt = parsed.prompts[k];
        const i32* box = prompt.box_xyxy;
        check(0 <= box[0] && box[0] < box[2] && box[2] <= sizes.source_width, "box lies in the picture's width");
        check(0 <= box[1] && box[1] < box[3] && box[3] <= sizes.source_height, "box lies in the picture's height");
        check(prompt.num_points >= 0 && prompt.num_points <= i32(kMaxPoints), "number of points");
    }
}

Parsed run(const u8* data, size_t size, bool print) {
    u8 choice[6] = {};
    const size_t head = size < sizeof(choice) ? size : sizeof(choice);
    std::memcpy(choice, data, head);
    const u32 length = u32(size - head);
    std::vector<u8> reply(data + head, data + size);
    reply.shrink_to_fit();
    const Mode mode = Mode(choice[0] & 3);
    const Rules rules = rules_of((choice[0] & 4) != 0);
    const bool finished = (choice[0] & 8) != 0;
    const Sizes sizes = {kSides[choice[1] % 6], kSides[choice[2] % 6], kSides[choice[3] % 6], kSides[choice[4] % 6]};
    std::vector<Prompt> prompts(2 * kMaxObjects);
    for (u32 capacity = 1 + choice[5] % 16;; capacity = length + 16) {
        std::vector<Node> nodes(capacity);
        ReplyParser parser(reply.data(), length, finished, mode, rules, sizes, Tape{nodes.data(), capacity, 0},
                           prompts.data(), prompts.data() + kMaxObjects);
        const Parsed parsed = parser.parse();
        if (parsed.status == Status::kNoRoom && capacity < length + 16) continue;
        check_result(parsed, length, sizes);
        if (print) {
            std::printf("%d %u %u %u %u", int(parsed.status), parsed.thinking.begin, parsed.thinking.end,
                        parsed.num_objects, parsed.num_prompts);
            for (u32 k = 0; k < parsed.num_prompts; ++k) {
                const Prompt& prompt = parsed.prompts[k];
                for (i32 side : prompt.box_xyxy) std::printf(" %d", side);
                for (i32 i = 0; i < prompt.num_points; ++i) {
                    std::printf(" %d %d", prompt.points_xy[i][0], prompt.points_xy[i][1]);
                }
            }
            std::printf("\n");
        }
        return parsed;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const u8* data, size_t size) {
    run(data, size, false);
    return 0;
}

#ifndef LIBFUZZER
int main(int count, char** arguments) {
    if (count > 1) {
        std::FILE* file = std::fopen(arguments[1], "rb");
        given_rules.resize(2);
        if (file == nullptr || std::fread(given_rules.data(), sizeof(Rules), 2, file) != 2) return 2;
        std::fclose(file);
    }
    u32 length = 0;
    while (std::fread(&length, sizeof(length), 1, stdin) == 1) {
        std::vector<u8> record(length);
        if (length > 0 && std::fread(record.data(), length, 1, stdin) != 1) return 2;
        run(record.data(), length, true);
    }
    return 0;
}
#endif
