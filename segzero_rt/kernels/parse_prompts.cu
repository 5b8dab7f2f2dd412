// parse_prompts: replies as bytes to thinking, status, boxes and points in source pixels. The contract and its reference
// stand in parse_prompts.py.
//
// g++ compiles this file for the host as a part of host_module.cpp, where replies are read one after another. nvcc
// compiles it for a device. There a warp finds a reply's tags, 128 bytes at a time, so that nobody reads most of what was
// thought; then one thread reads each reply, over a grid of any size. What finds no room there (a longer tape, more
// prompts than the row has) carries a code and is parsed again by the host. Replies may also come as tokens.
#include "answer_parser.cuh"

#include <cstdlib>

namespace segzero {

#ifdef __CUDACC__

// Replies, and what is the same for each. Fields as in `_Batch` of parse_prompts_device.py.
struct Batch {
    const u8* text;
    const i64* begins;   // [count] of each reply in the text
    const i64* ends;     // [count]
    const u8* finished;  // [count], or one for all
    const Sizes* sizes;  // [count], or one for all
    const Rules* rules;
    i64 count;
    Mode mode;
    i32 each_finished, each_size;  // 1, or 0 where there is one for all
};

// What is said of a reply. Fields as in `REPLY` of parse_prompts_device.py.
struct Reply {
    Status status;
    Span thinking;
    u32 num_objects;
    u32 num_prompts;
};

// parse_prompts_device.py makes room for these.
static_assert(sizeof(Node) == 16 && sizeof(Prompt) == 84 && sizeof(Reply) == 20 && sizeof(FoundTags) == 148);

constexpr u32 kLanes = 32, kLaneBytes = 4;
constexpr u32 kMostCounters = 256;  // threads of a block that adds up one number of each

// Where a tag begins in the `kLaneBytes` bytes from `at` on: there is one at most, since a tag has seven. `end` 0: none.
__device__ inline Tag lane_tag(const u8* text, u32 at, u32 length) {
    for (u32 i = at; i < at + kLaneBytes && i < length; ++i) {
        if (text[i] != '<') continue;
        const Tag tag = read_tag(text, i, length);
        if (tag.end != 0) return tag;
    }
    return {0, 0, false, false};
}

// One warp for each reply.
extern "C" __global__ void find_tags_kernel(Batch batch, FoundTags* found) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x, warps = i64(gridDim.x) * blockDim.x / kLanes;
    const u32 lane = threadIdx.x % kLanes;
    for (i64 i = thread / kLanes; i < batch.count; i += warps) {
        const u8* text = batch.text + batch.begins[i];
        const u32 length = u32(batch.ends[i] - batch.begins[i]);
        u32 count = 0;
        for (u32 at = 0; at < length && count < FoundTags::kKept; at += kLanes * kLaneBytes) {
            const Tag tag = lane_tag(text, at + lane * kLaneBytes, length);
            const u32 lanes = __ballot_sync(~0u, tag.end != 0);
            const u32 place = count + u32(__popc(lanes & ((1u << lane) - 1)));
            if (tag.end != 0 && place < FoundTags::kKept) found[i].kept[place] = tag;
            count += u32(__popc(lanes));
        }
        if (lane == 0) found[i].count = count < FoundTags::kKept ? count : FoundTags::kKept;
    }
}

// `prompts` is [count, slots]. Each thread of the grid owns `tape_nodes` nodes and `slots` prompts of scratch.
extern "C" __global__ void parse_prompts_kernel(Batch batch, const FoundTags* tags, u32 slots, u32 tape_nodes,
                                                Node* tapes, Prompt* scratch, Reply* replies, Prompt* prompts) {
    const i64 thread = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 threads = i64(gridDim.x) * blockDim.x;
    for (i64 i = thread; i < batch.count; i += threads) {
        Prompt* row = prompts + i * slots;
        const Tape tape = {tapes + thread * tape_nodes, tape_nodes, 0};
        ReplyParser parser(batch.text + batch.begins[i], u32(batch.ends[i] - batch.begins[i]),
                           batch.finished[i * batch.each_finished] != 0, batch.mode, *batch.rules,
                           batch.sizes[i * batch.each_size], tape, row, scratch + thread * slots, slots);
        const Parsed parsed = parser.parse(tags[i]);
        replies[i] = {parsed.status, parsed.thinking, parsed.num_objects, parsed.num_prompts};
        if (parsed.prompts == row) continue;
        for (u32 k = 0; k < parsed.num_prompts; ++k) row[k] = parsed.prompts[k];
    }
}

// One block: where the prompts of each reply begin among all, [count + 1].
extern "C" __global__ void count_prompts_kernel(const Reply* replies, i64 count, i64* offsets) {
    __shared__ i64 sums[kMostCounters];
    const i64 stretch = (count + blockDim.x - 1) / blockDim.x, begin = stretch * threadIdx.x;
    const i64 end = begin + stretch < count ? begin + stretch : count;
    i64 sum = 0;
    for (i64 i = begin; i < end; ++i) sum += replies[i].num_prompts;
    sums[threadIdx.x] = sum;
    __syncthreads();
    i64 before = 0;
    for (u32 i = 0; i < threadIdx.x; ++i) before += sums[i];
    for (i64 i = begin; i < end; ++i) {
        offsets[i] = before;
        before += replies[i].num_prompts;
    }
    if (threadIdx.x == blockDim.x - 1) offsets[count] = before;
}

// Replies as tokens, and the bytes of each token. Fields as in `_Tokens` of reply_text_device.py.
struct Tokens {
    const i32* ids;     // [count, most]
    const i32* counts;  // [count]
    i64 count;
    i32 most;
    i32 vocabulary;
    const i32* offsets;  // [vocabulary + 1] into `bytes`
    const u8* bytes;
    u8* text;      // [count, capacity]
    i64 capacity;  // no reply is longer
    i64* begins;   // [count]
    i64* ends;     // [count]
};

// One block for each reply: its text. What is no token of the vocabulary says nothing.
extern "C" __global__ void spell_tokens_kernel(Tokens job) {
    __shared__ i64 sums[kMostCounters];
    const i64 reply = blockIdx.x;
    const i32* ids = job.ids + reply * job.most;
    const i32 given = job.counts[reply], count = given < 0 ? 0 : given < job.most ? given : job.most;
    const i32 stretch = (count + i32(blockDim.x) - 1) / i32(blockDim.x), begin = stretch * i32(threadIdx.x);
    const i32 end = begin + stretch < count ? begin + stretch : count;
    i64 own = 0;
    for (i32 i = begin; i < end; ++i) {
        if (ids[i] >= 0 && ids[i] < job.vocabulary) own += job.offsets[ids[i] + 1] - job.offsets[ids[i]];
    }
    sums[threadIdx.x] = own;
    __syncthreads();
    i64 at = reply * job.capacity;
    for (u32 i = 0; i < threadIdx.x; ++i) at += sums[i];
    for (i32 i = begin; i < end; ++i) {
        if (ids[i] < 0 || ids[i] >= job.vocabulary) continue;
        for (i32 k = job.offsets[ids[i]]; k < job.offsets[ids[i] + 1]; ++k) job.text[at++] = job.bytes[k];
    }
    if (threadIdx.x != blockDim.x - 1) return;
    job.begins[reply] = reply * job.capacity;
    job.ends[reply] = at;
}

// One thread for each place of the rows: all prompts one after another.
extern "C" __global__ void pack_prompts_kernel(const Reply* replies, i64 count, u32 slots, const i64* offsets,
                                               const Prompt* prompts, Prompt* packed) {
    const i64 place = i64(blockIdx.x) * blockDim.x + threadIdx.x, reply = place / slots;
    if (reply >= count || place % slots >= replies[reply].num_prompts) return;
    packed[offsets[reply] + place % slots] = prompts[place];
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

// `kNoRoom`: no memory. The prompts are there until the next reply. `own` is the thread's: to find that for each reply
// would take as long as finding a tag.
[[maybe_unused]] Parsed parse_on_host(Workspace& own, const u8* text, u32 length, bool finished, Mode mode,
                                      const Rules& rules, const Sizes& sizes) {
    if (own.capacity == 0) own.grow(kFirstTape);
    while (true) {
        ReplyParser parser(text, length, finished, mode, rules, sizes, Tape{own.nodes, own.capacity, 0}, own.prompts,
                           own.prompts + kMaxObjects);
        const Parsed parsed = parser.parse();
        // Every node but the first stands for a byte or more, so this happens once per reply at most.
        if (parsed.status != Status::kNoRoom || !own.grow(length + 16)) return parsed;
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
