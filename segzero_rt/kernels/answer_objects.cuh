// From values on the tape to prompts: the reading rules of `answer_objects`, the geometry of `answer_geometry`.
//
// Objects go straight into the list of prompts, so that nothing has to be kept of them but a bound number of numbers.
#pragma once

#include "json_tape.cuh"

namespace segzero {

constexpr u32 kMaxObjects = 120;  // answer_parser.MAX_OBJECTS
constexpr u32 kMaxPoints = 8;     // answer_geometry.MAX_POINTS
constexpr u32 kMaxKeys = 32;      // answer_objects.MAX_KEYS
constexpr u32 kMaxKeyBytes = 32;
constexpr u32 kMaxPointKeys = 4;
constexpr u32 kMaxExamples = 4, kMaxExampleObjects = 4, kMaxExamplePoints = 4;

// What an answer format says, filled in by the host (parse_prompts.py has the same fields).
struct Rules {
    i32 multiple;
    i32 half_up;    // Rounding.HALF_UP, else TRUNCATE_THEN_HALF_EVEN
    i32 own_names;  // whether the keys are among BOX_NAMES and POINT_NAMES, which the tolerant rules know
    i32 unused;
    u32 box_key_bytes;
    u32 num_point_keys;
    u32 point_key_bytes[kMaxPointKeys];
    char box_key[kMaxKeyBytes];
    char point_keys[kMaxPointKeys][kMaxKeyBytes];
    u32 num_examples;
    struct Example {
        u32 num_objects;
        u32 num_points[kMaxExampleObjects];
        double boxes[kMaxExampleObjects][4];
        double points[kMaxExampleObjects][kMaxExamplePoints][2];
    } examples[kMaxExamples];
};

struct Sizes {
    i32 input_height, input_width, source_height, source_width;
};

// What is the same for all objects of a reply.
struct Scene {
    const Rules* rules;
    i32 input[2], source[2];  // width and height
    double factor[2];         // from a coordinate to the source's

    SZ_HD Scene(const Rules& answer_rules, const Sizes& sizes)
        : rules(&answer_rules),
          input{sizes.input_width, sizes.input_height},
          source{sizes.source_width, sizes.source_height} {
        for (u32 axis = 0; axis < 2; ++axis) factor[axis] = double(source[axis]) / double(input[axis]);
    }
};

struct Prompt {
    i32 box_xyxy[4];
    i32 num_points;
    i32 points_xy[kMaxPoints][2];
};

// The objects of an answer: how many there are, the prompts of the first `kMaxObjects`, and whether they are an example.
struct Objects {
    const Scene* scene;
    Prompt* prompts;
    u32 capacity;  // of `prompts`
    u32 num_prompts;
    u32 count;
    bool full;  // a prompt found no room
    u32 equal;   // bit e: equal to example e, object by object so far
    u32 within;  // bit e: every object is one of example e
    // Of the object that is being added:
    double low[2], high[2];
    bool kept, listed;
    u32 num_points;
    u32 like;  // bit `like_bit`: equal so far to an object of an example

    SZ_HD void start() {
        num_prompts = count = 0;
        full = false;
        equal = within = (1u << scene->rules->num_examples) - 1;
    }

    SZ_HD static u32 like_bit(u32 example, u32 object) { return 1u << (kMaxExampleObjects * example + object); }

    SZ_HD i32 to_source(double value, double factor) const {
        return i32(scene->rules->half_up != 0 ? value * factor + 0.5 : rint(trunc(value) * factor));
    }

    SZ_HD static double clipped(double value, i32 size) {
        return value < 0.0 ? 0.0 : value > double(size) ? double(size) : value;
    }

    SZ_HD_CALL void begin(const double box[4]) {
        listed = count < kMaxObjects;
        kept = listed;
        for (u32 i = 0; i < 4; ++i) kept = kept && is_finite(box[i]);
        num_points = 0;
        like = 0;
        const Rules& rules = *scene->rules;
        for (u32 e = 0; e < rules.num_examples; ++e) {
            for (u32 o = 0; o < rules.examples[e].num_objects; ++o) {
                const double* other = rules.examples[e].boxes[o];
                if (box[0] == other[0] && box[1] == other[1] && box[2] == other[2] && box[3] == other[3]) {
                    like |= like_bit(e, o);
                }
            }
        }
        if (!kept) return;
        const i32 *input = scene->input, *source = scene->source;
        for (u32 axis = 0; axis < 2; ++axis) {
            const double one = box[axis], other = box[axis + 2];
            low[axis] = clipped(one <= other ? one : other, input[axis]);
            high[axis] = clipped(one <= other ? other : one, input[axis]);
            if (high[axis] - low[axis] < 1.0) kept = false;
        }
        if (kept && num_prompts >= capacity) {
            full = true;
            kept = false;
        }
        if (!kept) return;
        Prompt& prompt = prompts[num_prompts];
        prompt.num_points = 0;
        for (u32 axis = 0; axis < 2; ++axis) {
            const double factor = scene->factor[axis];
            i32 near = to_source(low[axis], factor), far = to_source(high[axis], factor);
            if (near > source[axis] - 1) near = source[axis] - 1;
            if (far < near + 1) far = near + 1;
            prompt.box_xyxy[axis] = near;
            prompt.box_xyxy[axis + 2] = far > source[axis] ? source[axis] : far;
        }
    }

    SZ_HD_CALL void add_point(double x, double y) {
        for (u32 e = 0; like != 0 && e < scene->rules->num_examples; ++e) {
            const Rules::Example& example = scene->rules->examples[e];
            for (u32 o = 0; o < example.num_objects; ++o) {
                if (num_points >= example.num_points[o] || x != example.points[o][num_points][0] ||
                    y != example.points[o][num_points][1]) {
                    like &= ~like_bit(e, o);
                }
            }
        }
        ++num_points;
        if (!kept || !(low[0] <= x && x <= high[0] && low[1] <= y && y <= high[1])) return;
        Prompt& prompt = prompts[num_prompts];
        if (prompt.num_points >= i32(kMaxPoints)) return;
        i32* point = prompt.points_xy[prompt.num_points++];
        point[0] = to_source(x, scene->factor[0]);
        point[1] = to_source(y, scene->factor[1]);
        for (u32 axis = 0; axis < 2; ++axis) {
            if (point[axis] > scene->source[axis] - 1) point[axis] = scene->source[axis] - 1;
        }
    }

    SZ_HD_CALL void finish() {
        if (like == 0) equal = within = 0;
        for (u32 e = 0; like != 0 && e < scene->rules->num_examples; ++e) {
            const Rules::Example& example = scene->rules->examples[e];
            bool same = false, one_of_them = false;
            for (u32 o = 0; o < example.num_objects; ++o) {
                if ((like & like_bit(e, o)) == 0 || example.num_points[o] != num_points) continue;
                one_of_them = true;
                same = same || o == count;
            }
            if (!same) equal &= ~(1u << e);
            if (!one_of_them) within &= ~(1u << e);
        }
        if (kept) ++num_prompts;
        ++count;
    }

    // Whether the list is a whole example; with `any`, whether every object of it is one of an example's.
    SZ_HD bool is_example(bool any) const {
        if (any) return within != 0;
        for (u32 e = 0; equal != 0 && e < scene->rules->num_examples; ++e) {
            if ((equal >> e & 1) != 0 && count == scene->rules->examples[e].num_objects) return true;
        }
        return false;
    }
};

enum class Name { kOther, kBox, kPoint };

// Reads values on a tape as objects. Each `..._objects` returns false where the value is no answer.
struct Interpreter {
    const u8* text;
    const Node* nodes;

    SZ_HD u32 next(u32 node) const { return is_container(nodes[node].kind) ? nodes[node].next : node + 1; }

    // A coordinate, NaN for what is none; `quoted` takes `"12"` for 12.
    SZ_HD double coordinate(u32 at, bool quoted) const {
        const Node& node = nodes[at];
        if (node.kind == Kind::kNumber) return node.number;
        if (node.kind != Kind::kString || !quoted) return double(NAN);
        u8 token[40];  // at most a sign, 16 digits, a point and 16 digits
        u32 length = 0, spaces = 0;
        StringCursor cursor(text, node);
        while (!cursor.done()) {
            const u32 character = cursor.next();
            if (character == ' ') {
                ++spaces;
                continue;
            }
            if (character > 0x7F || (spaces > 0 && length > 0) || length >= sizeof(token)) return double(NAN);
            spaces = 0;
            token[length++] = u8(character);
        }
        return is_plain_number(token, length) ? read_decimal(token, 0, length) : double(NAN);
    }

    SZ_HD static bool is_plain_number(const u8* token, u32 length) {
        u32 at = length > 0 && (token[0] == '+' || token[0] == '-') ? 1 : 0;
        u32 whole = 0, behind = 0;
        for (; at < length && is_digit(token[at]); ++at) ++whole;
        if (at < length && token[at] == '.') {
            for (++at; at < length && is_digit(token[at]); ++at) ++behind;
        }
        return at == length && whole >= 1 && whole <= 16 && behind <= 16;
    }

    // The first `count` elements of a list as coordinates; with `exactly`, there must be no more.
    SZ_HD_CALL bool coordinates(u32 at, u32 count, bool exactly, bool quoted, double* numbers) const {
        const Node& node = nodes[at];
        if (node.kind != Kind::kArray || node.size < count || (exactly && node.size != count)) return false;
        u32 element = at + 1;
        for (u32 i = 0; i < count; ++i, element = next(element)) {
            numbers[i] = coordinate(element, quoted);
            if (numbers[i] != numbers[i]) return false;
        }
        return true;
    }

    // The value of the last member called `key`, 0 for none.
    SZ_HD u32 member(u32 object, const char* key, u32 length) const {
        u32 found = 0, at = object + 1;
        for (u32 i = 0; i < nodes[object].size; ++i) {
            if (string_is(text, nodes[at], key, length)) found = at + 1;
            at = next(at + 1);
        }
        return found;
    }

    // The value of the last member with the same key as that at `key`.
    SZ_HD u32 last_value(u32 object, u32 key) const {
        u32 found = key + 1, at = object + 1;
        for (u32 i = 0; i < nodes[object].size; ++i) {
            if (same_string(text, nodes[at], nodes[key])) found = at + 1;
            at = next(at + 1);
        }
        return found;
    }

    SZ_HD bool canonical_objects(const Rules& rules, Objects& objects) const {
        if (rules.multiple == 0) {
            const bool none = nodes[0].kind == Kind::kNull || (nodes[0].kind == Kind::kObject && nodes[0].size == 0);
            return none || canonical_object(0, rules, objects);
        }
        if (nodes[0].kind != Kind::kArray) return false;
        u32 at = 1;
        for (u32 i = 0; i < nodes[0].size; ++i, at = next(at)) {
            if (!canonical_object(at, rules, objects)) return false;
        }
        return true;
    }

    SZ_HD_CALL bool canonical_object(u32 at, const Rules& rules, Objects& objects) const {
        if (nodes[at].kind != Kind::kObject) return false;
        double box[4], points[kMaxPointKeys][2];
        u32 value = member(at, rules.box_key, rules.box_key_bytes);
        if (value == 0 || !coordinates(value, 4, true, false, box)) return false;
        for (u32 i = 0; i < rules.num_point_keys; ++i) {
            value = member(at, rules.point_keys[i], rules.point_key_bytes[i]);
            if (value == 0 || !coordinates(value, 2, true, false, points[i])) return false;
        }
        objects.begin(box);
        for (u32 i = 0; i < rules.num_point_keys; ++i) objects.add_point(points[i][0], points[i][1]);
        objects.finish();
        return true;
    }

    SZ_HD_CALL bool vision_reasoner_objects(Objects& objects) const {
        const Node& root = nodes[0];
        if (root.kind == Kind::kObject && root.size == 0) return true;
        if (root.kind == Kind::kString) return root.span.begin == root.span.end;
        if (root.kind != Kind::kArray) return false;
        u32 at = 1;
        for (u32 i = 0; i < root.size; ++i, at = next(at)) {
            double box[4], point[2];
            if (nodes[at].kind != Kind::kObject) return false;
            const u32 box_value = member(at, "bbox_2d", 7), point_value = member(at, "point_2d", 8);
            if (box_value == 0 || !coordinates(box_value, 4, false, false, box)) return false;
            if (point_value == 0 || !coordinates(point_value, 2, false, false, point)) return false;
            objects.begin(box);
            objects.add_point(point[0], point[1]);
            objects.finish();
        }
        return true;
    }

    template <u32 N>
    SZ_HD bool contains(const Node& key, const char (&word)[N]) const {  // in small letters
        for (StringCursor from(text, key); !from.done(); from.next()) {
            StringCursor cursor = from;
            u32 same = 0;
            while (same < N - 1 && !cursor.done()) {
                const u32 character = cursor.next();
                if (character > 0x7F || ascii_lower(u8(character)) != u8(word[same])) break;
                ++same;
            }
            if (same == N - 1) return true;
        }
        return false;
    }

    SZ_HD_CALL bool seg_zero_objects(Objects& objects) const {
        if (nodes[0].kind != Kind::kObject) return false;
        u32 box_key = 0, point_keys[2] = {0, 0}, at = 1;
        for (u32 i = 0; i < nodes[0].size; ++i, at = next(at + 1)) {
            const Node& key = nodes[at];
            if (box_key == 0 && contains(key, "bbox")) box_key = at;
            if (point_keys[1] == 0 && contains(key, "points")) {
                if (point_keys[0] == 0) {
                    point_keys[0] = at;
                } else if (!same_string(text, key, nodes[point_keys[0]])) {
                    point_keys[1] = at;
                }
            }
        }
        double box[4], points[2][2];
        if (box_key == 0 || point_keys[1] == 0) return false;
        if (!coordinates(last_value(0, box_key), 4, true, true, box)) return false;
        for (u32 i = 0; i < 2; ++i) {
            if (!coordinates(last_value(0, point_keys[i]), 2, false, true, points[i])) return false;
        }
        objects.begin(box);
        for (u32 i = 0; i < 2; ++i) objects.add_point(points[i][0], points[i][1]);
        objects.finish();
        return true;
    }

    // Whether the value may be an answer; `objects` is longer if it names any. Only `null`, `[]` and `{}` name none.
    SZ_HD bool tolerant_objects(const Rules& rules, Objects& objects) const {
        if (is_container(nodes[0].kind) && nodes[0].size == 0) return true;
        const u32 before = objects.count;
        // A wrapper's one inner value is walked in place; behind it the walk goes on behind the wrapper.
        u32 inner_end[kMaxDepth], outer_end[kMaxDepth];
        u32 depth = 0;
        u32 at = 0;
        const u32 end = next(0);
        while (true) {
            while (depth > 0 && at == inner_end[depth - 1]) at = outer_end[--depth];
            if (at >= end) break;
            const Node& node = nodes[at];
            if (node.kind == Kind::kArray) {
                ++at;
                continue;
            }
            const u32 behind = next(at);
            if (node.kind == Kind::kObject && !named_object(at, rules, objects)) {
                const u32 inner = only_inner_value(at);
                if (inner != 0) {
                    inner_end[depth] = next(inner);
                    outer_end[depth++] = behind;
                    at = inner;
                    continue;
                }
            }
            at = behind;
        }
        return objects.count > before;
    }

    // Whether the object has a box under any of its names, and what it says then.
    SZ_HD_CALL bool named_object(u32 object, const Rules& rules, Objects& objects) const {
        u32 box_key = 0, box_value = 0, own_value = 0;
        u32 keys[kMaxKeys], values[kMaxKeys], num_keys = 0;
        u32 at = object + 1;
        for (u32 i = 0; i < nodes[object].size; ++i, at = next(at + 1)) {
            const Name name = name_of(nodes[at]);
            if (name == Name::kPoint) {
                note_key(at, keys, values, num_keys);
            } else if (name == Name::kBox) {
                if (box_key == 0) box_key = at;
                if (same_string(text, nodes[at], nodes[box_key])) box_value = at + 1;
            }
            if (string_is(text, nodes[at], rules.box_key, rules.box_key_bytes)) own_value = at + 1;
        }
        if (box_key == 0) return false;
        double box[4], point[2];
        if (!box_numbers(own_value != 0 ? own_value : box_value, box)) return true;
        objects.begin(box);
        for (u32 i = 0; i < num_keys; ++i) {
            const u32 value = values[i];
            if (coordinates(value, 2, true, true, point)) {
                objects.add_point(point[0], point[1]);
            } else if (nodes[value].kind == Kind::kArray) {
                u32 entry = value + 1;
                for (u32 j = 0; j < nodes[value].size; ++j, entry = next(entry)) {
                    if (coordinates(entry, 2, true, true, point)) objects.add_point(point[0], point[1]);
                }
            }
        }
        objects.finish();
        return true;
    }

    SZ_HD bool box_numbers(u32 value, double box[4]) const {
        if (nodes[value].kind == Kind::kArray && nodes[value].size == 1) ++value;
        return coordinates(value, 4, true, true, box);
    }

    // Adds a key with its value, or gives a key that is there its later value. False where there is no more room.
    SZ_HD_CALL bool note_key(u32 key, u32* keys, u32* values, u32& count) const {
        for (u32 i = 0; i < count; ++i) {
            if (same_string(text, nodes[key], nodes[keys[i]])) {
                values[i] = key + 1;
                return true;
            }
        }
        if (count >= kMaxKeys) return false;
        keys[count] = key;
        values[count++] = key + 1;
        return true;
    }

    // The one list or object among an object's values, 0 if there is none, or several, or more than `kMaxKeys` keys.
    SZ_HD_CALL u32 only_inner_value(u32 object) const {
        u32 keys[kMaxKeys], values[kMaxKeys], num_keys = 0;
        u32 at = object + 1;
        for (u32 i = 0; i < nodes[object].size; ++i, at = next(at + 1)) {
            if (!note_key(at, keys, values, num_keys)) return 0;
        }
        u32 inner = 0;
        for (u32 i = 0; i < num_keys; ++i) {
            if (!is_container(nodes[values[i]].kind)) continue;
            if (inner != 0) return 0;
            inner = values[i];
        }
        return inner;
    }

    // BOX_NAMES and POINT_NAMES: keys in lower case without `_`, `-` and blanks, up to 32 characters long.
    SZ_HD_CALL Name name_of(const Node& key) const {
        char name[16];
        u32 length = 0, characters = 0;
        StringCursor cursor(text, key);
        while (!cursor.done()) {
            const u32 character = cursor.next();
            if (++characters > kMaxKeyBytes || character > 0x7F) return Name::kOther;
            if (character == '_' || character == '-' || character == ' ') continue;
            if (length >= sizeof(name)) return Name::kOther;
            name[length++] = char(ascii_lower(u8(character)));
        }
        return length > 0 && name[0] == 'p' ? point_name(name, length) : box_name(name, length);
    }

    template <u32 N>
    SZ_HD static bool equals(const char* name, u32 length, const char (&word)[N]) {
        return length == N - 1 && starts_with(reinterpret_cast<const u8*>(name), 0, length, word);
    }

    SZ_HD static Name box_name(const char* name, u32 length) {
        const bool known = equals(name, length, "bbox2d") || equals(name, length, "bbox") ||
                           equals(name, length, "box") || equals(name, length, "box2d") ||
                           equals(name, length, "bboxxyxy") || equals(name, length, "boxxyxy") ||
                           equals(name, length, "xyxy") || equals(name, length, "boundingbox") ||
                           equals(name, length, "boundingbox2d");
        return known ? Name::kBox : Name::kOther;
    }

    SZ_HD static Name point_name(const char* name, u32 length) {
        if (!starts_with(reinterpret_cast<const u8*>(name), 0, length, "point")) return Name::kOther;
        u32 at = length > 5 && name[5] == 's' ? 6 : 5;
        if (length - at >= 2 && name[at] == '2' && name[at + 1] == 'd') {
            at += 2;
        } else if (equals(name + at, length - at, "xy")) {
            return Name::kPoint;
        }
        const bool numbered = length == at + 1 && name[at] >= '1' && name[at] <= '9';
        return length == at || numbered ? Name::kPoint : Name::kOther;
    }
};

}  // namespace segzero
