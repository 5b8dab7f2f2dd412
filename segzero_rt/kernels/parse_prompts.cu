// parse_prompts: replies as bytes to thinking, status, boxes and points in source pixels. The contract and its reference
// stand in parse_prompts.py.
//
// g++ compiles this file for the host (`-x c++`), where replies are read one after another into packed lists. nvcc
// compiles it for a device: one thread per reply over a grid of any size, each reply's prompts in a row of `slots`; what
// finds no room there (a longer tape, more prompts) carries a code and is parsed again by the host.
#include "answer_parser.cuh"

#include <cstdlib>

namespace segzero {

// One call: fields as in `_Batch` of parse_prompts.py. Replies `first` and on are parsed; `first` is moved behind those
// that are done.
struct Batch {
    const u8* text;       // all replies one after another
    const i64* offsets;   // [count + 1] of each reply in the text
    const u8* finished;   // [count]
    const Sizes* sizes;   // [count]
    const Rules* rules;
    i64 count;
    i64 mode;
    i64 capacity;         // of boxes and point_ends; points holds kMaxPoints times as many
    i32* status;          // [count] Status
    i64* thinking;        // [count, 2] bytes from the reply's begin
    i32* num_objects;     // [count]
    i64* object_ends;     // [count] into boxes
    i32* boxes_xyxy;      // [capacity, 4]
    i64* point_ends;      // [capacity] into points
    i32* points_xy;       // [capacity * kMaxPoints, 2]
    i64 first;
    i64 objects_used;
    i64 points_used;
};

#ifdef __CUDACC__

struct Reply {
    Status status;
    Span thinking;
    u32 num_objects;
    u32 num_prompts;  // more than `slots`: only so many were written
};

// Each thread of the grid owns `tape_nodes` nodes and 2 * kMaxObjects prompts of scratch.
extern "C" __global__ void parse_prompts_kernel(Batch batch, u32 slots, u32 tape_nodes, Node* tapes, Prompt* scratch,
                                                Reply* replies, Prompt* prompts) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 threads = i64(gridDim.x) * blockDim.x;
    Prompt* own = scratch + thread * 2 * kMaxObjects;
    for (i64 i = thread; i < batch.count; i += threads) {
        const Tape tape = {tapes + thread * tape_nodes, tape_nodes, 0};
        ReplyParser parser(batch.text + batch.offsets[i], u32(batch.offsets[i + 1] - batch.offsets[i]),
                           batch.finished[i] != 0, Mode(batch.mode), *batch.rules, batch.sizes[i], tape, own);
        const Parsed parsed = parser.parse();
        replies[i] = {parsed.status, parsed.thinking, parsed.num_objects, parsed.num_prompts};
        for (u32 k = 0; k < parsed.num_prompts && k < slots; ++k) prompts[i * slots + k] = parsed.prompts[k];
    }
}

#endif

namespace {

// Memory of one host thread: a tape that grows with the longest answer, and the prompts of one reply.
struct Workspace {
    Node* nodes = nullptr;
    u32 capacity = 0;
    Prompt prompts[2 * kMaxObjects];

    ~Workspace() { std::free(nodes); }
    bool grow(u32 wanted) {
        Node* grown = static_cast<Node*>(std::realloc(nodes, sizeof(Node) * wanted));
        if (grown == nullptr) return false;
        nodes = grown;
        capacity = wanted;
        return true;
    }
};

thread_local Workspace workspace;

Parsed parse_on_host(const Batch& batch, i64 index) {
    const u8* text = batch.text + batch.offsets[index];
    const u32 length = u32(batch.offsets[index + 1] - batch.offsets[index]);
    while (true) {
        ReplyParser parser(text, length, batch.finished[index] != 0, Mode(batch.mode), *batch.rules,
                           batch.sizes[index], Tape{workspace.nodes, workspace.capacity, 0}, workspace.prompts);
        const Parsed parsed = parser.parse();
        // Every node but the first stands for a byte or more, so this happens once per reply at most.
        if (parsed.status != Status::kTapeFull || !workspace.grow(length + 16)) return parsed;
    }
}

void append(Batch& batch, const Parsed& parsed) {
    for (u32 k = 0; k < parsed.num_prompts; ++k) {
        const Prompt& prompt = parsed.prompts[k];
        std::memcpy(batch.boxes_xyxy + 4 * batch.objects_used, prompt.box_xyxy, sizeof(prompt.box_xyxy));
        std::memcpy(batch.points_xy + 2 * batch.points_used, prompt.points_xy, 8 * size_t(prompt.num_points));
        batch.points_used += prompt.num_points;
        batch.point_ends[batch.objects_used++] = batch.points_used;
    }
}

}  // namespace

// 0: all replies are parsed. 1: `capacity` is used up, call again with more. 2: no memory for the tape.
SZ_EXPORT i32 segzero_parse_prompts(Batch* batch) {
    if (workspace.capacity == 0 && !workspace.grow(1024)) return 2;
    for (; batch->first < batch->count; ++batch->first) {
        if (batch->capacity - batch->objects_used < i64(kMaxObjects)) return 1;
        const i64 i = batch->first;
        const Parsed parsed = parse_on_host(*batch, i);
        if (parsed.status == Status::kTapeFull) return 2;
        batch->status[i] = i32(parsed.status);
        batch->thinking[2 * i] = parsed.thinking.begin;
        batch->thinking[2 * i + 1] = parsed.thinking.end;
        batch->num_objects[i] = i32(parsed.num_objects);
        append(*batch, parsed);
        batch->object_ends[i] = batch->objects_used;
    }
    return 0;
}

// Reads one strict document (`json_reader.read_json`): the fault's code, and in `end` where it was met, in bytes.
SZ_EXPORT i32 segzero_read_document(const u8* text, i64 length, i32 python, i64* end) {
    if (workspace.capacity < u32(length) + 16 && !workspace.grow(u32(length) + 16)) return i32(Fault::kTapeFull);
    Tape tape = {workspace.nodes, workspace.capacity, 0};
    StrictReader reader(text, 0, u32(length), &tape, python != 0);
    const bool read = reader.document();
    *end = read ? reader.at : reader.stopped;
    return i32(reader.fault);
}

SZ_EXPORT double segzero_read_decimal(const u8* text, i64 length) { return read_decimal(text, 0, u32(length)); }

}  // namespace segzero
