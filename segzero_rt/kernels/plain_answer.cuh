// The usual answer, read in one pass without a tape: a list of flat objects, or one object, whose members are the
// format's own box and points and things that are neither.
//
// It knows less than the two readers and never says otherwise than they would: whatever it does not know (an escape, a
// name that may mean a box, a list in a list, a stray mark, anything behind the answer but a tag or the end) it leaves
// to them. Nearly all replies of a trained policy end here.
#pragma once

#include "answer_objects.cuh"

namespace segzero {

enum class Plain { kUnknown, kRead, kNotCanonical };

struct PlainReader {
    const u8* text;
    u32 at;
    u32 end;
    const Rules& rules;
    Objects& objects;
    // Eight characters are looked at as one word where that is little-endian, as on every host of this project.
    static constexpr u64 kOnes = 0x0101010101010101ull, kHighs = 0x80 * kOnes;
    bool complete = true;  // each object so far has a box and every point

    SZ_HD PlainReader(const u8* reply, u32 begin, u32 length, const Rules& answer_rules, Objects& list)
        : text(reply), at(begin), end(length), rules(answer_rules), objects(list) {}

    // `canonical`: exactly the format's members, as `Interpreter::canonical_objects` wants them; else as
    // `tolerant_objects` does.
    SZ_HD_CALL Plain read(bool canonical) {
        if (rules.own_names == 0) return Plain::kUnknown;
        skip_blank();
        if (at >= end) return Plain::kUnknown;
        const bool list = text[at] == '[';
        if (canonical && list != (rules.multiple != 0)) return Plain::kUnknown;
        if (list ? !list_of_objects() : !object()) return Plain::kUnknown;
        skip_blank();
        if (at < end && read_tag(text, at, end).end == 0) return Plain::kUnknown;
        return canonical && !complete ? Plain::kNotCanonical : Plain::kRead;
    }

  private:
    SZ_HD void skip_blank() {
        while (at < end && (text[at] == ' ' || text[at] == '\n' || text[at] == '\r' || text[at] == '\t')) ++at;
    }

    // Takes `mark` with the blanks around it.
    SZ_HD_INLINE bool take(u8 mark) {
        if (at < end && text[at] != mark) skip_blank();
        if (at >= end || text[at] != mark) return false;
        ++at;
        if (at < end && text[at] <= ' ') skip_blank();
        return true;
    }

    SZ_HD bool list_of_objects() {
        if (!take('[')) return false;
        do {
            if (!object()) return false;
        } while (take(','));
        return take(']');
    }

    SZ_HD bool object() {
        double box[4], points[kMaxPointKeys][2];
        bool has_box = false;
        u32 order[kMaxPointKeys] = {}, num_points = 0, seen = 0;
        if (!take('{')) return false;
        do {
            if (!has_box && take_box_key()) {
                if (!take(':') || !numbers(box, 4)) return false;
                has_box = true;
                continue;
            }
            Span key;
            if (!string(key) || !take(':')) return false;
            const u32 length = key.end - key.begin;
            if (is_key(key.begin, length, rules.box_key, rules.box_key_bytes)) {
                if (has_box || !numbers(box, 4)) return false;
                has_box = true;
                continue;
            }
            u32 which = 0;
            while (which < rules.num_point_keys &&
                   !is_key(key.begin, length, rules.point_keys[which], rules.point_key_bytes[which])) {
                ++which;
            }
            if (which < rules.num_point_keys) {
                if ((seen & (1u << which)) != 0 || !numbers(points[which], 2)) return false;
                seen |= 1u << which;
                order[num_points++] = which;
            } else if (may_be_a_name(key) || !scalar()) {
                return false;
            }
        } while (take(','));
        if (!take('}') || !has_box) return false;
        // The tolerant rules take points in the order of the text, the canonical ones in the format's; as long as
        // something is missing there is no canonical object, and their order does not matter.
        if (num_points < rules.num_point_keys) complete = false;
        if (complete && !in_order(order, num_points)) return false;
        objects.begin(box);
        for (u32 i = 0; i < num_points; ++i) objects.add_point(points[order[i]][0], points[order[i]][1]);
        objects.finish();
        return true;
    }

    SZ_HD static bool in_order(const u32* order, u32 count) {
        for (u32 i = 1; i < count; ++i) {
            if (order[i] < order[i - 1]) return false;
        }
        return true;
    }

    // Takes the box's key with its quotes, where it is short and stands there; leaves anything else.
    SZ_HD_INLINE bool take_box_key() {
#ifndef __CUDA_ARCH__
        const u32 bytes = rules.box_key_bytes;
        if (bytes >= 8 || end - at < 10 || text[at] != '"') return false;
        u64 word, key;
        std::memcpy(&word, text + at + 1, 8);
        std::memcpy(&key, rules.box_key, 8);  // behind its end stand zeros
        const u64 inside = (u64(1) << 8 * bytes) - 1;
        if (((word ^ key) & inside) != 0 || text[at + 1 + bytes] != '"') return false;
        at += bytes + 2;
        return true;
#else
        return false;
#endif
    }

    SZ_HD bool is_key(u32 begin, u32 length, const char* key, u32 key_bytes) const {
        if (length != key_bytes) return false;
        for (u32 i = 0; i < length; ++i) {
            if (text[begin + i] != u8(key[i])) return false;
        }
        return true;
    }

    // Whether a key could be one of BOX_NAMES or POINT_NAMES, which begin with b, x or p.
    SZ_HD bool may_be_a_name(Span key) const {
        u32 first = key.begin;
        while (first < key.end && (text[first] == '_' || text[first] == '-' || text[first] == ' ')) ++first;
        if (first >= key.end) return false;
        const u8 letter = ascii_lower(text[first]);
        return letter == 'b' || letter == 'x' || letter == 'p';
    }

    SZ_HD bool scalar() {
        Span ignored;
        double number_ignored;
        return at < end && text[at] == '"' ? string(ignored) : number(number_ignored);
    }

    SZ_HD_INLINE bool numbers(double* values, u32 count) {
        if (!take('[')) return false;
        for (u32 i = 0; i < count; ++i) {
            if ((i > 0 && !take(',')) || !number(values[i])) return false;
        }
        return take(']');
    }

    // A number of up to 15 digits, a point among them perhaps: exact in one division (see decimal.cuh).
    SZ_HD_INLINE bool number(double& value) {
        constexpr double kPowers[] = {1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14};
        const bool negative = at < end && text[at] == '-';
        if (negative) ++at;
        const u32 first = at;
        u64 digits = 0;
        if (!short_whole(digits)) {
            while (at < end && is_digit(text[at])) digits = 10 * digits + u64(text[at++] - '0');
        }
        const u32 whole = at - first;
        u32 behind = 0;
        if (whole == 0 || whole > 15 || (whole > 1 && text[first] == '0')) return false;
        if (at < end && text[at] == '.') {
            const u32 point = at++;
            while (at < end && is_digit(text[at])) {
                if (++behind + whole > 15) return false;
                digits = 10 * digits + u64(text[at++] - '0');
            }
            if (at == point + 1) return false;
        }
        value = behind == 0 ? double(digits) : double(digits) / kPowers[behind];
        if (negative) value = -value;
        return true;
    }

    // Takes up to 7 digits with no branch for each: their number differs from coordinate to coordinate, so that a loop's
    // end is guessed wrong. False, and nothing taken, for others.
    SZ_HD_INLINE bool short_whole([[maybe_unused]] u64& digits) {
#ifndef __CUDA_ARCH__
        if (end < 8 || at >= end) return false;
        u64 word = next_word();
        word ^= 0x30 * kOnes;  // digits become 0 to 9
        const u64 others = ((word + 0x76 * kOnes) | word) & kHighs;
        if (others == 0) return false;
        const u32 count = u32(__builtin_ctzll(others)) / 8;
        if (count == 0) return false;
        word <<= 64 - 8 * count;             // zeros come before them
        word = 10 * word + (word >> 8);      // pairs of digits, in every other byte
        constexpr u64 kPairs = 0x000000FF000000FFull;
        digits = ((word & kPairs) * 0x000F424000000064ull + ((word >> 16) & kPairs) * 0x0000271000000001ull) >> 32;
        at += count;
        return true;
#else
        return false;
#endif
    }

    // ASCII without escapes and without `<`; what follows has to end it for the tolerant reader too.
    SZ_HD_INLINE bool string(Span& inside) {
        if (at >= end || text[at] != '"') return false;
        inside.begin = ++at;
        skip_plain();
        if (at >= end || text[at] != '"') return false;
        inside.end = at++;
        skip_blank();
        return at < end && (text[at] == ',' || text[at] == ':' || text[at] == '}');
    }

#ifndef __CUDA_ARCH__
    // The next eight characters, zeros behind the end; where there are eight in all, and one left.
    SZ_HD_INLINE u64 next_word() const {
        u64 word;
        const u32 left = end - at;
        std::memcpy(&word, text + (left >= 8 ? at : end - 8), 8);
        return left >= 8 ? word : word >> 8 * (8 - left);
    }
#endif

    SZ_HD static bool is_plain(u8 c) { return c >= 0x20 && c < 0x80 && c != '"' && c != '\\' && c != '<'; }

    SZ_HD_INLINE void skip_plain() {
#ifndef __CUDA_ARCH__
        const auto is_zero = [](u64 bytes) { return (bytes - kOnes) & ~bytes; };  // exact up to the first
        while (end >= 8 && at < end) {
            const u64 word = next_word();
            const u64 marks = is_zero(word ^ '"' * kOnes) | is_zero(word ^ '\\' * kOnes) | is_zero(word ^ '<' * kOnes);
            const u64 others = (marks | word | (word - 0x20 * kOnes)) & kHighs;
            if (others == 0) {
                at += 8;
                continue;
            }
            at += u32(__builtin_ctzll(others)) / 8;  // the first character is in the lowest byte
            return;
        }
#endif
        while (at < end && is_plain(text[at])) ++at;
    }
};

}  // namespace segzero
