// The tolerant JSON reader, `json_tolerant.read_tolerant`; its grammar stands there. Reads the one value that begins at
// a bracket, and never looks further ahead than the next character that is not blank.
#pragma once

#include "json_tape.cuh"

namespace segzero {

SZ_HD inline bool is_quote(u8 c) { return c == '"' || c == '\'' || c == '`'; }

struct TolerantReader : Scan {
    bool may_end;
    bool has_member = false;

    SZ_HD TolerantReader(const u8* reply, u32 begin, u32 stop, bool open_end, Tape* memory)
        : Scan(reply, begin, stop, memory), may_end(open_end) {}

    struct Open {
        u32 node;
        u8 closer;
        bool in_object;       // somewhere inside an object: nothing may be missing there
        bool last_container;  // of an array: whether its last element is a list or an object
    };

    SZ_HD_CALL bool value() {
        Open open[kMaxDepth];
        u32 depth = 0;
        bool in_object = false;
        while (true) {
            if (ended()) return false;
            const u8 mark = text[at];
            bool container = false;
            if (mark == '{' || mark == '[' || mark == '(') {
                if (depth >= kMaxDepth) return stop(Fault::kTooDeep, at);
                const bool object = mark == '{';
                open[depth] = {tape->size, object ? u8('}') : mark == '[' ? u8(']') : u8(')'), in_object, false};
                if (!push(object ? Kind::kObject : Kind::kArray)) return false;
                tape->nodes[open[depth].node].size = 0;
                ++depth;
                ++at;
            } else {
                if (!scalar()) return false;
                if (!after_value(open[depth - 1], false)) return false;
            }
            // What follows inside the innermost open container: its end, or the next value.
            while (depth > 0) {
                Open& around = open[depth - 1];
                bool closed = false;
                if (!(around.closer == '}' ? next_member(closed) : next_element(around, closed))) return false;
                if (!closed) break;
                tape->nodes[around.node].next = tape->size;
                --depth;
                container = true;
                if (depth > 0 && !after_value(open[depth - 1], container)) return false;
            }
            if (depth == 0) return true;
            in_object = open[depth - 1].closer == '}' || open[depth - 1].in_object;
        }
    }

    // Moves to the next member's value, over its key; or over the closing brace.
    SZ_HD bool next_member(bool& closed) {
        if (!skip_blank() || ended()) return false;
        if (text[at] == '}') {
            ++at;
            closed = true;
            return true;
        }
        if (!key() || !skip_blank() || ended()) return false;
        if (text[at] != ':') return stop(Fault::kUnexpected, at);
        ++at;
        has_member = true;
        return skip_blank();
    }

    SZ_HD bool next_element(const Open& around, bool& closed) {
        if (!skip_blank()) return false;
        if (!around.in_object && around.last_container && closes_itself()) {
            closed = true;
            return true;
        }
        if (ended()) return false;
        if (text[at] == around.closer) {
            ++at;
            closed = true;
            return true;
        }
        if (!around.in_object) skip_stray_opening();
        return true;
    }

    // The separator after an element or a member's value.
    SZ_HD bool after_value(Open& around, bool container) {
        ++tape->nodes[around.node].size;
        around.last_container = container;
        if (!skip_blank()) return false;
        if (around.closer != '}' && container && !around.in_object) {
            if (!skip_stray_marks()) return false;
            if (at >= end || text[at] == '<' || text[at] == '{' || quote_length() > 0) return true;
        }
        if (ended()) return false;
        if (text[at] == ',') {
            ++at;
            return true;
        }
        if (text[at] == around.closer || (around.closer == '}' && container && quote_length() > 0)) return true;
        return stop(Fault::kUnexpected, at);
    }

    // False: a comment that never ends.
    SZ_HD_CALL bool skip_blank() {
        while (true) {
            at = skip_loose_blanks(text, at, end);
            if (at >= end) return true;
            const u8 mark = text[at], next = at + 1 < end ? text[at + 1] : 0;
            if (mark == '\\' && (next == 'n' || next == 'r' || next == 't')) {
                at += 2;
            } else if (mark == '#' || (mark == '/' && next == '/')) {
                while (at < end && text[at] != '\n' && text[at] != '<') ++at;
            } else if (mark == '/' && next == '*') {
                const u32 close = find_word(text, at + 2, end, "*/");
                if (close > end) return stop(Fault::kEnded, end);
                at = close + 2;
            } else {
                return true;
            }
        }
    }

    // 1 for a quote at `at`, 2 for one with a backslash before it, 0 for none.
    SZ_HD u32 quote_length() const {
        if (at >= end) return 0;
        if (is_quote(text[at])) return 1;
        return text[at] == '\\' && at + 1 < end && is_quote(text[at + 1]) ? 2 : 0;
    }

    SZ_HD bool closes_itself() const { return at >= end ? may_end : read_tag(text, at, end).end != 0; }

    SZ_HD void skip_stray_opening() {
        while (at < end) {
            const u32 length = text[at] == '{' ? 1 : quote_length();
            const u32 after = skip_loose_blanks(text, at + length, end);
            if (length == 0 || after >= end || text[after] != '{') return;
            at = after;
        }
    }

    SZ_HD_CALL bool skip_stray_marks() {
        while (at < end) {
            const u32 length = text[at] == '}' ? 1 : quote_length();
            if (length == 0) return true;
            const u32 after = skip_loose_blanks(text, at + length, end);
            if (after < end && text[after] == '{') return true;
            at = after;
            if (!skip_blank()) return false;
        }
        return true;
    }

    SZ_HD_CALL bool key() {
        if (quote_length() > 0) return string();
        const u32 begin = at;
        if (!is_letter(text[at]) && text[at] != '_') return stop(Fault::kUnexpected, at);
        while (at < end && (is_letter(text[at]) || is_digit(text[at]) || text[at] == '_' || text[at] == '-')) ++at;
        const Span name = {begin, at};
        at += quote_length();
        return push_string(name, false);
    }

    SZ_HD_CALL bool scalar() {
        if (quote_length() > 0) return string();
        const u8 mark = text[at];
        u32 begin = at;
        if (mark == '+' || mark == '-') ++begin;
        if (begin < end && (is_digit(text[begin]) || text[begin] == '.')) {
            const u32 stop_at = number_end(begin);
            if (stop_at > begin) return number(stop_at);
        }
        if (begin < end && is_letter(text[begin])) return word(begin);
        return stop(Fault::kUnexpected, at);
    }

    SZ_HD u32 digits(u32 from) const {
        while (from < end && is_digit(text[from])) ++from;
        return from;
    }

    // Behind `digits [. digits] | . digits` and an exponent; `from` itself if there is no digit.
    SZ_HD u32 number_end(u32 from) const {
        u32 stop_at = digits(from);
        const bool whole = stop_at > from;
        if (stop_at < end && text[stop_at] == '.') {
            const u32 behind = digits(stop_at + 1);
            if (!whole && behind == stop_at + 1) return from;
            stop_at = behind;
        }
        if (stop_at < end && ascii_lower(text[stop_at]) == 'e') {
            u32 power = stop_at + 1;
            if (power < end && (text[power] == '+' || text[power] == '-')) ++power;
            if (power < end && is_digit(text[power])) stop_at = digits(power);
        }
        return stop_at;
    }

    // The characters that make what stands before them no number and no word; others beyond ASCII do so too, but those
    // are no separator either, and what comes after such a fault is the same.
    SZ_HD bool goes_on() const {
        if (at >= end) return false;
        const u8 c = text[at];
        return is_letter(c) || is_digit(c) || c == '_' || c == '.' || c == '%';
    }

    SZ_HD bool number(u32 stop_at) {
        const u32 begin = at;
        at = stop_at;
        if (stop_at - begin > kMaxNumberChars || goes_on()) return stop(Fault::kBadNumber, begin);
        return push_number(read_decimal(text, begin, stop_at));
    }

    template <u32 N>
    SZ_HD bool is_word(Span name, const char (&spelling)[N]) const {
        if (name.end - name.begin != N - 1) return false;
        for (u32 i = 0; i < N - 1; ++i) {
            if (ascii_lower(text[name.begin + i]) != u8(spelling[i])) return false;
        }
        return true;
    }

    SZ_HD bool word(u32 letters) {
        const u32 begin = at;
        Span name = {letters, letters};
        while (name.end < end && is_letter(text[name.end])) ++name.end;
        const bool is_signed = letters != begin;
        const bool nan = is_word(name, "nan"), infinite = is_word(name, "inf") || is_word(name, "infinity");
        const bool boolean = !is_signed && (is_word(name, "true") || is_word(name, "false"));
        const bool null = !is_signed && (is_word(name, "null") || is_word(name, "none"));
        if (!nan && !infinite && !boolean && !null) return stop(Fault::kUnexpected, begin);
        at = name.end;
        if (goes_on()) return stop(Fault::kUnexpected, at);
        if (boolean || null) return push(boolean ? Kind::kBoolean : Kind::kNull);
        return push_number(nan ? double(NAN) : text[begin] == '-' ? -HUGE_VAL : HUGE_VAL);
    }

    SZ_HD_CALL bool string() {
        const u32 length = quote_length();
        const u8 quote = text[at + length - 1];
        const u32 begin = at + length;
        u32 scan = begin;
        bool escaped = false;
        while (true) {
            while (scan < end && text[scan] != quote && text[scan] != '\\') ++scan;
            if (scan >= end) return stop(Fault::kEnded, end);
            const bool plain = text[scan] == quote;
            const bool closing = length == 1 ? plain : !plain && scan + 1 < end && text[scan + 1] == quote;
            if (closing && ends_string(scan + length)) break;
            if (plain) {
                ++scan;
                continue;
            }
            escaped = true;
            if (scan + 1 >= end) return stop(Fault::kEnded, end);
            if (text[scan + 1] != 'u') {
                scan += 2;  // the rest of a longer character stands for itself
            } else if (hex_unit(text, scan + 2, end) >= 0) {
                scan += 6;
            } else {
                if (hex_fault(scan + 2) == Fault::kEnded) return stop(Fault::kEnded, scan + 2);
                scan += 2;
            }
        }
        at = scan + length;
        return push_string({begin, scan}, escaped);
    }

    SZ_HD bool ends_string(u32 from) const {
        from = skip_loose_blanks(text, from, end);
        if (from >= end) return true;
        const u8 mark = text[from], next = from + 1 < end ? text[from + 1] : 0;
        switch (mark) {
            case ',': case ':': case '}': case ']': case ')': case '#': return true;
            case '/': return next == '/' || next == '*';
            case '\\': return next == 'n' || next == 'r' || next == 't';
            default: return false;
        }
    }
};

}  // namespace segzero
