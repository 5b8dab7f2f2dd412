// postprocess_masks: coarse logits to masks in the source picture's size, holes and sprinkles removed, with boxes,
// areas, stability and COCO run lengths. The contract and its reference stand in postprocess_masks.py.
//
// On the host, a band of output rows between two rows of logits shares one template: cells whose four corners lie on
// one side are filled, the others computed. Two neighbouring rows can only differ in cells that were computed for one of
// them, so run lengths are told from there while the mask is made: changes from row to row, sorted by column.
#include <new>
#include <vector>

#include "components.hpp"
#include "masks.cuh"

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

// Run lengths down the columns, and from them area, box and text.
class RunMaker {
  public:
    void read(const u8* mask, i32 height, i32 width) {
        begin(height, width);
        const Span row = {0, u32(width)};
        for (i32 y = 1; y < height; ++y) compare(mask + i64(y - 1) * width, mask + i64(y) * width, y, row);
        finish(mask);
    }

    // The same in steps: `begin`, `compare` for each row but the first, where it may differ from that above, `finish`.
    void begin(i32 height, i32 width) {
        height_ = height;
        width_ = width;
        changes_.clear();
        wraps_.clear();
        ends_.assign(size_t(width) + 1, 0);
    }

    void compare(const u8* above, const u8* below, i32 row, Span columns) {
        u32 x = columns.begin;
        for (u64 one, other; x + 8 <= columns.end; x += 8) {
            std::memcpy(&one, above + x, 8);
            std::memcpy(&other, below + x, 8);
            if (one == other) continue;
            for (u32 i = x; i < x + 8; ++i) {
                if (above[i] != below[i]) note(i, row);
            }
        }
        for (; x < columns.end; ++x) {
            if (above[x] != below[x]) note(x, row);
        }
    }

    void finish(const u8* mask) {
        if (height_ == 0) {
            starts_.assign(1, 0);
            return;
        }
        const u8* last = mask + i64(height_ - 1) * width_;
        for (i32 x = 0; x < width_; ++x) {  // a column goes on where the one before it ended
            if (mask[x] == (x == 0 ? 0 : last[x - 1])) continue;
            wraps_.push_back(u32(x));
            ++ends_[size_t(x) + 1];
        }
        for (i32 x = 0; x < width_; ++x) ends_[size_t(x) + 1] += ends_[size_t(x)];
        starts_.resize(wraps_.size() + changes_.size());
        for (const u32 column : wraps_) starts_[size_t(ends_[column]++)] = i64(column) * height_;
        for (const Change& change : changes_) {
            starts_[size_t(ends_[change.column]++)] = i64(change.column) * height_ + change.row;
        }
        starts_.push_back(i64(height_) * width_);
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
        u32 column;
        i32 row;
    };
    i32 height_ = 0, width_ = 0;
    std::vector<Change> changes_;  // in the order of rows
    std::vector<u32> wraps_;       // columns that begin otherwise than the one before them ended
    std::vector<i64> ends_;
    std::vector<i64> starts_;      // of each run but the first, then the number of pixels

    void note(u32 column, i32 row) {
        changes_.push_back({column, row});
        ++ends_[size_t(column) + 1];
    }
};

// The loops over whole rows. Bytes may alias anything, and the compiler takes many at a time only where it is told that
// these do not.
void label_sides(const float* __restrict logits, i64 count, float threshold, u8* __restrict labels) {
    for (i64 i = 0; i < count; ++i) labels[i] = side_of(logits[i], threshold);
}

void label_cells(const float* __restrict upper, const float* __restrict lower, i32 columns, float threshold,
                 u8* __restrict sides) {
    const i32 last = columns - 1;
    for (i32 i = 0; i < last; ++i) sides[i] = cell_side(upper[i], upper[i + 1], lower[i], lower[i + 1], threshold);
    sides[last] = cell_side(upper[last], upper[last], lower[last], lower[last], threshold);
}

void fill_span(const float* __restrict upper, const float* __restrict lower, const AxisSample& row, Span span,
               float threshold, u8* __restrict line) {
    const float near = row.near_weight, far = row.far_weight;
    for (u32 x = span.begin; x < span.end; ++x) line[x] = blend(upper[x], near, lower[x], far) > threshold;
}

i64 count_above(const float* logits, i64 count, float threshold) {
    i64 total = 0;
    for (i64 begin = 0; begin < count; begin += kBlock) {
        const i64 end = begin + kBlock < count ? begin + kBlock : count;
        i32 above = 0;  // narrow, for more of them at a time
        for (i64 i = begin; i < end; ++i) above += logits[i] > threshold;
        total += above;
    }
    return total;
}

class MaskMaker {
  public:
    MaskMaker(MaskJob& job, RunMaker& runs) : job_(job), runs_(runs) {
        for (i32 x = 0; x < job.width; ++x) columns_.push_back(axis_sample(x, job.coarse_width, job.width));
        cell_begin_.assign(size_t(job.coarse_width) + 1, job.width);
        for (i32 x = job.width; x-- > 0;) cell_begin_[size_t(columns_[size_t(x)].near)] = x;
        for (i32 c = job.coarse_width; c-- > 0;) {  // cells without a pixel begin where the next one does
            if (cell_begin_[size_t(c)] > cell_begin_[size_t(c) + 1]) cell_begin_[size_t(c)] = cell_begin_[size_t(c) + 1];
        }
        upper_.resize(size_t(job.width));
        lower_.resize(size_t(job.width));
        template_.resize(size_t(job.width));
        sides_.resize(size_t(job.coarse_width));
    }

    void make(i64 index) {
        const i64 coarse = i64(job_.coarse_height) * job_.coarse_width;
        const float* logits = job_.logits + index * coarse;
        job_.stability[index] = stability(logits, coarse);
        if (job_.clean_after == 0) logits = cleaned(logits, coarse);
        u8* mask = job_.masks + index * job_.height * job_.width;
        runs_.begin(job_.height, job_.width);
        mixed_.clear();
        for (i32 y = 0; job_.width > 0 && y < job_.height;) y = fill_band(logits, mask, y);
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
    i32 near_above_ = 0;  // the upper row of logits of the band above
    SmallComponents components_;
    std::vector<AxisSample> columns_;
    std::vector<i32> cell_begin_;  // first output column of each cell
    std::vector<float> upper_, lower_, copy_;
    std::vector<u8> template_, labels_;
    std::vector<u8> sides_;           // of each cell of a band: 0, 1, or kMixed
    std::vector<Span> mixed_, both_, joined_;  // columns computed in a band, and in it or the one above

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

    float stability(const float* logits, i64 coarse) const {
        const i64 smaller = count_above(logits, coarse, job_.stable_above);
        const i64 larger = count_above(logits, coarse, job_.stable_below);
        return larger > 0 ? float(smaller) / float(larger) : 1.0f;
    }

    const float* cleaned(const float* logits, i64 coarse) {
        if (job_.max_hole_area <= 0 && job_.max_sprinkle_area <= 0) return logits;
        copy_.assign(logits, logits + coarse);
        labels_.resize(size_t(coarse));
        label_sides(logits, coarse, job_.threshold, labels_.data());
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
        // Neighbouring bands share a row of logits, and a cell of one side beside a cell of the other has none.
        if (y > 0 && near > near_above_ + 1) {
            both_.assign(1, {0, u32(job_.width)});
        } else {
            both_.swap(mixed_);
        }
        near_above_ = near;
        prepare_band(logits + i64(row.near) * job_.coarse_width, logits + i64(row.far) * job_.coarse_width);
        while (true) {
            u8* line = mask + i64(y) * job_.width;
            std::memcpy(line, template_.data(), size_t(job_.width));
            for (const Span& span : mixed_) fill_span(upper_.data(), lower_.data(), row, span, job_.threshold, line);
            if (y > 0) {
                for (const Span& span : both_) runs_.compare(line - job_.width, line, y, span);
            }
            both_ = mixed_;
            if (++y >= job_.height) return y;
            row = axis_sample(y, job_.coarse_height, job_.height);
            if (row.near != near) return y;
        }
    }

    // Sides of the cells between two rows of logits, their template, and which columns have to be computed. `both_` holds
    // those of the band above and becomes the union.
    void prepare_band(const float* upper, const float* lower) {
        const i32 last = job_.coarse_width - 1;
        label_cells(upper, lower, job_.coarse_width, job_.threshold, sides_.data());
        mixed_.clear();
        for (i32 first = 0; first <= last;) {
            const i32 behind = run_end(sides_.data(), first, last + 1);
            const u32 begin = u32(cell_begin_[size_t(first)]), end = u32(cell_begin_[size_t(behind)]);
            if (sides_[size_t(first)] != kMixed) {
                std::memset(template_.data() + begin, sides_[size_t(first)], end - begin);
            } else if (begin < end) {
                mixed_.push_back({begin, end});
            }
            first = behind;
        }
        unite(both_, mixed_);
        for (const Span& span : mixed_) {
            for (u32 x = span.begin; x < span.end; ++x) {
                const AxisSample& at = columns_[x];
                upper_[x] = blend(upper[at.near], at.near_weight, upper[at.far], at.far_weight);
                lower_[x] = blend(lower[at.near], at.near_weight, lower[at.far], at.far_weight);
            }
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
