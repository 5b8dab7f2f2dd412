// postprocess_masks: coarse logits to masks in the source picture's size, holes and sprinkles removed, with boxes,
// areas, stability and COCO run lengths. The contract and its reference stand in postprocess_masks.py.
//
// On the host, a band of output rows between two rows of logits shares one template: cells whose four corners lie on
// one side are filled, the others computed. Run lengths come from changes between neighbouring rows, sorted by column.
#include <new>
#include <vector>

#include "components.hpp"
#include "masks.cuh"

namespace segzero {

// Fields as in `_Job` of postprocess_masks_host.py.
struct MaskJob {
    const float* logits;  // [count, coarse_height, coarse_width]
    i64 count;
    i32 coarse_height, coarse_width;
    i32 height, width;
    i64 max_hole_area, max_sprinkle_area;
    i32 clean_after;  // 1: clean the masks in the source's size instead of the logits
    float threshold;
    float hole_value, sprinkle_value;  // what a cleaned logit becomes
    float stable_above, stable_below;  // thresholds of the stability score
    u8* masks;           // [count, height, width]
    i32* boxes_xyxy;     // [count, 4]
    i64* areas;          // [count]
    float* stability;    // [count]
    i64* rle_ends;       // [count] into the text; nullptr: no run lengths
    char* rle_text;
    i64 rle_capacity;
    i64 rle_used;        // beyond the capacity: what would have been needed
};

#ifdef __CUDACC__

// One thread per pixel of one mask per blockIdx.z; the bounds and areas of its mask are gathered with atomics. `boxes`
// begins as (width, height, 0, 0), `areas` as 0.
extern "C" __global__ void upsample_masks_kernel(MaskJob job, unsigned long long* areas) {
    const i32 x = i32(blockIdx.x * blockDim.x + threadIdx.x), y = i32(blockIdx.y * blockDim.y + threadIdx.y);
    if (x >= job.width || y >= job.height) return;
    const i64 index = blockIdx.z;
    const float* logits = job.logits + index * job.coarse_height * job.coarse_width;
    const float value = upsampled(logits, job.coarse_width, axis_sample(y, job.coarse_height, job.height),
                                  axis_sample(x, job.coarse_width, job.width));
    const bool inside = value > job.threshold;
    job.masks[(index * job.height + y) * job.width + x] = inside;
    if (!inside) return;
    atomicAdd(areas + index, 1ull);
    i32* box = job.boxes_xyxy + 4 * index;
    atomicMin(box, x);
    atomicMin(box + 1, y);
    atomicMax(box + 2, x + 1);
    atomicMax(box + 3, y + 1);
}

#endif

namespace {

class MaskMaker {
  public:
    explicit MaskMaker(MaskJob& job) : job_(job) {
        for (i32 x = 0; x < job.width; ++x) columns_.push_back(axis_sample(x, job.coarse_width, job.width));
        cell_begin_.assign(size_t(job.coarse_width) + 1, job.width);
        for (i32 x = job.width; x-- > 0;) cell_begin_[size_t(columns_[size_t(x)].near)] = x;
        for (i32 c = job.coarse_width; c-- > 0;) {  // cells without a pixel begin where the next one does
            if (cell_begin_[size_t(c)] > cell_begin_[size_t(c) + 1]) cell_begin_[size_t(c)] = cell_begin_[size_t(c) + 1];
        }
        upper_.resize(size_t(job.width));
        lower_.resize(size_t(job.width));
        template_.resize(size_t(job.width));
    }

    void make(i64 index) {
        const i64 coarse = i64(job_.coarse_height) * job_.coarse_width;
        const float* logits = job_.logits + index * coarse;
        job_.stability[index] = stability(logits, coarse);
        if (job_.clean_after == 0) logits = cleaned(logits, coarse);
        if (job_.width == 0) return;
        u8* mask = job_.masks + index * job_.height * job_.width;
        for (i32 y = 0; y < job_.height;) y = fill_band(logits, mask, y);
        if (job_.clean_after != 0) clean(mask);
    }

  private:
    MaskJob& job_;
    SmallComponents components_;
    std::vector<AxisSample> columns_;
    std::vector<i32> cell_begin_;  // first output column of each cell
    std::vector<float> upper_, lower_, copy_;
    std::vector<u8> template_, labels_;
    std::vector<Span> mixed_;

    float stability(const float* logits, i64 coarse) const {
        i64 smaller = 0, larger = 0;
        for (i64 i = 0; i < coarse; ++i) {
            smaller += logits[i] > job_.stable_above;
            larger += logits[i] > job_.stable_below;
        }
        return larger > 0 ? float(smaller) / float(larger) : 1.0f;
    }

    const float* cleaned(const float* logits, i64 coarse) {
        if (job_.max_hole_area <= 0 && job_.max_sprinkle_area <= 0) return logits;
        copy_.assign(logits, logits + coarse);
        labels_.resize(size_t(coarse));
        for (i64 i = 0; i < coarse; ++i) labels_[size_t(i)] = side_of(logits[i], job_.threshold);
        const i64 limits[2] = {job_.max_hole_area, job_.max_sprinkle_area};
        components_.visit(labels_.data(), job_.coarse_height, job_.coarse_width, limits,
                          [&](i32 row, i32 begin, i32 end, u8 label) {
                              const float value = label == 0 ? job_.hole_value : job_.sprinkle_value;
                              float* line = copy_.data() + i64(row) * job_.coarse_width;
                              for (i32 x = begin; x < end; ++x) line[x] = value;
                          });
        return copy_.data();
    }

    void clean(u8* mask) {
        const i64 limits[2] = {job_.max_hole_area, job_.max_sprinkle_area};
        components_.visit(mask, job_.height, job_.width, limits, [&](i32 row, i32 begin, i32 end, u8 label) {
            std::memset(mask + i64(row) * job_.width + begin, label == 0 ? 1 : 0, size_t(end - begin));
        });
    }

    // Fills the output rows from `y` that lie between the same two rows of logits; returns the row behind them.
    i32 fill_band(const float* logits, u8* mask, i32 y) {
        AxisSample row = axis_sample(y, job_.coarse_height, job_.height);
        const i32 near = row.near;
        prepare_band(logits + i64(row.near) * job_.coarse_width, logits + i64(row.far) * job_.coarse_width);
        while (true) {
            u8* line = mask + i64(y) * job_.width;
            std::memcpy(line, template_.data(), size_t(job_.width));
            for (const Span& span : mixed_) compute(line, row, span);
            if (++y >= job_.height) return y;
            row = axis_sample(y, job_.coarse_height, job_.height);
            if (row.near != near) return y;
        }
    }

    void compute(u8* line, const AxisSample& row, Span span) const {
        const float* upper = upper_.data();
        const float* lower = lower_.data();
        const float near = row.near_weight, far = row.far_weight, threshold = job_.threshold;
        for (u32 x = span.begin; x < span.end; ++x) line[x] = blend(upper[x], near, lower[x], far) > threshold;
    }

    void prepare_band(const float* upper, const float* lower) {
        mixed_.clear();
        for (i32 cell = 0; cell < job_.coarse_width; ++cell) {
            const i32 begin = cell_begin_[size_t(cell)], end = cell_begin_[size_t(cell) + 1];
            if (begin >= end) continue;
            const i32 next = cell < job_.coarse_width - 1 ? cell + 1 : cell;
            const int side = cell_side(upper[cell], upper[next], lower[cell], lower[next], job_.threshold);
            if (side >= 0) {
                std::memset(template_.data() + begin, side, size_t(end - begin));
            } else if (!mixed_.empty() && mixed_.back().end == u32(begin)) {
                mixed_.back().end = u32(end);
            } else {
                mixed_.push_back({u32(begin), u32(end)});
            }
        }
        for (const Span& span : mixed_) {
            for (u32 x = span.begin; x < span.end; ++x) {
                const AxisSample& at = columns_[x];
                upper_[x] = blend(upper[at.near], at.near_weight, upper[at.far], at.far_weight);
                lower_[x] = blend(lower[at.near], at.near_weight, lower[at.far], at.far_weight);
            }
        }
    }
};

// Run lengths down the columns, and from them area, box and text.
class RunMaker {
  public:
    void read(const u8* mask, i32 height, i32 width) {
        height_ = height;
        changes_.clear();
        ends_.assign(size_t(width) + 1, 0);
        for (i32 x = 0; x < width && height > 0; ++x) {  // a column goes on where the one before it ended
            if (mask[x] != (x == 0 ? 0 : mask[i64(height - 1) * width + x - 1])) note(x, 0);
        }
        for (i32 y = 1; y < height; ++y) compare(mask + i64(y - 1) * width, mask + i64(y) * width, y, width);
        for (i32 x = 0; x < width; ++x) ends_[size_t(x) + 1] += ends_[size_t(x)];
        starts_.resize(changes_.size());
        for (const Change& change : changes_) {
            starts_[size_t(ends_[size_t(change.column)]++)] = i64(change.column) * height + change.row;
        }
        starts_.push_back(i64(height) * width);
    }

    void measure(i32 box[4], i64& area) const {
        area = 0;
        box[0] = box[1] = box[2] = box[3] = 0;
        for (size_t i = 0; i + 1 < starts_.size(); i += 2) {
            const i64 begin = starts_[i], last = starts_[i + 1] - 1;
            const i32 left = i32(begin / height_), right = i32(last / height_);
            const bool one = left == right;
            const i32 top = one ? i32(begin % height_) : 0, bottom = one ? i32(last % height_) : height_ - 1;
            if (area == 0) {
                box[0] = left;
                box[1] = top;
            }
            area += last + 1 - begin;
            box[1] = top < box[1] ? top : box[1];
            box[2] = right + 1;  // runs come from left to right
            box[3] = bottom + 1 > box[3] ? bottom + 1 : box[3];
        }
    }

    // Appends the run lengths as text; `used` counts on beyond `capacity`, where nothing is written.
    void write(char* text, i64 capacity, i64& used) const {
        i64 runs[3] = {0, 0, 0};  // this one and the two before it
        for (size_t i = 0; i < starts_.size(); ++i) {
            runs[i % 3] = starts_[i] - (i == 0 ? 0 : starts_[i - 1]);
            const i64 number = i > 2 ? runs[i % 3] - runs[(i + 1) % 3] : runs[i % 3];
            char characters[16];
            const u32 length = write_run(number, characters);
            if (used + length <= capacity) std::memcpy(text + used, characters, length);
            used += length;
        }
    }

  private:
    struct Change {
        i32 column, row;
    };
    i32 height_ = 0;
    std::vector<Change> changes_;  // in rows
    std::vector<i64> ends_;
    std::vector<i64> starts_;      // of each run but the first, then the number of pixels

    void note(i32 column, i32 row) {
        changes_.push_back({column, row});
        ++ends_[size_t(column) + 1];
    }

    void compare(const u8* above, const u8* below, i32 row, i32 width) {
        i32 x = 0;
        for (; x + 32 <= width; x += 32) {
            u64 a[4], b[4];
            std::memcpy(a, above + x, 32);
            std::memcpy(b, below + x, 32);
            if (((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3])) == 0) continue;
            for (i32 i = x; i < x + 32; ++i) {
                if (above[i] != below[i]) note(i, row);
            }
        }
        for (; x < width; ++x) {
            if (above[x] != below[x]) note(x, row);
        }
    }
};

}  // namespace

// 0: done. 1: `rle_capacity` is less than `rle_used` now says; everything else is done. 2: no memory.
SZ_EXPORT i32 segzero_postprocess_masks(MaskJob* job) try {
    MaskMaker masks(*job);
    RunMaker runs;
    job->rle_used = 0;
    for (i64 i = 0; i < job->count; ++i) {
        masks.make(i);
        runs.read(job->masks + i * job->height * job->width, job->height, job->width);
        runs.measure(job->boxes_xyxy + 4 * i, job->areas[i]);
        if (job->rle_ends == nullptr) continue;
        runs.write(job->rle_text, job->rle_capacity, job->rle_used);
        job->rle_ends[i] = job->rle_used;
    }
    return job->rle_used > job->rle_capacity ? 1 : 0;
} catch (const std::bad_alloc&) {
    return 2;
}

// The run lengths of a mask u8 [height, width] of zeros and ones; returns how many characters they take, or -1 without
// memory. Nothing is written beyond `capacity`.
SZ_EXPORT i64 segzero_encode_rle(const u8* mask, i32 height, i32 width, char* text, i64 capacity) try {
    RunMaker runs;
    i64 used = 0;
    runs.read(mask, height, width);
    runs.write(text, capacity, used);
    return used;
} catch (const std::bad_alloc&) {
    return -1;
}

}  // namespace segzero
