// Run lengths of a mask on the host, down the columns as COCO counts them, and from them area, box and text.
//
// Where a row differs from the one above it is told row by row, while the mask is made; columns are put in order at the
// end. Eight pixels are looked at as one word, whose first pixel is in the lowest byte: hosts are little-endian.
#pragma once

#include <vector>

#include "masks.cuh"

namespace segzero {

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
        num_changes_ = 0;
        wraps_.clear();
        ends_.assign(size_t(width) + 1, 0);
        words_.resize(size_t(width) / 8 + 1);
    }

    void compare(const u8* above, const u8* below, i32 row, Span columns) {
        if (changes_.size() < num_changes_ + (columns.end - columns.begin)) {
            changes_.resize(2 * changes_.size() + kFirstChanges + size_t(width_));
        }
        // Where pixels differ cannot be guessed, so that first all words that do are listed without a branch.
        Word* listed = words_.data();
        u32 x = columns.begin;
        for (; x + 8 <= columns.end; x += 8) list_word(above, below, x, ~u64(0), listed);
        if (x < columns.end && x + 8 <= u32(width_)) {
            list_word(above, below, x, (u64(1) << 8 * (columns.end - x)) - 1, listed);
            x = columns.end;
        }
        for (const Word* word = words_.data(); word != listed; ++word) {
            u64 differ = word->differ;
            do {
                const u32 byte = u32(__builtin_ctzll(differ)) / 8;
                note(word->column + byte, row);
                differ &= ~(u64(0xFF) << 8 * byte);
            } while (differ != 0);
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
        starts_.resize(wraps_.size() + num_changes_);
        for (const u32 column : wraps_) starts_[size_t(ends_[column]++)] = i64(column) * height_;
        for (size_t i = 0; i < num_changes_; ++i) {
            const Change& change = changes_[i];
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
            const i32 top = one ? i32(begin - i64(left) * height_) : 0;
            const i32 bottom = one ? i32(last - i64(right) * height_) : height_ - 1;
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
        i64 before = 0, last = 0, second_last = 0;
        for (size_t i = 0; i < starts_.size(); ++i) {
            const i64 run = starts_[i] - before;
            char characters[16];
            const u32 length = write_run(i > 2 ? run - second_last : run, characters);
            if (used + length <= capacity) std::memcpy(text + used, characters, length);
            used += length;
            before = starts_[i];
            second_last = last;
            last = run;
        }
    }

  private:
    struct Change {
        u32 column;
        i32 row;
    };
    struct Word {
        u64 differ;  // bytes that are not zero belong to pixels that differ
        u32 column;  // of the first
    };
    static constexpr size_t kFirstChanges = 4096;
    i32 height_ = 0, width_ = 0;
    std::vector<Change> changes_;  // in the order of rows; the first `num_changes_` count
    size_t num_changes_ = 0;
    std::vector<Word> words_;
    std::vector<u32> wraps_;       // columns that begin otherwise than the one before them ended
    std::vector<i64> ends_;
    std::vector<i64> starts_;      // of each run but the first, then the number of pixels

    static void list_word(const u8* above, const u8* below, u32 column, u64 counted, Word*& listed) {
        u64 one, other;
        std::memcpy(&one, above + column, 8);
        std::memcpy(&other, below + column, 8);
        const u64 differ = (one ^ other) & counted;
        *listed = {differ, column};
        listed += differ != 0;
    }

    void note(u32 column, i32 row) {
        changes_[num_changes_++] = {column, row};
        ++ends_[size_t(column) + 1];
    }
};

}  // namespace segzero
