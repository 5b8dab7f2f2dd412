// parse_prompts: replies as bytes to thinking, status, boxes and points in source pixels. The contract and its reference
// stand in parse_prompts.py.
//
// g++ compiles this file for the host as a part of host_module.cpp, where replies are read one after another. nvcc
// compiles it for a device: one thread per reply over a grid of any size, each reply's prompts in a row of `slots`; what
// finds no room there (a longer tape, more prompts) carries a code and is parsed again by the host.
#include "answer_parser.cuh"

#include <cstdlib>

namespace segzero {

#ifdef __CUDACC__

// All replies one after another, and what is the same for each.
struct Batch {
    const u8* text;
    const i64* offsets;  // [count + 1] of each reply in the text
    const u8* finished;  // [count]
    const Sizes* sizes;  // [count]
    const Rules* rules;
    i64 count;
    Mode mode;
};

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
                           batch.finished[i] != 0, batch.mode, *batch.rules, batch.sizes[i], tape, own);
        const Parsed parsed = parser.parse();
        replies[i] = {parsed.status, parsed.thinking, parsed.num_objects, parsed.num_prompts};
        for (u32 k = 0; k < parsed.num_prompts && k < slots; ++k) prompts[i * slots + k] = parsed.prompts[k];
    }
}

#endif

namespace {

constexpr u32 kFirstTape = 1024;

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

// `kTapeFull`: no memory. The prompts are there until the next reply. `own` is the thread's: to find that for each reply
// would take as long as finding a tag.
[[maybe_unused]] Parsed parse_on_host(Workspace& own, const u8* text, u32 length, bool finished, Mode mode,
                                      const Rules& rules, const Sizes& sizes) {
    if (own.capacity == 0) own.grow(kFirstTape);
    while (true) {
        ReplyParser parser(text, length, finished, mode, rules, sizes, Tape{own.nodes, own.capacity, 0}, own.prompts);
        const Parsed parsed = parser.parse();
        // Every node but the first stands for a byte or more, so this happens once per reply at most.
        if (parsed.status != Status::kTapeFull || !own.grow(length + 16)) return parsed;
    }
}

}  // namespace

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
