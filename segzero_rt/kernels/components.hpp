// Connected components of small label pictures on the host: union-find over runs of equal labels, 8-connected.
#pragma once

#include <vector>

#include "portable.cuh"

namespace segzero {

// Behind the bytes from `begin` on that are the same. The first of eight is in a word's lowest byte: hosts are
// little-endian.
inline i32 run_end(const u8* bytes, i32 begin, i32 width) {
    const u64 same = 0x0101010101010101ull * bytes[begin];
    i32 end = begin + 1;
    for (u64 words[4]; end + 32 <= width; end += 32) {
        std::memcpy(words, bytes + end, 32);
        if (((words[0] ^ same) | (words[1] ^ same) | (words[2] ^ same) | (words[3] ^ same)) != 0) break;
    }
    for (u64 word; end + 8 <= width; end += 8) {
        std::memcpy(&word, bytes + end, 8);
        if (word != same) return end + i32(__builtin_ctzll(word ^ same)) / 8;
    }
    while (end < width && bytes[end] == bytes[begin]) ++end;
    return end;
}

// Labels u8 [height, width]. Components of label `from` (0 or 1) with at most `limit[from]` pixels are handed to `flip`
// as runs (row, begin, end). Both labels are decided on the picture as it came, as in SAM 2.
class SmallComponents {
  public:
    template <typename Flip>
    void visit(const u8* labels, i32 height, i32 width, const i64 limit[2], Flip flip) {
        if (limit[0] <= 0 && limit[1] <= 0) return;
        runs_.clear();
        runs_.reserve(kFirstRuns);
        size_t above = 0, above_end = 0;
        for (i32 row = 0; row < height; ++row) {
            const size_t begin = runs_.size();
            add_row(labels + i64(row) * width, row, width);
            join_rows(above, above_end, begin, runs_.size());
            above = begin;
            above_end = runs_.size();
        }
        area_.assign(runs_.size(), 0);
        for (size_t i = 0; i < runs_.size(); ++i) area_[find(u32(i))] += runs_[i].end - runs_[i].begin;
        for (size_t i = 0; i < runs_.size(); ++i) {
            const Run& run = runs_[i];
            if (run.label < 2 && area_[find(u32(i))] <= limit[run.label]) flip(run.row, run.begin, run.end, run.label);
        }
    }

  private:
    struct Run {
        i32 row, begin, end;
        u32 parent;
        u8 label;
    };
    static constexpr size_t kFirstRuns = 4096;
    std::vector<Run> runs_;
    std::vector<i64> area_;

    void add_row(const u8* labels, i32 row, i32 width) {
        for (i32 begin = 0; begin < width;) {
            const i32 end = run_end(labels, begin, width);
            runs_.push_back({row, begin, end, u32(runs_.size()), labels[begin]});
            begin = end;
        }
    }

    // Runs of two neighbouring rows belong together if they have one label and touch, corners included.
    void join_rows(size_t above, size_t above_end, size_t below, size_t below_end) {
        while (above < above_end && below < below_end) {
            const Run &upper = runs_[above], &lower = runs_[below];
            if (upper.label == lower.label) unite(u32(above), u32(below));
            // Rows are full of runs, so that two can only touch by a corner where two others end at one place.
            if (upper.end == lower.end) {
                if (below + 1 < below_end && runs_[below + 1].label == upper.label) unite(u32(above), u32(below + 1));
                if (above + 1 < above_end && runs_[above + 1].label == lower.label) unite(u32(above + 1), u32(below));
            }
            const bool upper_done = upper.end <= lower.end, lower_done = lower.end <= upper.end;
            above += upper_done;
            below += lower_done;
        }
    }

    u32 find(u32 run) {
        while (runs_[run].parent != run) {
            runs_[run].parent = runs_[runs_[run].parent].parent;
            run = runs_[run].parent;
        }
        return run;
    }

    void unite(u32 one, u32 other) {
        one = find(one);
        other = find(other);
        if (one < other) {
            runs_[other].parent = one;
        } else {
            runs_[one].parent = other;
        }
    }
};

}  // namespace segzero
