// Characters, white space and tags of a reply: what Python's `str` and `answer_tags` say about its UTF-8.
//
// A byte that belongs to no UTF-8 sequence is a character of its own, U+DC00 + byte, as `surrogateescape` reads it;
// surrogates that were encoded by themselves are read back, as `surrogatepass` does.
#pragma once

#include "portable.cuh"

namespace segzero {

SZ_HD inline bool is_continuation(u8 c) { return (c & 0xC0) == 0x80; }

// Decodes the character at `at` (which is before `end`) and moves behind it.
SZ_HD inline u32 next_character(const u8* text, u32& at, u32 end) {
    const u8 c = text[at];
    const u32 left = end - at;
    if (c < 0x80) {
        ++at;
        return c;
    }
    if (c >= 0xC2 && c <= 0xDF && left >= 2 && is_continuation(text[at + 1])) {
        at += 2;
        return (u32(c & 0x1F) << 6) | (text[at - 1] & 0x3F);
    }
    if ((c & 0xF0) == 0xE0 && left >= 3 && is_continuation(text[at + 1]) && is_continuation(text[at + 2]) &&
        (c != 0xE0 || text[at + 1] >= 0xA0)) {
        at += 3;
        return (u32(c & 0x0F) << 12) | (u32(text[at - 2] & 0x3F) << 6) | (text[at - 1] & 0x3F);
    }
    if (c >= 0xF0 && c <= 0xF4 && left >= 4 && is_continuation(text[at + 1]) && is_continuation(text[at + 2]) &&
        is_continuation(text[at + 3]) && (c != 0xF0 || text[at + 1] >= 0x90) && (c != 0xF4 || text[at + 1] < 0x90)) {
        at += 4;
        return (u32(c & 0x07) << 18) | (u32(text[at - 3] & 0x3F) << 12) | (u32(text[at - 2] & 0x3F) << 6) |
               (text[at - 1] & 0x3F);
    }
    ++at;
    return 0xDC00u + c;
}

// Whether `count` characters or more stand in [at, end).
SZ_HD inline bool has_characters(const u8* text, u32 at, u32 end, u32 count) {
    for (; count > 0; --count) {
        if (at >= end) return false;
        next_character(text, at, end);
    }
    return true;
}

SZ_HD inline bool is_ascii_blank(u8 c) { return c == ' ' || (c >= 0x09 && c <= 0x0D); }  // `\s` under re.ASCII

// Length in bytes of the white space at `at`, 0 for none: `str.isspace`, which is also `\s`.
SZ_HD_CALL inline u32 blank_length(const u8* text, u32 at, u32 end) {
    if (at >= end) return 0;
    const u8 c = text[at];
    if (c < 0x80) return is_ascii_blank(c) || (c >= 0x1C && c <= 0x1F) ? 1 : 0;
    if (c == 0xC2) return end - at >= 2 && (text[at + 1] == 0x85 || text[at + 1] == 0xA0) ? 2 : 0;
    if (c < 0xE1 || c > 0xE3 || end - at < 3) return 0;
    const u8 second = text[at + 1], third = text[at + 2];
    bool blank = false;
    if (c == 0xE1) {
        blank = second == 0x9A && third == 0x80;  // U+1680
    } else if (c == 0xE3) {
        blank = second == 0x80 && third == 0x80;  // U+3000
    } else if (second == 0x80) {                  // U+2000 to U+200A, U+2028, U+2029, U+202F
        blank = (third >= 0x80 && third <= 0x8A) || third == 0xA8 || third == 0xA9 || third == 0xAF;
    } else {
        blank = second == 0x81 && third == 0x9F;  // U+205F
    }
    return blank ? 3 : 0;
}

// The same for the character that ends just before `at`, not reaching below `begin`.
SZ_HD_CALL inline u32 blank_length_before(const u8* text, u32 begin, u32 at) {
    for (u32 length = 1; length <= 3 && length <= at - begin; ++length) {
        if (blank_length(text, at - length, at) == length) return length;
    }
    return 0;
}

SZ_HD inline u32 skip_blanks(const u8* text, u32 at, u32 end) {
    for (u32 length = blank_length(text, at, end); length > 0; length = blank_length(text, at, end)) at += length;
    return at;
}

SZ_HD_CALL inline Span strip(const u8* text, Span span) {
    span.begin = skip_blanks(text, span.begin, span.end);
    while (span.end > span.begin) {
        const u32 length = blank_length_before(text, span.begin, span.end);
        if (length == 0) break;
        span.end -= length;
    }
    return span;
}

// What the tolerant reader skips without looking: white space, U+FEFF and U+200B.
SZ_HD_CALL inline u32 skip_loose_blanks(const u8* text, u32 at, u32 end) {
    while (at < end) {
        u32 length = blank_length(text, at, end);
        if (length == 0 && (starts_with(text, at, end, "\xEF\xBB\xBF") || starts_with(text, at, end, "\xE2\x80\x8B"))) {
            length = 3;
        }
        if (length == 0) break;
        at += length;
    }
    return at;
}

struct Tag {
    u32 begin;
    u32 end;  // 0: no tag
    bool is_think;
    bool is_close;
};

// Reads `< ?(/?) ?(think|answer) ?>` in any case at `at`.
SZ_HD_CALL inline Tag read_tag(const u8* text, u32 at, u32 end) {
    Tag tag = {at, 0, false, false};
    if (at >= end || text[at] != '<') return tag;
    // As they are nearly always written.
    if (starts_with(text, at, end, "<think>")) return {at, at + 7, true, false};
    if (starts_with(text, at, end, "</think>")) return {at, at + 8, true, true};
    if (starts_with(text, at, end, "<answer>")) return {at, at + 8, false, false};
    if (starts_with(text, at, end, "</answer>")) return {at, at + 9, false, true};
    ++at;
    if (at < end && text[at] == ' ') ++at;
    if (at < end && text[at] == '/') {
        tag.is_close = true;
        ++at;
    }
    if (at < end && text[at] == ' ') ++at;
    tag.is_think = at < end && ascii_lower(text[at]) == 't';
    const char* word = tag.is_think ? "think" : "answer";
    for (; *word != 0; ++word, ++at) {
        if (at >= end || ascii_lower(text[at]) != u8(*word)) return tag;
    }
    if (at < end && text[at] == ' ') ++at;
    if (at < end && text[at] == '>') tag.end = at + 1;
    return tag;
}

// The first tag that begins in [at, end); `end` 0 if there is none.
SZ_HD_CALL inline Tag next_tag(const u8* text, u32 at, u32 end) {
    for (at = find_byte(text, at, end, '<'); at < end; at = find_byte(text, at + 1, end, '<')) {
        const Tag tag = read_tag(text, at, end);
        if (tag.end != 0) return tag;
    }
    return Tag{end, 0, false, false};
}

// The first tags of a text.
struct FoundTags {
    static constexpr u32 kKept = 12;
    u32 count;
    Tag kept[kKept];
};

// The tags of a text in order. The first ones are found once and kept; behind them the text is searched again.
struct Tags {
    static constexpr u32 kKept = FoundTags::kKept;
    const u8* text;
    u32 length;
    FoundTags found;

    SZ_HD void find(const u8* reply, u32 bytes) {
        text = reply;
        length = bytes;
        found.count = 0;
        for (Tag tag = next_tag(text, 0, length); tag.end != 0; tag = next_tag(text, tag.end, length)) {
            found.kept[found.count++] = tag;
            if (found.count == kKept) break;
        }
    }

    // Whether a thinking and an answer follow each other, each closed, and there is nothing else.
    SZ_HD bool usual() const {
        const Tag* tag = found.kept;
        return found.count == 4 && tag[0].is_think && !tag[0].is_close && tag[1].is_think && tag[1].is_close &&
               !tag[2].is_think && !tag[2].is_close && !tag[3].is_think && tag[3].is_close;
    }

    // Tag number `index`, which follows `previous`; `end` 0 if there is none.
    SZ_HD Tag get(u32 index, const Tag& previous) const {
        if (index < found.count) return found.kept[index];
        return found.count < kKept ? Tag{length, 0, false, false} : next_tag(text, previous.end, length);
    }
    SZ_HD Tag first() const { return get(0, Tag{0, 0, false, false}); }

    // The first tag that begins at `at` or behind it.
    SZ_HD Tag from(u32 at) const {
        for (u32 i = 0; i < found.count; ++i) {
            if (found.kept[i].begin >= at) return found.kept[i];
        }
        return found.count < kKept ? Tag{length, 0, false, false} : next_tag(text, at, length);
    }
};

}  // namespace segzero
