// preprocess: a frame to what a model takes, resized, normalised and laid out. The contract and its reference stand in
// preprocess.py.
//
// Along a row, four rows are summed at once, each pixel's channels in four bytes, so that one weight serves sixteen
// numbers. The rows that output rows still need stay in a ring, which for usual pictures lies in the processor's first
// cache. On a device the same happens in two kernels, with all resized rows between them.
#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include <new>
#include <vector>

#include "resample.cuh"

namespace segzero {

// Fields as in `FrameJob` of preprocess_host.py.
struct FrameJob {
    const u8* first;   // rows of pixels, or of luma
    const u8* second;  // rows of u and v
    i64 first_pitch, second_pitch;  // bytes from row to row, negative ones too
    i32 height, width;
    PixelFormat format;
    i32 cubic;
    YuvRule yuv;
    TensorLayout to;
    float* out;
};

#ifdef __CUDACC__

SZ_HD inline u32 source_pixel(const FrameJob& job, i32 y, i32 x) {
    const u8* row = job.first + y * job.first_pitch;
    if (job.format == PixelFormat::kNv12) {
        const u8* chroma = job.second + y / 2 * job.second_pitch + x / 2 * 2;
        return yuv_colour(row[x], chroma[0], chroma[1], job.yuv);
    }
    const u8* pixel = row + 3 * i64(x);
    const u32 red = pixel[job.format == PixelFormat::kBgr ? 2 : 0], blue = pixel[job.format == PixelFormat::kBgr ? 0 : 2];
    return red | u32(pixel[1]) << 8 | blue << 16;
}

// One thread per pixel of an axis: its neighbours, with `room` weights for each.
extern "C" __global__ void axis_taps_kernel(i32 from, i32 to, i32 cubic, i32 room, Taps* taps, i32* weights) {
    const i32 pixel = i32(blockIdx.x * blockDim.x + threadIdx.x);
    if (pixel >= to) return;
    const i64 first = i64(pixel) * room;
    taps[pixel] = axis_taps(pixel, from, to, cubic != 0, first, weights + first);
}

// One thread per column of the output and row of the source; `middle` is [height, to.width] with a colour in each.
extern "C" __global__ void resample_columns_kernel(FrameJob job, const Taps* taps, const i32* weights, u32* middle) {
    const i32 x = i32(blockIdx.x * blockDim.x + threadIdx.x), y = i32(blockIdx.y * blockDim.y + threadIdx.y);
    if (x >= job.to.width || y >= job.height) return;
    i32 red = kHalf, green = kHalf, blue = kHalf;
    for (i32 i = 0; i < taps[x].count; ++i) {
        const u32 colour = source_pixel(job, y, taps[x].begin + i);
        const i32 weight = weights[taps[x].first + i];
        red += i32(colour & 255) * weight;
        green += i32(colour >> 8 & 255) * weight;
        blue += i32(colour >> 16) * weight;
    }
    middle[i64(y) * job.to.width + x] = u32(settled(red)) | u32(settled(green)) << 8 | u32(settled(blue)) << 16;
}

// One thread per pixel of the output.
extern "C" __global__ void resample_rows_kernel(FrameJob job, const Taps* taps, const i32* weights, const u32* middle) {
    const i32 x = i32(blockIdx.x * blockDim.x + threadIdx.x), y = i32(blockIdx.y * blockDim.y + threadIdx.y);
    const TensorLayout& to = job.to;
    if (x >= to.width || y >= to.height) return;
    i32 sums[3] = {kHalf, kHalf, kHalf};
    for (i32 i = 0; i < taps[y].count; ++i) {
        const u32 colour = middle[i64(taps[y].begin + i) * to.width + x];
        const i32 weight = weights[taps[y].first + i];
        sums[0] += i32(colour & 255) * weight;
        sums[1] += i32(colour >> 8 & 255) * weight;
        sums[2] += i32(colour >> 16) * weight;
    }
    for (i32 channel = 0; channel < 3; ++channel) {
        const i64 place = to.patch == 0 ? (i64(channel) * to.height + y) * to.width + x
                                        : run_place(to, channel, y, x / to.patch) + x % to.patch;
        job.out[place] = normalised(settled(sums[channel]), to.scale, to.mean[channel], to.deviation[channel]);
    }
}

#endif

namespace {

constexpr i32 kRowsAtOnce = 4, kLanes = 8;
// Vectors of g++ and clang: they become what the processor has, two registers where it has no larger ones.
typedef u32 Four __attribute__((vector_size(16)));
typedef i32 Sums __attribute__((vector_size(32)));
typedef u32 Colours __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

// Sums of four pixels' four bytes. g++ 12 makes widening a vector of bytes a byte at a time, so it is written out.
#if defined(__AVX2__) && !defined(__CUDACC__)
struct PixelSums {
    __m256i low = _mm256_set1_epi32(kHalf), high = low;

    void add(Four pixels, i32 weight) {
        const __m256i each = _mm256_set1_epi32(weight);
        const __m256i first = _mm256_cvtepu8_epi32((__m128i)pixels);
        const __m256i second = _mm256_cvtepu8_epi32(_mm_unpackhi_epi64((__m128i)pixels, (__m128i)pixels));
        low = _mm256_add_epi32(low, _mm256_mullo_epi32(first, each));
        high = _mm256_add_epi32(high, _mm256_mullo_epi32(second, each));
    }
    Four levels() const {  // packing goes by halves of a register: put right by the permutation
        const __m256i words =
            _mm256_packs_epi32(_mm256_srai_epi32(low, kWeightBits), _mm256_srai_epi32(high, kWeightBits));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
        return (Four)_mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    }
};
#else
struct PixelSums {
    i32 sums[16];

    PixelSums() {
        for (i32& sum : sums) sum = kHalf;
    }
    void add(Four pixels, i32 weight) {
        u8 bytes[16];
        std::memcpy(bytes, &pixels, sizeof bytes);
        for (i32 i = 0; i < 16; ++i) sums[i] += i32(bytes[i]) * weight;
    }
    Four levels() const {
        u8 bytes[16];
        for (i32 i = 0; i < 16; ++i) bytes[i] = settled(sums[i]);
        Four pixels;
        std::memcpy(&pixels, bytes, sizeof bytes);
        return pixels;
    }
};
#endif

// Neighbours and weights of one axis.
struct Axis {
    std::vector<Taps> taps;
    std::vector<i32> weights;
    i32 most = 0;  // neighbours of one pixel

    void fill(i32 from, i32 to, bool cubic) {
        taps.clear();
        weights.clear();
        most = 0;
        const size_t room = size_t(most_taps(from, to, cubic));
        for (i32 pixel = 0; pixel < to; ++pixel) {
            const size_t first = weights.size();
            weights.resize(first + room);
            taps.push_back(axis_taps(pixel, from, to, cubic, i64(first), weights.data() + first));
            weights.resize(first + size_t(taps.back().count));
            most = taps.back().count > most ? taps.back().count : most;
        }
    }
};

// Lines with room for a whole vector behind the last pixel, and for reading four bytes of a pixel of three.
class FrameResampler {
  public:
    explicit FrameResampler(const FrameJob& job) : job_(job), stride_((job.to.width + kLanes - 1) / kLanes * kLanes) {
        across_.fill(job.width, job.to.width, job.cubic != 0);
        down_.fill(job.height, job.to.height, job.cubic != 0);
        slots_ = down_.most + kRowsAtOnce;
        ring_.assign(size_t(slots_) * size_t(stride_), 0);
        lines_.resize(size_t(kRowsAtOnce) * line_bytes());
        values_.resize(3 * size_t(stride_));
    }

    void run() {
        i32 next = 0;
        for (i32 y = 0; y < job_.to.height; ++y) {
            const Taps& taps = down_.taps[size_t(y)];
            if (next < taps.begin) next = taps.begin;
            for (; next < taps.begin + taps.count; next += kRowsAtOnce) sum_along_rows(next);
            sum_down(taps);
            write_row(y);
        }
    }

  private:
    const FrameJob& job_;
    const i32 stride_;
    i32 slots_ = 0;
    Axis across_, down_;
    std::vector<u32> ring_;
    std::vector<u8> lines_;
    std::vector<float> values_;

    size_t line_bytes() const { return 4 * size_t(job_.width) + 4; }
    u32* ring_row(i32 row) { return ring_.data() + size_t(row % slots_) * size_t(stride_); }

    // A row whose last pixel can be read as four bytes, or that had to be converted first.
    const u8* readable_row(i32 row, i32 line) {
        const u8* source = job_.first + row * job_.first_pitch;
        u8* copy = lines_.data() + size_t(line) * line_bytes();
        if (job_.format == PixelFormat::kNv12) {
            const u8* chroma = job_.second + row / 2 * job_.second_pitch;
            for (i32 x = 0; x < job_.width; ++x) {
                const u32 colour = yuv_colour(source[x], chroma[x / 2 * 2], chroma[x / 2 * 2 + 1], job_.yuv);
                std::memcpy(copy + 4 * size_t(x), &colour, 4);
            }
            return copy;
        }
        const i64 row_bytes = 3 * i64(job_.width), pitch = job_.first_pitch;
        const bool followed = pitch > 0 ? row + 1 < job_.height : row > 0;
        if (followed && (pitch < 0 ? -pitch : pitch) >= row_bytes) return source;
        std::memcpy(copy, source, size_t(row_bytes));  // the byte behind it may be nobody's
        return copy;
    }

    void sum_along_rows(i32 from) {
        const u8* rows[kRowsAtOnce];
        u32* sums[kRowsAtOnce];
        const i32 last = job_.height - 1;
        for (i32 i = 0; i < kRowsAtOnce; ++i) {
            rows[i] = from + i <= last ? readable_row(from + i, i) : rows[i - 1];
            sums[i] = ring_row(from + i);  // what is beyond the last row is never read
        }
        if (job_.format == PixelFormat::kNv12) {
            sum_rows<4>(rows, sums);
        } else {
            sum_rows<3>(rows, sums);
        }
    }

    template <i32 kPixelBytes>
    void sum_rows(const u8* const (&rows)[kRowsAtOnce], u32* const (&sums)[kRowsAtOnce]) const {
        const i32 width = job_.to.width;
        const i32* all_weights = across_.weights.data();
        for (i32 x = 0; x < width; ++x) {
            const Taps& taps = across_.taps[size_t(x)];
            const i32* weights = all_weights + taps.first;
            const u8* at[kRowsAtOnce];
            for (i32 r = 0; r < kRowsAtOnce; ++r) at[r] = rows[r] + kPixelBytes * i64(taps.begin);
            PixelSums sum;
            for (i32 i = 0; i < taps.count; ++i) {
                const i64 step = kPixelBytes * i64(i);
                const Four pixels = {load(at[0] + step), load(at[1] + step), load(at[2] + step), load(at[3] + step)};
                sum.add(pixels, weights[i]);
            }
            const Four colours = sum.levels();
            for (i32 r = 0; r < kRowsAtOnce; ++r) sums[r][x] = colours[r];
        }
    }

    static u32 load(const u8* pixel) {
        u32 colour;
        std::memcpy(&colour, pixel, sizeof colour);
        return colour;
    }


    // One output row's values, channel by channel.
    void sum_down(const Taps& taps) {
        const i32* weights = down_.weights.data() + taps.first;
        const TensorLayout& to = job_.to;
        const bool swapped = job_.format == PixelFormat::kBgr;
        for (i32 x = 0; x < to.width; x += kLanes) {
            Sums first = Sums{} + kHalf, second = first, third = first;
            for (i32 i = 0; i < taps.count; ++i) {
                Colours colours;
                std::memcpy(&colours, ring_row(taps.begin + i) + x, sizeof colours);
                first += (Sums)(colours & 255u) * weights[i];
                second += (Sums)(colours >> 8 & 255u) * weights[i];
                third += (Sums)(colours >> 16 & 255u) * weights[i];
            }
            store(swapped ? third : first, 0, x);
            store(second, 1, x);
            store(swapped ? first : third, 2, x);
        }
    }

    void store(const Sums& sum, i32 channel, i32 x) {
        const TensorLayout& to = job_.to;
        const Sums level = sum >> kWeightBits, above = level < 0 ? Sums{} : level;
        const Floats levels = __builtin_convertvector(above > 255 ? Sums{} + 255 : above, Floats);
        const Floats values = (levels * to.scale - to.mean[channel]) / to.deviation[channel];
        std::memcpy(values_.data() + size_t(channel) * size_t(stride_) + x, &values, sizeof values);
    }

    void write_row(i32 y) const {
        const TensorLayout& to = job_.to;
        for (i32 channel = 0; channel < 3; ++channel) {
            const float* line = values_.data() + size_t(channel) * size_t(stride_);
            if (to.patch == 0) {
                float* row = job_.out + (i64(channel) * to.height + y) * to.width;
                std::memcpy(row, line, sizeof(float) * size_t(to.width));
            } else if (to.patch == 14) {  // Qwen2.5-VL's: a copy of known length is no call
                write_patches<14>(line, channel, y);
            } else if (to.patch == 16) {  // Qwen3-VL's
                write_patches<16>(line, channel, y);
            } else {
                for (i32 i = 0; i < to.width / to.patch; ++i) {
                    std::memcpy(job_.out + run_place(to, channel, y, i), line + i64(i) * to.patch,
                                sizeof(float) * size_t(to.patch));
                }
            }
        }
    }

    template <i32 kPatch>
    void write_patches(const float* line, i32 channel, i32 y) const {
        for (i32 i = 0; i < job_.to.width / kPatch; ++i) {
            std::memcpy(job_.out + run_place(job_.to, channel, y, i), line + i64(i) * kPatch, sizeof(float) * kPatch);
        }
    }
};

}  // namespace

// 0: done; 2: no memory.
SZ_EXPORT i32 segzero_preprocess(const FrameJob* job) try {
    FrameResampler(*job).run();
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

}  // namespace segzero
