// Under the sanitizers: frames of random sizes and formats, each row alone in memory of exactly its size, resized by the
// host's code and by the device's kernels, which have to give the same bits. Arguments: how many frames, and the seed.
#include "cuda_on_host.hpp"
//
#include "../segzero_rt/kernels/preprocess.cu"
#include "fuzz_check.hpp"

#include <cstdio>
#include <cstdlib>
#include <random>

using namespace segzero;

namespace {

void run_kernels(const FrameJob& job) {
    std::vector<u32> middle(size_t(job.height) * size_t(job.to.width));
    const auto blocks = [](i32 length) { return unsigned(length + 7) / 8; };
    struct {
        std::vector<Taps> taps;
        std::vector<i32> weights;
    } across, down;
    const auto fill = [&](auto& axis, i32 from, i32 to) {
        const i32 room = most_taps(from, to, job.cubic != 0);
        axis.taps.resize(size_t(to));
        axis.weights.resize(size_t(to) * size_t(room));
        launch_in_turn({blocks(to), 1, 1}, {8, 1, 1},
                       [&] { axis_taps_kernel(from, to, job.cubic, room, axis.taps.data(), axis.weights.data()); });
    };
    fill(across, job.width, job.to.width);
    fill(down, job.height, job.to.height);
    launch_in_turn({blocks(job.to.width), blocks(job.height), 1}, {8, 8, 1}, [&] {
        resample_columns_kernel(job, across.taps.data(), across.weights.data(), middle.data());
    });
    launch_in_turn({blocks(job.to.width), blocks(job.to.height), 1}, {8, 8, 1}, [&] {
        resample_rows_kernel(job, down.taps.data(), down.weights.data(), middle.data());
    });
}

void run(std::mt19937& random) {
    const auto side = [&] { return 1 + i32(random() % (random() % 4 ? 40 : 200)); };
    FrameJob job = {};
    job.height = side();
    job.width = side();
    job.format = PixelFormat(random() % 3);
    job.cubic = random() % 2;
    job.yuv = {16, 1220542, 1673527, -852492, -409993, 2116026};
    job.to.patch = random() % 2 ? 0 : 1 + i32(random() % 20);
    job.to.merge = 1 + i32(random() % 2);
    const i32 step = job.to.patch ? job.to.patch * job.to.merge : 1;
    job.to.height = step * (1 + i32(random() % 3)) + (job.to.patch ? 0 : i32(random() % 30));
    job.to.width = step * (1 + i32(random() % 3)) + (job.to.patch ? 0 : i32(random() % 30));
    job.to.scale = 1 / 255.0f;
    for (i32 i = 0; i < 3; ++i) {
        job.to.mean[i] = 0.1f * float(random() % 9);
        job.to.deviation[i] = 0.1f * float(1 + random() % 9);
    }
    // The last row ends where memory does; a negative pitch begins with it.
    const bool yuv = job.format == PixelFormat::kNv12, backwards = random() % 3 == 0;
    const i64 row_bytes = job.width * (yuv ? 1 : 3), pitch = row_bytes + i64(random() % 9);
    std::vector<u8> pixels(size_t(pitch * (job.height - 1) + row_bytes));
    const i64 chroma_bytes = (job.width + 1) / 2 * 2, chroma_rows = (job.height + 1) / 2;
    std::vector<u8> chroma(size_t(chroma_bytes * chroma_rows));
    for (u8& byte : pixels) byte = u8(random());
    for (u8& byte : chroma) byte = u8(random());
    job.first = pixels.data() + (backwards ? pitch * (job.height - 1) : 0);
    job.first_pitch = backwards ? -pitch : pitch;
    job.second = chroma.data();
    job.second_pitch = chroma_bytes;
    const size_t size = 3 * size_t(job.to.height) * size_t(job.to.width);
    std::vector<i32> places(job.to.patch ? size / size_t(3 * job.to.patch * job.to.patch) : 0);
    for (size_t i = 0; i < places.size(); ++i) places[i] = i32(i);
    std::shuffle(places.begin(), places.end(), random);
    job.to.places = random() % 2 ? places.data() : nullptr;
    std::vector<float> host(size, -77.0f), device(size, -78.0f);
    job.out = host.data();
    check(segzero_preprocess(&job) == 0, "outcome");
    job.out = device.data();
    run_kernels(job);
    check(std::memcmp(host.data(), device.data(), size * sizeof(float)) == 0, "the builds agree");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    std::mt19937 random(u32(std::atoi(arguments[2])));
    for (int jobs = std::atoi(arguments[1]); jobs > 0; --jobs) run(random);
    return 0;
}
