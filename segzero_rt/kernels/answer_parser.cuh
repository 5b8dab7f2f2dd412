// One reply, read by the rules of `answer_parser.parse_answer`: which text is the answer, what it says, what was thought.
#pragma once

#include "answer_objects.cuh"
#include "json_strict.cuh"
#include "json_tolerant.cuh"
#include "plain_answer.cuh"

namespace segzero {

constexpr u32 kMaxAnswersTried = 8;  // answer_parser.MAX_ANSWERS_TRIED
constexpr u32 kMaxValues = 256;      // answer_parser.MAX_VALUES

enum class Mode : i32 { kRfc8259 = 0, kVisionReasoner, kSegZero, kTolerant };  // answer_parser.MODES, in its order

enum class Status : i32 {  // answer.AnswerStatus as far as a text can decide it, and one code of the parser's own
    kOk = 0,
    kNoneFound,
    kTruncated,
    kMalformed,
    kNoRoom,  // nothing is said about the reply: parse it again with a longer tape and more prompts
};

struct Parsed {
    Status status;
    Span thinking;
    u32 num_objects;  // objects named, those outside the picture and beyond `kMaxObjects` included
    u32 num_prompts;
    const Prompt* prompts;
};

class ReplyParser {
  public:
    // Room for prompts in two places: one group of values is kept while the next is read. kMaxObjects is always enough.
    SZ_HD ReplyParser(const u8* text, u32 length, bool finished, Mode mode, const Rules& rules, const Sizes& sizes,
                      Tape tape, Prompt* prompts, Prompt* more_prompts, u32 room = kMaxObjects)
        : text_(text), length_(length), finished_(finished), mode_(mode), rules_(rules), scene_(rules, sizes), tape_(tape) {
        first_.scene = second_.scene = &scene_;
        first_.prompts = prompts;
        second_.prompts = more_prompts;
        first_.capacity = second_.capacity = room;
    }

    SZ_HD Parsed parse() {
        tags_.find(text_, length_);
        return parse_with_tags();
    }

    // The same where others have found the tags.
    SZ_HD Parsed parse(const FoundTags& tags) {
        tags_.text = text_;
        tags_.length = length_;
        tags_.found = tags;
        return parse_with_tags();
    }

  private:
    SZ_HD Parsed parse_with_tags() {
        u32 start = 0;
        Objects* found = find_answer(start);
        if (tape_full_ || (found != nullptr && found->full)) return {Status::kNoRoom, {0, 0}, 0, 0, nullptr};
        if (found == nullptr) start = default_start();
        Parsed parsed = {Status::kMalformed, thinking(start), 0, 0, nullptr};
        if (found != nullptr) {
            parsed.num_objects = found->count;
            parsed.num_prompts = found->num_prompts;
            parsed.prompts = found->prompts;
        }
        if (parsed.num_prompts > 0) {
            parsed.status = Status::kOk;
        } else if (found != nullptr && found->count == 0) {
            parsed.status = Status::kNoneFound;
        } else if (!finished_) {
            parsed.status = Status::kTruncated;
        }
        return parsed;
    }

    const u8* text_;
    u32 length_;
    bool finished_;
    Mode mode_;
    const Rules& rules_;
    Scene scene_;
    Tape tape_;
    Tags tags_;
    Objects first_, second_;
    bool tape_full_ = false;

    // Tags that may open the answer, in a ring of the last `kMaxAnswersTried`; `count` goes on beyond.
    struct Openings {
        Tag ring[kMaxAnswersTried];
        u32 count = 0;
        SZ_HD void add(const Tag& tag) { ring[count++ % kMaxAnswersTried] = tag; }
        SZ_HD u32 size() const { return count < kMaxAnswersTried ? count : kMaxAnswersTried; }
        SZ_HD const Tag& from_last(u32 index) const { return ring[(count - 1 - index) % kMaxAnswersTried]; }
    };

    SZ_HD_CALL Objects* find_answer(u32& start) {
        if (mode_ == Mode::kVisionReasoner) return vision_reasoner_answer(start);
        if (mode_ == Mode::kSegZero) return seg_zero_answer(start);
        if (tags_.usual()) {  // no other answer to choose from
            start = tags_.found.kept[2].begin;
            Objects* found = read_answer(tags_.found.kept[2].end, true);
            return found != nullptr && !is_echo(*found, start) ? found : nullptr;
        }
        if (tags_.found.count == 0) {
            Objects* found = finished_ ? read_answer(0, false) : nullptr;
            return found != nullptr && !is_echo(*found, 0) ? found : nullptr;
        }
        Openings openings;
        bool bare_allowed = false;
        u32 bare = 0;
        scan_tags(openings, bare_allowed, bare);
        for (u32 i = 0; i < openings.size(); ++i) {
            const Tag& tag = openings.from_last(i);
            Objects* found = read_answer(tag.end, true);
            if (tape_full_) return nullptr;
            if (found != nullptr && !is_echo(*found, tag.begin)) {
                start = tag.begin;
                return found;
            }
        }
        if (!finished_ || openings.count > 0 || !bare_allowed) return nullptr;
        start = bare;
        Objects* found = read_answer(bare, false);
        return found != nullptr && !is_echo(*found, bare) ? found : nullptr;
    }

    // One pass over the tags, `answer_tags.answer_openings` and where an answer without tags begins.
    SZ_HD_CALL void scan_tags(Openings& openings, bool& bare_allowed, u32& bare) const {
        // Openings since the last think tag share their fate: it hangs on that tag and on the next think tag.
        Openings waiting;
        bool thought = false, in_think = false;
        bare_allowed = true;
        u32 index = 0;
        for (Tag tag = tags_.first(); tag.end != 0; tag = tags_.get(++index, tag)) {
            if (tag.is_think) {
                // Before a closing tag, an `<answer>` counts only where the thinking was closed before it too.
                if (!tag.is_close || (thought && !in_think)) settle(waiting, openings);
                waiting.count = 0;
                thought = true;
                in_think = !tag.is_close;
                bare_allowed = tag.is_close;
                bare = tag.end;
            } else if (!tag.is_close) {
                waiting.add(tag);
            }
        }
        if (finished_ || !in_think) settle(waiting, openings);
    }

    SZ_HD static void settle(const Openings& waiting, Openings& openings) {
        for (u32 i = waiting.size(); i-- > 0;) openings.add(waiting.from_last(i));
    }

    SZ_HD u32 default_start() const {
        u32 start = length_;
        u32 index = 0;
        for (Tag tag = tags_.first(); tag.end != 0; tag = tags_.get(++index, tag)) {
            if (!tag.is_think && !tag.is_close) start = tag.begin;
        }
        return start;
    }

    // `answer_tags.thinking_span`.
    SZ_HD_CALL Span thinking(u32 answer_start) const {
        if (tags_.found.count == 0 && answer_start == 0) return {0, 0};
        if (tags_.usual() && answer_start == tags_.found.kept[2].begin) {
            const Span between = strip(text_, {tags_.found.kept[0].end, tags_.found.kept[1].begin});
            if (between.begin < between.end) return between;
        }
        u32 begin = 0, opening = 0, closing = 0;
        bool opened = false, closed = false;
        u32 index = 0;
        Tag tag = tags_.first();
        for (; tag.end != 0 && tag.begin < answer_start; tag = tags_.get(++index, tag)) {
            if (!tag.is_think) {
                if (tag.is_close) {
                    begin = tag.end;
                    opened = closed = false;
                }
            } else if (tag.is_close) {
                closing = tag.begin;
                closed = true;
            } else if (!opened) {
                opening = tag.end;
                opened = true;
                closed = false;
            }
        }
        const Span inside = strip(text_, {opened ? opening : begin, closed ? closing : answer_start});
        if (inside.begin < inside.end) return inside;
        for (; tag.end != 0; tag = tags_.get(++index, tag)) {
            if (tag.begin <= answer_start || !tag.is_think || tag.is_close) continue;
            const Tag behind = tags_.get(index + 1, tag);
            const Span after = strip(text_, {tag.end, behind.end != 0 ? behind.begin : length_});
            return after.begin < after.end ? after : Span{0, 0};
        }
        return {0, 0};
    }

    // Whether the answer is the prompt's example come back.
    SZ_HD_CALL bool is_echo(const Objects& objects, u32 start) const {
        if (objects.count == 0) return false;
        return objects.is_example(false) || (objects.is_example(true) && repeats_prompt(start));
    }

    // `thinking process here\s{0,8}</think>\s{0,8}$` just before `start`; `$` also stands before a last line feed.
    SZ_HD bool repeats_prompt(u32 start) const {
        u32 at = before_blanks(start, start > 0 && text_[start - 1] == '\n' ? 9 : 8);
        if (!ends_with(at, "</think>")) return false;
        at = before_blanks(at - 8, 8);
        return ends_with(at, "thinking process here");
    }

    SZ_HD u32 before_blanks(u32 at, u32 most) const {
        for (; most > 0; --most) {
            const u32 length = blank_length_before(text_, 0, at);
            if (length == 0) break;
            at -= length;
        }
        return at;
    }

    template <u32 N>
    SZ_HD bool ends_with(u32 at, const char (&word)[N]) const {
        return at >= N - 1 && starts_with(text_, at - (N - 1), at, word);
    }

    SZ_HD Objects* fresh(Objects& objects) const {
        objects.start();
        return &objects;
    }

    // Reads one strict document; true if the tape holds it.
    SZ_HD_CALL bool document(u32 begin, u32 end, bool python) {
        tape_.size = 0;
        StrictReader reader(text_, begin, end, &tape_, python);
        const bool read = reader.document();
        tape_full_ = reader.fault == Fault::kTapeFull;
        return read;
    }

    SZ_HD Objects* vision_reasoner_answer(u32& start) {
        const u32 opening = find_word(text_, 0, length_, "<answer>");
        if (opening > length_) return nullptr;
        const u32 close = find_word(text_, opening + 8, length_, "</answer>");
        if (close > length_) return nullptr;
        const Span inside = strip(text_, {opening + 8, close});
        Objects* objects = fresh(first_);
        if (!document(inside.begin, inside.end, true)) return nullptr;
        const Interpreter read = {text_, tape_.nodes};
        start = opening;
        return read.vision_reasoner_objects(*objects) && !is_echo(*objects, start) ? objects : nullptr;
    }

    SZ_HD Objects* seg_zero_answer(u32& start) {
        u32 opening = find_byte(text_, 0, length_, '{');
        while (opening + 1 < length_ && text_[opening + 1] == '}') opening = find_byte(text_, opening + 1, length_, '{');
        const u32 close = find_byte(text_, opening, length_, '}');
        if (close >= length_) return seg_zero_none(start);
        Objects* objects = fresh(first_);
        if (!document(opening, close + 1, true)) return nullptr;
        const u32 answer = find_last_word(text_, opening, "<answer>");
        start = answer <= opening ? answer : opening;
        const Interpreter read = {text_, tape_.nodes};
        return read.seg_zero_objects(*objects) && !is_echo(*objects, start) ? objects : nullptr;
    }

    // The script knows no empty answer; here `{}`, `null` and `[]` in the tags are one.
    SZ_HD Objects* seg_zero_none(u32& start) {
        start = find_last_word(text_, length_, "<answer>");
        if (start > length_) return nullptr;
        const u32 close = find_word(text_, start, length_, "</answer>");
        if (close > length_) return nullptr;
        const Span inside = strip(text_, {start + 8, close});
        const u32 bytes = inside.end - inside.begin;
        const bool none = (bytes == 2 && starts_with(text_, inside.begin, inside.end, "{}")) ||
                          (bytes == 2 && starts_with(text_, inside.begin, inside.end, "[]")) ||
                          (bytes == 4 && starts_with(text_, inside.begin, inside.end, "null"));
        return none ? fresh(first_) : nullptr;
    }

    SZ_HD Objects* read_answer(u32 begin, bool tagged) {
        return mode_ == Mode::kRfc8259 ? canonical_answer(begin, tagged) : tolerant_answer(begin, tagged);
    }

    SZ_HD_CALL Objects* canonical_answer(u32 begin, bool tagged) {
        const Tag behind = tags_.from(begin);
        if (behind.end == 0 && tagged && !finished_) return nullptr;
        Objects* objects = fresh(first_);
        const Plain plain = PlainReader(text_, begin, length_, rules_, *objects).read(true);
        if (plain != Plain::kUnknown) return plain == Plain::kRead ? objects : nullptr;
        fresh(first_);
        if (!document(begin, behind.end == 0 ? length_ : behind.begin, false)) return nullptr;
        const Interpreter read = {text_, tape_.nodes};
        return read.canonical_objects(rules_, *objects) ? objects : nullptr;
    }

    // The last group of values between `begin` and the next tag; null if there is none or one is broken.
    SZ_HD_CALL Objects* tolerant_answer(u32 begin, bool tagged) {
        if (PlainReader(text_, begin, length_, rules_, *fresh(first_)).read(false) == Plain::kRead) return &first_;
        Objects *group = &first_, *other = &second_;
        bool any = false;
        u32 group_end = begin, at = begin;
        fresh(*group);
        for (u32 count = 0;; ++count) {
            at = next_mark(at);
            if (at >= length_ || text_[at] == '<') break;
            tape_.size = 0;
            TolerantReader reader(text_, at, length_, finished_, &tape_);
            const bool read = reader.value();
            if (reader.fault == Fault::kTapeFull) {
                tape_full_ = true;
                return nullptr;
            }
            if (!read && (reader.has_member || reader.fault == Fault::kTooDeep)) return nullptr;
            if (count >= kMaxValues) return nullptr;
            const u32 start = at;
            at = read ? reader.at : reader.stopped > start + 1 ? reader.stopped : start + 1;
            if (!read) continue;
            const bool joined = any && group->count > 0 && only_joints(group_end, start);
            Objects* target = joined ? group : fresh(*other);
            const u32 before = target->count;
            const Interpreter interpreter = {text_, tape_.nodes};
            if (!interpreter.tolerant_objects(rules_, *target)) continue;
            const bool empty = target->count == before;
            if (empty && any && group->count > 0) continue;
            if (empty && !tagged && (count > 0 || !stands_alone(begin, start, at))) continue;
            if (!joined) {
                other = group;
                group = target;
            }
            any = true;
            group_end = at;
        }
        return any || says_null(begin) ? group : nullptr;
    }

    // The next `[`, `{` or tag, or the end.
    SZ_HD u32 next_mark(u32 at) const {
        for (; at < length_; ++at) {
            const u8 c = text_[at];
            if (c == '[' || c == '{' || (c == '<' && read_tag(text_, at, length_).end != 0)) return at;
        }
        return length_;
    }

    // Whether only blanks, commas, semicolons and quotes stand between two values: then they are one list.
    SZ_HD bool only_joints(u32 at, u32 end) const {
        while (at < end) {
            const u8 c = text_[at];
            const u32 length = c == ',' || c == ';' || is_quote(c) ? 1 : blank_length(text_, at, end);
            if (length == 0) return false;
            at += length;
        }
        return true;
    }

    // Behind three back quotes and up to 16 letters and digits at `at`; `at` itself if there are none.
    SZ_HD u32 skip_fence(u32 at, u32 end) const {
        if (!starts_with(text_, at, end, "```")) return at;
        at += 3;
        for (u32 i = 0; i < 16 && at < end && (is_letter(text_[at]) || is_digit(text_[at])); ++i) ++at;
        return at;
    }

    SZ_HD bool only_fences(u32 at, u32 end) const {
        while (at < end) {
            const u32 length = text_[at] == ',' ? 1 : blank_length(text_, at, end);
            const u32 after = length > 0 ? at + length : skip_fence(at, end);
            if (after == at) return false;
            at = after;
        }
        return true;
    }

    SZ_HD bool stands_alone(u32 begin, u32 start, u32 end) const {
        const Tag behind = tags_.from(end);
        return only_fences(begin, start) && only_fences(end, behind.end == 0 ? length_ : behind.begin);
    }

    // Whether `null` or `None` is all that stands before the next tag, or the end of a reply that was not cut.
    SZ_HD bool says_null(u32 at) const {
        while (at < length_) {
            if (is_ascii_blank(text_[at])) {
                ++at;
                continue;
            }
            const u32 after = skip_fence(at, length_);
            if (after == at || after >= length_ || !is_ascii_blank(text_[after])) break;
            at = after;
        }
        const bool null = matches(at, "null"), none = matches(at, "none");
        if (!null && !none) return false;
        for (at += 4; at < length_ && (is_ascii_blank(text_[at]) || text_[at] == '`');) ++at;
        return at == length_ ? finished_ : read_tag(text_, at, length_).end != 0;
    }

    template <u32 N>
    SZ_HD bool matches(u32 at, const char (&word)[N]) const {  // in any case
        if (length_ - at < N - 1) return false;
        for (u32 i = 0; i < N - 1; ++i) {
            if (ascii_lower(text_[at + i]) != u8(word[i])) return false;
        }
        return true;
    }
};

}  // namespace segzero
