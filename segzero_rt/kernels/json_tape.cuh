// JSON values as a tape: one node per value and per key, in the order of the text, in memory that the caller gives.
//
// A container says where the node after it stands, so that a walk can step over it. Strings stay where they are in the
// reply and are unescaped while they are compared: no answer needs more of them than a key or a quoted number.
#pragma once

#include "decimal.cuh"
#include "text.cuh"

namespace segzero {

constexpr u32 kMaxDepth = 64;  // json_reader.MAX_DEPTH

enum class Fault : i32 {  // json_reader.JsonFault, in its order
    kNone = 0,
    kEnded,
    kUnexpected,
    kBadNumber,
    kBadString,
    kTooDeep,
    kTrailing,
    kTapeFull,  // not a fault of the text: read it again with a longer tape
};

enum class Kind : u8 { kNull, kBoolean, kNumber, kString, kArray, kObject };

struct Node {
    Kind kind;
    u8 lenient;   // of a string: 1 if its escapes are the tolerant reader's
    u8 escaped;   // of a string: 1 if a backslash stands in it
    u32 next;     // of a container: the node after everything in it
    union {
        double number;
        Span span;  // of a string, without its quotes
        u32 size;   // of an array, its elements; of an object, its members, each a string node and a value
    };
};

struct Tape {
    Node* nodes;
    u32 capacity;
    u32 size;

    SZ_HD Node* push(Kind kind) {
        if (size >= capacity) return nullptr;
        Node* node = nodes + size++;
        node->kind = kind;
        node->next = size;
        return node;
    }
};

SZ_HD inline bool is_container(Kind kind) { return kind >= Kind::kArray; }

SZ_HD inline int hex_digit(u8 c) {
    if (is_digit(c)) return c - '0';
    c = ascii_lower(c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// Four hexadecimal digits at `at`, or -1.
SZ_HD inline i32 hex_unit(const u8* text, u32 at, u32 end) {
    if (end < at || end - at < 4) return -1;
    i32 unit = 0;
    for (u32 i = 0; i < 4; ++i) {
        const int digit = hex_digit(text[at + i]);
        if (digit < 0) return -1;
        unit = 16 * unit + digit;
    }
    return unit;
}

// The character that a one-letter escape stands for, 0 for none.
SZ_HD inline u8 short_escape(u8 mark) {
    switch (mark) {
        case '"': case '\\': case '/': return mark;
        case 'b': return '\b';
        case 'f': return '\f';
        case 'n': return '\n';
        case 'r': return '\r';
        case 't': return '\t';
        default: return 0;
    }
}

// Where the characters of a string node are read, one by one, escapes resolved.
struct StringCursor {
    const u8* text;
    u32 at;
    u32 end;

    SZ_HD StringCursor(const u8* reply, const Node& node) : text(reply), at(node.span.begin), end(node.span.end) {}

    SZ_HD bool done() const { return at >= end; }

    SZ_HD u32 next() {
        if (text[at] != '\\' || at + 1 >= end) return next_character(text, at, end);
        const u8 mark = text[at + 1];
        if (short_escape(mark) != 0) {
            at += 2;
            return short_escape(mark);
        }
        const i32 unit = mark == 'u' ? hex_unit(text, at + 2, end) : -1;
        if (unit < 0) {  // the tolerant reader's: any other character for itself
            ++at;
            return next_character(text, at, end);
        }
        at += 6;
        if (unit >= 0xD800 && unit <= 0xDBFF && starts_with(text, at, end, "\\u")) {
            const i32 low = hex_unit(text, at + 2, end);
            if (low >= 0xDC00 && low <= 0xDFFF) {
                at += 6;
                return 0x10000u + (u32(unit - 0xD800) << 10) + u32(low - 0xDC00);
            }
        }
        return u32(unit);
    }
};

// Whether two strings are the same after unescaping.
SZ_HD_CALL inline bool same_string(const u8* text, const Node& one, const Node& other) {
    if (!one.escaped && !other.escaped) {
        const u32 length = one.span.end - one.span.begin;
        if (other.span.end - other.span.begin != length) return false;
        for (u32 i = 0; i < length; ++i) {
            if (text[one.span.begin + i] != text[other.span.begin + i]) return false;
        }
        return true;
    }
    StringCursor left(text, one), right(text, other);
    while (!left.done() && !right.done()) {
        if (left.next() != right.next()) return false;
    }
    return left.done() && right.done();
}

// Whether a string is `word`, which is ASCII.
SZ_HD_CALL inline bool string_is(const u8* text, const Node& node, const char* word, u32 length) {
    StringCursor cursor(text, node);
    for (u32 i = 0; i < length; ++i) {
        if (cursor.done() || cursor.next() != u32(u8(word[i]))) return false;
    }
    return cursor.done();
}

// What both readers share: where they are, and the first fault.
struct Scan {
    const u8* text;
    u32 at;
    u32 end;
    Tape* tape;
    Fault fault = Fault::kNone;
    u32 stopped = 0;  // beside a fault: where it was met

    SZ_HD Scan(const u8* reply, u32 begin, u32 stop, Tape* memory) : text(reply), at(begin), end(stop), tape(memory) {}

    SZ_HD bool stop(Fault what, u32 where) {
        fault = what;
        stopped = where;
        return false;
    }
    SZ_HD bool ended() { return at < end ? false : !stop(Fault::kEnded, end); }
    SZ_HD bool push(Kind kind) { return tape->push(kind) != nullptr || stop(Fault::kTapeFull, at); }
    SZ_HD bool push_number(double value) {
        if (!push(Kind::kNumber)) return false;
        tape->nodes[tape->size - 1].number = value;
        return true;
    }
    SZ_HD bool push_string(Span span, bool escaped) {
        if (!push(Kind::kString)) return false;
        Node& node = tape->nodes[tape->size - 1];
        node.escaped = escaped;
        node.span = span;
        return true;
    }
    // The fault of `\u` without four hexadecimal digits at `where`.
    SZ_HD Fault hex_fault(u32 where) const {
        return has_characters(text, where, end, 4) ? Fault::kBadString : Fault::kEnded;
    }
};

}  // namespace segzero
