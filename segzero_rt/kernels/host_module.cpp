// The host's build as a Python module: one reply to an `Answer` without a Python object between, a batch to arrays.
// Masks and run lengths are called through ctypes, where a call costs nothing beside the work.
//
// An `Answer` and its `Prompt`s are made by their types' own allocator and their slots' descriptors. Their
// `__post_init__` would only check what the parser has just decided; a test makes each again by its constructor.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <vector>

#include "parse_prompts.cu"
#include "postprocess_masks.cu"
#include "preprocess.cu"
#include "sample_token.cu"

namespace segzero {
namespace {

constexpr i32 kMaxSide = 1 << 30;            // parse_prompts.MAX_SIDE
constexpr i64 kMaxReplyBytes = 0x7FFFFFFF;   // parse_prompts.MAX_REPLY_BYTES
constexpr u32 kNumModes = 4, kNumStatuses = 4, kKnownFormats = 8;

// A type whose instances are filled slot by slot.
template <u32 N>
struct SlotType {
    PyTypeObject* type = nullptr;
    PyObject* slots[N] = {};

    bool bind(PyObject* given, const char* const (&names)[N]) {
        if (!PyType_Check(given)) {
            PyErr_SetString(PyExc_TypeError, "expected a type");
            return false;
        }
        for (u32 i = 0; i < N; ++i) {
            PyObject* slot = PyObject_GetAttrString(given, names[i]);
            if (slot == nullptr) return false;
            if (Py_TYPE(slot)->tp_descr_set == nullptr) {
                PyErr_Format(PyExc_TypeError, "expected a slot called %s", names[i]);
                Py_DECREF(slot);
                return false;
            }
            Py_XSETREF(slots[i], slot);
        }
        Py_INCREF(given);
        Py_XSETREF(type, reinterpret_cast<PyTypeObject*>(given));
        return true;
    }

    // An instance with these values, whose references it takes; null if one of them is.
    PyObject* make(PyObject* const (&values)[N]) const {
        bool whole = true;
        for (PyObject* value : values) whole = whole && value != nullptr;
        PyObject* made = whole ? type->tp_alloc(type, 0) : nullptr;
        for (u32 i = 0; i < N; ++i) {
            if (made != nullptr && Py_TYPE(slots[i])->tp_descr_set(slots[i], made, values[i]) < 0) Py_CLEAR(made);
            Py_XDECREF(values[i]);
        }
        return made;
    }
};

SlotType<4> answer_type;
SlotType<2> prompt_type;
PyObject* statuses[kNumStatuses];
PyObject* modes[kNumModes];
PyObject* rules_of = nullptr;  // Python's function from a format to its `Rules`, or None

// The rules of the formats that were asked for last. A format is known by its identity: it is immutable.
struct KnownFormat {
    PyObject* format;
    bool within;  // the kernels' limits
    Rules rules;
};
KnownFormat known_formats[kKnownFormats];
u32 num_known = 0;

bool copy_rules(PyObject* buffer, Rules& rules) {
    Py_buffer view;
    if (PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) < 0) return false;
    const bool fits = view.len == Py_ssize_t(sizeof(Rules));
    if (fits) std::memcpy(&rules, view.buf, sizeof(Rules));
    PyBuffer_Release(&view);
    if (!fits) PyErr_Format(PyExc_ValueError, "expected rules of %zu bytes, got %zd", sizeof(Rules), view.len);
    return fits;
}

const KnownFormat* find_format(PyObject* format) {
    const u32 count = num_known < kKnownFormats ? num_known : kKnownFormats;
    for (u32 i = 0; i < count; ++i) {
        if (known_formats[i].format == format) return &known_formats[i];
    }
    PyObject* found = PyObject_CallFunctionObjArgs(rules_of, format, nullptr);
    if (found == nullptr) return nullptr;
    Rules rules = {};
    const bool within = found != Py_None;
    const bool copied = !within || copy_rules(found, rules);
    Py_DECREF(found);
    if (!copied) return nullptr;
    KnownFormat& known = known_formats[num_known++ % kKnownFormats];
    PyObject* old = known.format;
    Py_INCREF(format);
    known = {format, within, rules};
    Py_XDECREF(old);
    return &known;
}

// 0 to 3, or -1 for what is no mode.
int find_mode(PyObject* name) {
    for (u32 i = 0; i < kNumModes; ++i) {
        if (name == modes[i]) return int(i);
    }
    for (u32 i = 0; PyUnicode_Check(name) && i < kNumModes; ++i) {
        if (PyUnicode_Compare(name, modes[i]) == 0) return int(i);
    }
    return -1;
}

// A height and a width; false for anything but a pair of plain integers within the limits.
bool read_size(PyObject* pair, i32& height, i32& width) {
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) return false;
    for (u32 i = 0; i < 2; ++i) {
        PyObject* number = PyTuple_GET_ITEM(pair, i);
        if (!PyLong_CheckExact(number)) return false;
        int overflow = 0;
        const long long side = PyLong_AsLongLongAndOverflow(number, &overflow);
        if (overflow != 0 || side < 1 || side > kMaxSide) return false;
        (i == 0 ? height : width) = i32(side);
    }
    return true;
}

PyObject* make_floats(const i32* numbers, u32 count) {
    PyObject* tuple = PyTuple_New(count);
    for (u32 i = 0; tuple != nullptr && i < count; ++i) {
        PyObject* number = PyFloat_FromDouble(double(numbers[i]));
        if (number == nullptr) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, i, number);
        }
    }
    return tuple;
}

PyObject* make_prompt(const Prompt& prompt) {
    PyObject* points = PyTuple_New(prompt.num_points);
    for (i32 i = 0; points != nullptr && i < prompt.num_points; ++i) {
        PyObject* point = make_floats(prompt.points_xy[i], 2);
        if (point == nullptr) {
            Py_CLEAR(points);
        } else {
            PyTuple_SET_ITEM(points, i, point);
        }
    }
    return prompt_type.make({make_floats(prompt.box_xyxy, 4), points});
}

PyObject* make_prompts(const Parsed& parsed) {
    PyObject* prompts = PyTuple_New(parsed.num_prompts);
    for (u32 i = 0; prompts != nullptr && i < parsed.num_prompts; ++i) {
        PyObject* prompt = make_prompt(parsed.prompts[i]);
        if (prompt == nullptr) {
            Py_CLEAR(prompts);
        } else {
            PyTuple_SET_ITEM(prompts, i, prompt);
        }
    }
    return prompts;
}

// Characters that begin in [0, end): the bytes came from a `str`, so each but a continuation begins one.
Py_ssize_t count_characters(const u8* text, u32 end) {
    Py_ssize_t count = 0;
    for (u32 at = 0; at < end; ++at) count += !is_continuation(text[at]);
    return count;
}

// A reply's bytes; those of ASCII text are the text's own.
struct ReplyBytes {
    PyObject* encoded = nullptr;
    const u8* data = nullptr;
    Py_ssize_t length = 0;

    ~ReplyBytes() { Py_XDECREF(encoded); }

    bool read(PyObject* text) {
        if (PyUnicode_IS_COMPACT_ASCII(text)) {
            data = PyUnicode_1BYTE_DATA(text);
            length = PyUnicode_GET_LENGTH(text);
            return true;
        }
        encoded = PyUnicode_AsEncodedString(text, "utf-8", "surrogatepass");
        if (encoded == nullptr) return false;
        data = reinterpret_cast<const u8*>(PyBytes_AS_STRING(encoded));
        length = PyBytes_GET_SIZE(encoded);
        return true;
    }

    PyObject* cut(PyObject* text, Span span) const {
        if (encoded == nullptr) return PyUnicode_Substring(text, span.begin, span.end);
        return PyUnicode_Substring(text, count_characters(data, span.begin), count_characters(data, span.end));
    }
};

PyObject* new_reference(PyObject* object) {
    Py_INCREF(object);
    return object;
}

// parse_answer(text, answer_format, input_size_hw, source_size_hw, finished, mode): an `Answer`, or None for a request
// that is wrong or beyond the limits, which the reference then takes or refuses.
PyObject* parse_answer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 6 || rules_of == nullptr) {
        PyErr_SetString(PyExc_TypeError, "expected six arguments, after `bind`");
        return nullptr;
    }
    PyObject* text = arguments[0];
    Sizes sizes;
    const int mode = find_mode(arguments[5]);
    if (mode < 0 || !PyUnicode_CheckExact(text) || PyUnicode_GET_LENGTH(text) > kMaxReplyBytes / 4 ||
        !read_size(arguments[2], sizes.input_height, sizes.input_width) ||
        !read_size(arguments[3], sizes.source_height, sizes.source_width)) {
        Py_RETURN_NONE;
    }
    const int finished = PyObject_IsTrue(arguments[4]);
    if (finished < 0) return nullptr;
    ReplyBytes reply;
    if (!reply.read(text)) return nullptr;
    // Last of all that may run Python, and with it another thread that asks for other formats.
    const KnownFormat* known = find_format(arguments[1]);
    if (known == nullptr) return nullptr;
    if (!known->within) Py_RETURN_NONE;
    const Parsed parsed =
        parse_on_host(workspace, reply.data, u32(reply.length), finished != 0, Mode(mode), known->rules, sizes);
    if (parsed.status == Status::kNoRoom) return PyErr_NoMemory();
    return answer_type.make({new_reference(statuses[u32(parsed.status)]), reply.cut(text, parsed.thinking),
                             make_prompts(parsed), new_reference(text)});
}

// Values one after another, in room that grows by doubling and is kept.
template <typename T>
struct Packing {
    std::vector<T> room;
    size_t count = 0;

    // Where `more` values go; the caller sets them.
    T* add(size_t more) {
        if (room.size() < count + more) room.resize(2 * (count + more));
        count += more;
        return room.data() + count - more;
    }
};

// What a batch gives, packed; grows with the batch and is kept for the thread's next one.
struct Packed {
    std::vector<i32> status, num_objects;
    std::vector<i64> thinking, object_offsets;
    Packing<i32> boxes, points;
    Packing<i64> point_offsets;

    void start(size_t count) {
        status.resize(count);
        num_objects.resize(count);
        thinking.resize(2 * count);
        object_offsets.resize(count + 1);
        boxes.count = points.count = point_offsets.count = 0;
        object_offsets[0] = 0;
        *point_offsets.add(1) = 0;
    }
    void add(size_t index, const Parsed& parsed) {
        status[index] = i32(parsed.status);
        num_objects[index] = i32(parsed.num_objects);
        thinking[2 * index] = parsed.thinking.begin;
        thinking[2 * index + 1] = parsed.thinking.end;
        for (u32 k = 0; k < parsed.num_prompts; ++k) {
            const Prompt& prompt = parsed.prompts[k];
            std::memcpy(boxes.add(4), prompt.box_xyxy, sizeof(prompt.box_xyxy));
            const size_t sides = 2 * size_t(prompt.num_points);
            if (sides > 0) std::memcpy(points.add(sides), prompt.points_xy, sides * sizeof(i32));
            *point_offsets.add(1) = i64(points.count / 2);
        }
        object_offsets[index + 1] = i64(boxes.count / 4);
    }
};

template <typename T>
PyObject* copy_bytes(const std::vector<T>& values, size_t count) {
    const char* data = reinterpret_cast<const char*>(values.data());
    return PyByteArray_FromStringAndSize(data, Py_ssize_t(count * sizeof(T)));
}

template <typename T>
PyObject* copy_bytes(const std::vector<T>& values) {
    return copy_bytes(values, values.size());
}

template <typename T>
PyObject* copy_bytes(const Packing<T>& values) {
    return copy_bytes(values.room, values.count);
}

// Fetches the beginning of a reply that is read soon: replies lie anywhere in memory.
void prefetch_reply(PyObject* reply) {
    constexpr Py_ssize_t kFetched = 512, kLine = 64;
    const char* first = reinterpret_cast<const char*>(reply);
    for (Py_ssize_t at = 0; at < kFetched; at += kLine) __builtin_prefetch(first + at);
}

struct BatchRequest {
    PyObject* replies = nullptr;  // a tuple: nobody can take a reply out of it while the batch is read
    Py_buffer rules = {}, sizes = {}, finished = {};
    int mode = 0;

    ~BatchRequest() {
        Py_XDECREF(replies);
        for (Py_buffer* buffer : {&rules, &sizes, &finished}) {
            if (buffer->obj != nullptr) PyBuffer_Release(buffer);
        }
    }

    bool check() {
        const Py_ssize_t count = PyTuple_GET_SIZE(replies);
        for (Py_ssize_t i = 0; i < count; ++i) {
            PyObject* reply = PyTuple_GET_ITEM(replies, i);
            if (!PyBytes_Check(reply)) {
                PyErr_Format(PyExc_TypeError, "expected replies as bytes, got %s", Py_TYPE(reply)->tp_name);
                return false;
            }
            if (PyBytes_GET_SIZE(reply) > kMaxReplyBytes) {
                PyErr_Format(PyExc_ValueError, "expected replies of up to %lld bytes, got %zd; cut it",
                             static_cast<long long>(kMaxReplyBytes), PyBytes_GET_SIZE(reply));
                return false;
            }
        }
        const auto fits = [&](const Py_buffer& buffer, size_t item) {
            return buffer.len == Py_ssize_t(item) || buffer.len == count * Py_ssize_t(item);
        };
        if (rules.len == Py_ssize_t(sizeof(Rules)) && fits(sizes, sizeof(Sizes)) && fits(finished, 1) && mode >= 0 &&
            mode < int(kNumModes)) {
            return true;
        }
        PyErr_SetString(PyExc_ValueError, "expected rules, sizes, ends and a mode of the replies' number");
        return false;
    }

    static constexpr Py_ssize_t kAhead = 2;

    // False: no memory for the tape.
    bool parse(Packed& packed) const {
        const Py_ssize_t count = PyTuple_GET_SIZE(replies);
        Workspace& own = workspace;
        const Sizes* each_size = static_cast<const Sizes*>(sizes.buf);
        const u8* each_end = static_cast<const u8*>(finished.buf);
        const Py_ssize_t size_step = sizes.len == Py_ssize_t(sizeof(Sizes)) ? 0 : 1;
        const Py_ssize_t end_step = finished.len == 1 ? 0 : 1;
        for (Py_ssize_t i = 0; i < count; ++i) {
            PyObject* reply = PyTuple_GET_ITEM(replies, i);
            if (i + kAhead < count) prefetch_reply(PyTuple_GET_ITEM(replies, i + kAhead));
            const u8* text = reinterpret_cast<const u8*>(PyBytes_AS_STRING(reply));
            const Parsed parsed =
                parse_on_host(own, text, u32(PyBytes_GET_SIZE(reply)), each_end[i * end_step] != 0, Mode(mode),
                              *static_cast<const Rules*>(rules.buf), each_size[i * size_step]);
            if (parsed.status == Status::kNoRoom) return false;
            packed.add(size_t(i), parsed);
        }
        return true;
    }
};

thread_local Packed packed;

// parse_prompts(replies, rules, sizes, finished, mode): the arrays of `ParsedReplies` in its order, as byte arrays.
// `sizes` (int32 [N or 1, 4]) and `finished` (uint8 [N or 1]) hold one entry per reply or one for all.
PyObject* parse_prompts(PyObject*, PyObject* arguments) try {
    BatchRequest request;
    PyObject* given = nullptr;
    if (!PyArg_ParseTuple(arguments, "Oy*y*y*i", &given, &request.rules, &request.sizes, &request.finished,
                          &request.mode)) {
        return nullptr;
    }
    request.replies = PySequence_Tuple(given);
    if (request.replies == nullptr || !request.check()) return nullptr;
    bool parsed = false, memory = true;
    Py_BEGIN_ALLOW_THREADS;
    try {
        Packed& own = packed;
        own.start(size_t(PyTuple_GET_SIZE(request.replies)));
        parsed = request.parse(own);
    } catch (const std::bad_alloc&) {
        memory = false;
    }
    Py_END_ALLOW_THREADS;
    if (!parsed || !memory) return PyErr_NoMemory();
    return Py_BuildValue("(NNNNNNN)", copy_bytes(packed.status), copy_bytes(packed.thinking),
                         copy_bytes(packed.num_objects), copy_bytes(packed.object_offsets), copy_bytes(packed.boxes),
                         copy_bytes(packed.point_offsets), copy_bytes(packed.points));
} catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
}

template <u32 N>
bool bind_tuple(PyObject* given, PyObject* (&objects)[N]) {
    if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) != Py_ssize_t(N)) {
        PyErr_Format(PyExc_ValueError, "expected a tuple of %u", N);
        return false;
    }
    for (u32 i = 0; i < N; ++i) {
        PyObject* object = PyTuple_GET_ITEM(given, i);
        Py_INCREF(object);
        Py_XSETREF(objects[i], object);
    }
    return true;
}

// bind(Answer, Prompt, statuses, modes, rules_of): what `parse_answer` makes its results of; called once before it.
PyObject* bind(PyObject*, PyObject* arguments) {
    PyObject *answer, *prompt, *given_statuses, *given_modes, *rules;
    if (!PyArg_ParseTuple(arguments, "OOOOO", &answer, &prompt, &given_statuses, &given_modes, &rules)) return nullptr;
    if (!answer_type.bind(answer, {"status", "thinking", "prompts", "text"}) ||
        !prompt_type.bind(prompt, {"box_xyxy", "points_xy"}) || !bind_tuple(given_statuses, statuses) ||
        !bind_tuple(given_modes, modes)) {
        return nullptr;
    }
    Py_INCREF(rules);
    Py_XSETREF(rules_of, rules);
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"bind", bind, METH_VARARGS, nullptr},
    {"parse_answer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(parse_answer)), METH_FASTCALL, nullptr},
    {"parse_prompts", parse_prompts, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int fill_module(PyObject* module) { return PyModule_AddStringConstant(module, "SOURCES", SEGZERO_SOURCES); }

PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(fill_module)},
    {0, nullptr},
};

#define SEGZERO_TEXT_OF(name) #name
#define SEGZERO_TEXT(name) SEGZERO_TEXT_OF(name)
#define SEGZERO_JOIN_NAMES(one, other) one##other
#define SEGZERO_JOIN(one, other) SEGZERO_JOIN_NAMES(one, other)

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, SEGZERO_TEXT(SEGZERO_MODULE), nullptr, 0, methods, module_slots, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace segzero

PyMODINIT_FUNC SEGZERO_JOIN(PyInit_, SEGZERO_MODULE)() { return PyModuleDef_Init(&segzero::definition); }
