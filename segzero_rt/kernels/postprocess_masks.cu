// postprocess_masks: coarse logits to masks in the source picture's size, holes and sprinkles removed, with boxes,
// areas, stability and COCO run lengths. The contract and its reference stand in postprocess_masks.py.
//
// On the host, a band of output rows between two rows of logits shares one template: cells whose four corners lie on
// one side are filled, the others computed. Two neighbouring rows can only differ in cells that were computed for one of
// them, so run lengths are told from there while the mask is made: changes from row to row, sorted by column.
#include <memory>
#include <new>
#include <vector>

#include "components.hpp"
#include "run_lengths.hpp"

namespace segzero {

// Fields as in `MaskJob` of postprocess_masks_host.py.
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

}  // namespace segzero

#ifdef __CUDACC__
#include "masks_device.cuh"
#endif

namespace segzero {

namespace {

constexpr i64 kBlock = 1 << 20;

// The loops over whole rows. Bytes may alias anything, and the compiler takes many at a time only where it is told that
// these do not.
// What is sure of each logit, which side it counts on when components are labelled, and how many are above two others.
struct Levels {
    float threshold;
    SureSides sure;
    float stable_above, stable_below;
};

template <bool kLabelled>
void label_logits(const float* __restrict logits, i64 count, const Levels& levels, u8* __restrict sure,
                  u8* __restrict labels, i64 (&above)[2]) {
    above[0] = above[1] = 0;
    for (i64 begin = 0; begin < count; begin += kBlock) {
        const i64 end = begin + kBlock < count ? begin + kBlock : count;
        i32 first = 0, second = 0;  // narrow, for more of them at a time
        for (i64 i = begin; i < end; ++i) {
            sure[i] = levels.sure.of(logits[i]);
            if (kLabelled) labels[i] = side_of(logits[i], levels.threshold);
            first += logits[i] > levels.stable_above;
            second += logits[i] > levels.stable_below;
        }
        above[0] += first;
        above[1] += second;
    }
}

// Each flag becomes what it has in common with the next in its row; the last one stays.
void join_pairs(u8* flags, i32 columns) {
    for (i32 i = 0; i + 1 < columns; ++i) flags[i] &= flags[i + 1];
}

void join_rows(const u8* __restrict upper, const u8* __restrict lower, i32 columns, u8* __restrict cells) {
    for (i32 i = 0; i < columns; ++i) cells[i] = upper[i] & lower[i];
}

// Where each pixel of an axis reads, field by field, for many at a time.
struct AxisSamples {
    std::vector<i32> near, far;
    std::vector<float> near_weight, far_weight;

    AxisSamples(i32 coarse, i32 fine) {
        const size_t length = size_t(fine);
        near.resize(length);
        far.resize(length);
        near_weight.resize(length);
        far_weight.resize(length);
        for (i32 i = 0; i < fine; ++i) {
            const AxisSample sample = axis_sample(i, coarse, fine);
            near[size_t(i)] = sample.near;
            far[size_t(i)] = sample.far;
            near_weight[size_t(i)] = sample.near_weight;
            far_weight[size_t(i)] = sample.far_weight;
        }
    }
};

void blend_span(const float* __restrict line, const AxisSamples& columns, Span span, float* __restrict blended) {
    const i32 *near = columns.near.data(), *far = columns.far.data();
    const float *near_weight = columns.near_weight.data(), *far_weight = columns.far_weight.data();
    for (u32 x = span.begin; x < span.end; ++x) {
        blended[x] = blend(line[near[x]], near_weight[x], line[far[x]], far_weight[x]);
    }
}

void fill_span(const float* __restrict upper, const float* __restrict lower, float near_weight, float far_weight,
               Span span, float threshold, u8* __restrict line) {
    for (u32 x = span.begin; x < span.end; ++x) {
        line[x] = blend(upper[x], near_weight, lower[x], far_weight) > threshold;
    }
}

class MaskMaker {
  public:
    MaskMaker(MaskJob& job, RunMaker& runs)
        : job_(job),
          runs_(runs),
          levels_{job.threshold, SureSides(job.threshold), job.stable_above, job.stable_below},
          columns_(job.coarse_width, job.width),
          rows_(job.coarse_height, job.height) {
        cell_begin_.assign(size_t(job.coarse_width) + 1, job.width);
        for (i32 x = job.width; x-- > 0;) cell_begin_[size_t(columns_.near[size_t(x)])] = x;
        for (i32 c = job.coarse_width; c-- > 0;) {  // cells without a pixel begin where the next one does
            if (cell_begin_[size_t(c)] > cell_begin_[size_t(c) + 1]) cell_begin_[size_t(c)] = cell_begin_[size_t(c) + 1];
        }
        const size_t coarse = size_t(job.coarse_height) * size_t(job.coarse_width);
        cleans_logits_ = job.clean_after == 0 && (job.max_hole_area > 0 || job.max_sprinkle_area > 0);
        upper_.resize(size_t(job.width));
        lower_.resize(size_t(job.width));
        for (std::vector<u8>* line : {&template_, &line_, &line_above_}) line->resize(size_t(job.width));
        cells_.resize(size_t(job.coarse_width));
        sure_.reset(new u8[coarse]);
        lines_.resize(size_t(job.coarse_height));
        if (cleans_logits_) {
            labels_.reset(new u8[coarse]);
            copy_.reset(new float[coarse]);
        }
    }

    void make(i64 index) {
        label(job_.logits + index * job_.coarse_height * job_.coarse_width, index);
        if (cleans_logits_) clean_logits();
        for (i32 row = 0; row < job_.coarse_height; ++row) join_pairs(sure_row(row), job_.coarse_width);
        u8* mask = job_.masks + index * job_.height * job_.width;
        runs_.begin(job_.height, job_.width);
        mixed_.clear();
        for (i32 y = 0; job_.width > 0 && y < job_.height;) y = fill_band(mask, y);
        if (job_.clean_after != 0) {
            clean(mask);
            runs_.read(mask, job_.height, job_.width);
        } else {
            runs_.finish(mask);
        }
    }

  private:
    MaskJob& job_;
    RunMaker& runs_;
    Levels levels_;
    AxisSamples columns_, rows_;
    bool cleans_logits_;
    i32 near_above_ = 0;  // the upper row of logits of the band above
    SmallComponents components_;
    std::vector<i32> cell_begin_;      // first output column of each cell
    std::vector<const float*> lines_;  // rows of logits, as they came or cleaned
    std::vector<float> upper_, lower_;
    std::vector<u8> template_;
    std::vector<u8> line_, line_above_;  // the last two rows that were made
    // What is sure of each logit, then of it and its right neighbour; and of the cells between two rows.
    std::unique_ptr<u8[]> sure_;
    std::vector<u8> cells_;
    // Where logits are cleaned: sides of all, and copies of rows. Nothing is set beforehand: that would take its time.
    std::unique_ptr<u8[]> labels_;
    std::unique_ptr<float[]> copy_;
    std::vector<Span> mixed_, both_, joined_;  // columns computed in a band, and in it or the one above

    u8* sure_row(i32 row) { return sure_.get() + i64(row) * job_.coarse_width; }

    // Adds spans to others; both are in order.
    void unite(std::vector<Span>& spans, const std::vector<Span>& added) {
        joined_.clear();
        for (size_t i = 0, j = 0; i < spans.size() || j < added.size();) {
            const bool own = j >= added.size() || (i < spans.size() && spans[i].begin <= added[j].begin);
            const Span next = own ? spans[i++] : added[j++];
            if (joined_.empty() || joined_.back().end < next.begin) {
                joined_.push_back(next);
            } else if (joined_.back().end < next.end) {
                joined_.back().end = next.end;
            }
        }
        spans.swap(joined_);
    }

    void label(const float* logits, i64 index) {
        const i64 coarse = i64(job_.coarse_height) * job_.coarse_width;
        i64 above[2];
        if (cleans_logits_) {
            label_logits<true>(logits, coarse, levels_, sure_.get(), labels_.get(), above);
        } else {
            label_logits<false>(logits, coarse, levels_, sure_.get(), nullptr, above);
        }
        job_.stability[index] = above[1] > 0 ? float(above[0]) / float(above[1]) : 1.0f;
        for (i32 row = 0; row < job_.coarse_height; ++row) lines_[size_t(row)] = logits + i64(row) * job_.coarse_width;
    }

    // Puts small components on the other side, in copies of their rows.
    void clean_logits() {
        const i64 limits[2] = {job_.max_hole_area, job_.max_sprinkle_area};
        const size_t width = size_t(job_.coarse_width);
        float* next = copy_.get();
        i32 copied = -1;
        components_.visit(labels_.get(), job_.coarse_height, job_.coarse_width, limits,
                          [&](i32 row, i32 begin, i32 end, u8 label) {
                              if (row != copied) {  // they come row by row
                                  std::memcpy(next, lines_[size_t(row)], sizeof(float) * width);
                                  lines_[size_t(row)] = next;
                                  next += width;
                                  copied = row;
                              }
                              const float value = label == 0 ? job_.hole_value : job_.sprinkle_value;
                              for (i32 x = begin; x < end; ++x) (next - width)[x] = value;
                              std::memset(sure_row(row) + begin, levels_.sure.of(value), size_t(end - begin));
                          });
    }

    void clean(u8* mask) {
        const i64 limits[2] = {job_.max_hole_area, job_.max_sprinkle_area};
        components_.visit(mask, job_.height, job_.width, limits, [&](i32 row, i32 begin, i32 end, u8 label) {
            std::memset(mask + i64(row) * job_.width + begin, label == 0 ? 1 : 0, size_t(end - begin));
        });
    }

    // Fills the output rows from `y` that lie between the same two rows of logits; returns the row behind them.
    i32 fill_band(u8* mask, i32 y) {
        const i32 near = rows_.near[size_t(y)], far = rows_.far[size_t(y)];
        // Neighbouring bands share a row of logits, and a cell of one side beside a cell of the other has none.
        if (y > 0 && near > near_above_ + 1) {
            both_.assign(1, {0, u32(job_.width)});
        } else {
            both_.swap(mixed_);
        }
        near_above_ = near;
        prepare_band(near, far);
        for (i32 first = y;;) {
            // Rows are made and compared in the cache, and then written: what was just written far away is slow to read.
            line_.swap(line_above_);
            u8* line = line_.data();
            if (y - first < 2) std::memcpy(line, template_.data(), size_t(job_.width));
            const float near_weight = rows_.near_weight[size_t(y)], far_weight = rows_.far_weight[size_t(y)];
            for (const Span& span : mixed_) {
                fill_span(upper_.data(), lower_.data(), near_weight, far_weight, span, job_.threshold, line);
            }
            if (y > 0) {
                for (const Span& span : y == first ? both_ : mixed_) {
                    runs_.compare(line_above_.data(), line, y, span);
                }
            }
            std::memcpy(mask + i64(y) * job_.width, line, size_t(job_.width));
            if (++y >= job_.height || rows_.near[size_t(y)] != near) return y;
        }
    }

    // The template of the cells between two rows of logits, and which columns have to be computed. `both_` holds those of
    // the band above and becomes the union.
    void prepare_band(i32 near, i32 far) {
        join_rows(sure_row(near), sure_row(far), job_.coarse_width, cells_.data());
        mixed_.clear();
        for (i32 first = 0; first < job_.coarse_width;) {
            const i32 behind = run_end(cells_.data(), first, job_.coarse_width);
            const u32 begin = u32(cell_begin_[size_t(first)]), end = u32(cell_begin_[size_t(behind)]);
            if (cells_[size_t(first)] != 0) {
                std::memset(template_.data() + begin, cells_[size_t(first)] == kAbove, end - begin);
            } else if (begin < end) {
                mixed_.push_back({begin, end});
            }
            first = behind;
        }
        unite(both_, mixed_);
        for (const Span& span : mixed_) {
            blend_span(lines_[size_t(near)], columns_, span, upper_.data());
            blend_span(lines_[size_t(far)], columns_, span, lower_.data());
        }
    }
};

}  // namespace

// 0: done. 1: `rle_capacity` is less than `rle_used` now says; everything else is done. 2: no memory.
SZ_EXPORT i32 segzero_postprocess_masks(MaskJob* job) try {
    RunMaker runs;
    MaskMaker masks(*job, runs);
    job->rle_used = 0;
    for (i64 i = 0; i < job->count; ++i) {
        masks.make(i);
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
