// The strict JSON reader, `json_reader.read_json`: RFC 8259, and the dialect of Python's `json.loads`.
//
// One forward scan with a stack of `kMaxDepth` open containers; faults and their places are the reference's.
#pragma once

#include "json_tape.cuh"

namespace segzero {

struct StrictReader : Scan {
    bool python;  // also NaN, Infinity, -Infinity, and numbers beyond a double's range

    SZ_HD StrictReader(const u8* reply, u32 begin, u32 stop, Tape* memory, bool python_dialect)
        : Scan(reply, begin, stop, memory), python(python_dialect) {}

    SZ_HD_CALL bool document() {
        skip_blank();
        if (!values()) return false;
        skip_blank();
        return at >= end || stop(Fault::kTrailing, at);
    }

    SZ_HD void skip_blank() {
        while (at < end && (text[at] == ' ' || text[at] == '\n' || text[at] == '\r' || text[at] == '\t')) ++at;
    }

    // One value with everything in it. `open` holds the tape's nodes of the containers around.
    SZ_HD bool values() {
        u32 open[kMaxDepth];
        u32 depth = 0;
        while (true) {
            if (ended()) return false;
            const u8 mark = text[at];
            if (mark == '{' || mark == '[') {
                if (depth >= kMaxDepth) return stop(Fault::kTooDeep, at);
                open[depth] = tape->size;
                if (!push(mark == '{' ? Kind::kObject : Kind::kArray)) return false;
                tape->nodes[open[depth]].size = 0;
                ++depth;
                ++at;
                skip_blank();
                if (ended()) return false;
                if (text[at] != (mark == '{' ? '}' : ']')) {
                    if (mark == '{' && !key()) return false;
                    continue;
                }
                ++at;
                tape->nodes[open[--depth]].next = tape->size;
            } else if (!scalar(mark)) {
                return false;
            }
            while (true) {  // a value has just ended
                if (depth == 0) return true;
                Node& around = tape->nodes[open[depth - 1]];
                const bool object = around.kind == Kind::kObject;
                ++around.size;
                skip_blank();
                if (ended()) return false;
                if (text[at] == (object ? '}' : ']')) {
                    ++at;
                    around.next = tape->size;
                    --depth;
                    continue;
                }
                if (text[at] != ',') return stop(Fault::kUnexpected, at);
                ++at;
                skip_blank();
                if (object && !key()) return false;
                break;
            }
        }
    }

    SZ_HD bool key() {
        if (ended()) return false;
        if (text[at] != '"') return stop(Fault::kUnexpected, at);
        if (!string()) return false;
        skip_blank();
        if (ended()) return false;
        if (text[at] != ':') return stop(Fault::kUnexpected, at);
        ++at;
        skip_blank();
        return true;
    }

    template <u32 N>
    SZ_HD bool word(const char (&spelling)[N]) {
        if (!starts_with(text, at, end, spelling)) return false;
        at += N - 1;
        return true;
    }

    SZ_HD bool scalar(u8 mark) {
        if (mark == '"') return string();
        if (!is_digit(mark)) {
            if (word("true") || word("false")) return push(Kind::kBoolean);
            if (word("null")) return push(Kind::kNull);
            if (python) {
                if (word("NaN")) return push_number(double(NAN));
                if (word("Infinity")) return push_number(HUGE_VAL);
                if (word("-Infinity")) return push_number(-HUGE_VAL);
            }
        }
        return number();
    }

    SZ_HD u32 digits(u32 from) const {
        while (from < end && is_digit(text[from])) ++from;
        return from;
    }

    SZ_HD_CALL bool number() {
        const u32 whole = text[at] == '-' ? at + 1 : at;
        if (whole >= end || !is_digit(text[whole])) {
            return stop(text[at] == '-' ? Fault::kBadNumber : Fault::kUnexpected, at);
        }
        u32 stop_at = text[whole] == '0' ? whole + 1 : digits(whole);
        if (stop_at + 1 < end && text[stop_at] == '.' && is_digit(text[stop_at + 1])) stop_at = digits(stop_at + 1);
        if (stop_at < end && ascii_lower(text[stop_at]) == 'e') {
            u32 power = stop_at + 1;
            if (power < end && (text[power] == '+' || text[power] == '-')) ++power;
            if (power < end && is_digit(text[power])) stop_at = digits(power);
        }
        if (stop_at - at > kMaxNumberChars) return stop(Fault::kBadNumber, at);
        const double value = read_decimal(text, at, stop_at);
        if (!python && !is_finite(value)) return stop(Fault::kBadNumber, at);
        at = stop_at;
        return push_number(value);
    }

    // Behind the characters that stand for themselves. RFC 8259 wants UTF-8, which holds no surrogate and no stray byte.
    SZ_HD u32 plain_characters(u32 scan) const {
        while (scan < end && text[scan] != '"' && text[scan] != '\\' && text[scan] >= 0x20) {
            if (text[scan] < 0x80 || python) {
                ++scan;
                continue;
            }
            u32 after = scan;
            const u32 character = next_character(text, after, end);
            if (character >= 0xD800 && character <= 0xDFFF) return scan;
            scan = after;
        }
        return scan;
    }

    SZ_HD_CALL bool string() {
        u32 scan = at + 1;
        const u32 begin = scan;
        bool escaped = false;
        while (true) {
            scan = plain_characters(scan);
            if (scan >= end) return stop(Fault::kEnded, end);
            if (text[scan] == '"') break;
            if (text[scan] != '\\') return stop(Fault::kBadString, scan);
            escaped = true;
            if (scan + 1 >= end) return stop(Fault::kEnded, end);
            const u8 mark = text[scan + 1];
            if (short_escape(mark) != 0) {
                scan += 2;
            } else if (mark != 'u') {
                return stop(Fault::kBadString, scan);
            } else if (hex_unit(text, scan + 2, end) < 0) {
                return stop(hex_fault(scan + 2), scan + 2);
            } else {
                scan += 6;
            }
        }
        at = scan + 1;
        return push_string({begin, scan}, escaped);
    }
};

}  // namespace segzero
