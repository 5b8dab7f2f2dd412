// postprocess_masks on a device, a part of postprocess_masks.cu: kernels for a batch of N pictures of logits.
//
//   begin -> [labels, join, areas, clean] -> upsample -> [join, areas, clean] -> finish -> [changes, scan, starts, text]
//
// Components are found by union-find over pixels, whose results do not hang on the order of threads: a component's root
// is its least pixel. Run lengths go down the columns: each column is cut into stretches, each stretch counts where the
// mask changes, and the sums of all before it tell where its changes stand among all.
#pragma once

namespace segzero {

constexpr u32 kMaskWarp = 32;
constexpr i32 kRowsOfThread = 4;   // pixels one below another that a thread of `upsample_masks_kernel` makes
constexpr i32 kStretchRows = 64;   // of a column, for run lengths
constexpr u32 kScanThreads = 256;  // of a block that adds up numbers of a mask

// Bounds and area of the pixels that a block has seen, then of a mask.
struct Extent {
    i32 left, top, right, bottom;
    u32 area;
};

// Adds a row of a warp's pixels, lane by lane from column `first` on, to those of the block.
__device__ inline void note_row(u32 inside, i32 first, i32 y, Extent& block) {
    if (inside == 0 || threadIdx.x % kMaskWarp != 0) return;
    atomicMin(&block.left, first + i32(__ffs(i32(inside))) - 1);
    atomicMax(&block.right, first + i32(kMaskWarp) - i32(__clz(i32(inside))));
    atomicMin(&block.top, y);
    atomicMax(&block.bottom, y + 1);
    atomicAdd(&block.area, u32(__popc(inside)));
}

__device__ inline void empty_extent(const MaskJob& job, Extent& block) {
    if (threadIdx.x == 0 && threadIdx.y == 0) block = {job.width, job.height, 0, 0, 0};
    __syncthreads();
}

__device__ inline void add_extent(const MaskJob& job, i64 index, const Extent& block) {
    __syncthreads();
    if (threadIdx.x != 0 || threadIdx.y != 0 || block.area == 0) return;
    i32* box = job.boxes_xyxy + 4 * index;
    atomicMin(box, block.left);
    atomicMin(box + 1, block.top);
    atomicMax(box + 2, block.right);
    atomicMax(box + 3, block.bottom);
    atomicAdd(reinterpret_cast<unsigned long long*>(job.areas + index), static_cast<unsigned long long>(block.area));
}

// One thread for each mask. `sides` [count, 2]: how many logits are above the two thresholds of stability.
extern "C" __global__ void begin_masks_kernel(MaskJob job, u32* sides) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= job.count) return;
    i32* box = job.boxes_xyxy + 4 * index;
    box[0] = job.width;
    box[1] = job.height;
    box[2] = box[3] = 0;
    job.areas[index] = 0;
    sides[2 * index] = sides[2 * index + 1] = 0;
}

// One thread for each logit of a mask, blockIdx.y is the mask: counts for stability, and labels for components.
extern "C" __global__ void label_logits_kernel(MaskJob job, u32* sides, u8* labels) {
    __shared__ u32 counts[2];
    if (threadIdx.x < 2) counts[threadIdx.x] = 0;
    __syncthreads();
    const i64 pixels = i64(job.coarse_height) * job.coarse_width, at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 index = blockIdx.y, place = index * pixels + at;
    const float logit = at < pixels ? job.logits[place] : 0.0f;
    const u32 smaller = __ballot_sync(~0u, at < pixels && logit > job.stable_above);
    const u32 larger = __ballot_sync(~0u, at < pixels && logit > job.stable_below);
    if (threadIdx.x % kMaskWarp == 0) {
        atomicAdd(counts, u32(__popc(smaller)));
        atomicAdd(counts + 1, u32(__popc(larger)));
    }
    if (at < pixels && labels != nullptr) labels[place] = side_of(logit, job.threshold);
    __syncthreads();
    if (threadIdx.x < 2 && counts[threadIdx.x] > 0) atomicAdd(sides + 2 * index + threadIdx.x, counts[threadIdx.x]);
}

// Pictures of labels, and what is known of their components; all [count, height, width].
struct Components {
    const u8* labels;  // 0 or 1; else in no component
    i32* parents;      // a pixel of the same component that is no later; its own place for a root
    u32* areas;        // of the component, at its root
    i64 count;
    i32 height, width;
};

__device__ inline i32 root_of(const i32* parents, i32 pixel) {
    const volatile i32* fresh = parents;
    for (i32 parent = fresh[pixel]; parent != pixel; parent = fresh[pixel]) pixel = parent;
    return pixel;
}

// What another thread puts in between is taken up: where `other` was no root any more, its new parent is joined too.
__device__ inline void join(i32* parents, i32 one, i32 other) {
    while (true) {
        one = root_of(parents, one);
        other = root_of(parents, other);
        if (one == other) return;
        if (one > other) {
            const i32 swapped = one;
            one = other;
            other = swapped;
        }
        const i32 old = atomicMin(parents + other, one);
        if (old == other) return;
        other = old;
    }
}

__device__ inline bool pixel_of(const Components& picture, i64& base, i32& at) {
    const i32 pixels = picture.height * picture.width;
    at = i32(blockIdx.x * blockDim.x + threadIdx.x);
    base = i64(blockIdx.y) * pixels;
    return at < pixels;
}

// One thread for each pixel of a picture, blockIdx.y is the picture; so for all kernels of components.
extern "C" __global__ void begin_components_kernel(Components picture) {
    i64 base;
    i32 at;
    if (!pixel_of(picture, base, at)) return;
    picture.parents[base + at] = at;
    picture.areas[base + at] = 0;
}

// Joins each pixel with those before it that touch it, corners included.
extern "C" __global__ void join_components_kernel(Components picture) {
    i64 base;
    i32 at;
    if (!pixel_of(picture, base, at)) return;
    const u8* labels = picture.labels + base;
    i32* parents = picture.parents + base;
    const i32 width = picture.width, x = at % width;
    const u8 label = labels[at];
    if (label > 1) return;
    if (x > 0 && labels[at - 1] == label) join(parents, at, at - 1);
    if (at < width) return;
    if (labels[at - width] == label) {
        join(parents, at, at - width);  // it touches the other two of that row, which join by themselves
        return;
    }
    if (x > 0 && labels[at - width - 1] == label) join(parents, at, at - width - 1);
    if (x + 1 < width && labels[at - width + 1] == label) join(parents, at, at - width + 1);
}

extern "C" __global__ void measure_components_kernel(Components picture) {
    i64 base;
    i32 at;
    if (!pixel_of(picture, base, at) || picture.labels[base + at] > 1) return;
    atomicAdd(picture.areas + base + root_of(picture.parents + base, at), 1u);
}

__device__ inline bool is_small(const Components& picture, const MaskJob& job, i64 base, i32 at, u8 label) {
    const i64 limit = label == 0 ? job.max_hole_area : label == 1 ? job.max_sprinkle_area : 0;
    return limit > 0 && i64(picture.areas[base + root_of(picture.parents + base, at)]) <= limit;
}

// The logits with small components put on the other side; `cleaned` has their shape.
extern "C" __global__ void clean_logits_kernel(Components picture, MaskJob job, float* cleaned) {
    i64 base;
    i32 at;
    if (!pixel_of(picture, base, at)) return;
    const u8 label = picture.labels[base + at];
    float value = job.logits[base + at];
    if (is_small(picture, job, base, at, label)) value = label == 0 ? job.hole_value : job.sprinkle_value;
    cleaned[base + at] = value;
}

// The same for masks, which are their own labels. A block is one warp wide, blockIdx.z is the mask.
extern "C" __global__ void clean_masks_kernel(Components picture, MaskJob job) {
    __shared__ Extent block;
    empty_extent(job, block);
    const i32 x = i32(blockIdx.x * blockDim.x + threadIdx.x), y = i32(blockIdx.y * blockDim.y + threadIdx.y);
    const i64 index = blockIdx.z, base = index * job.height * job.width;
    const bool within = x < job.width && y < job.height;
    u8 label = 0;
    if (within) {
        const i32 at = y * job.width + x;
        label = picture.labels[base + at];
        if (is_small(picture, job, base, at, label)) {
            label = u8(1 - label);
            job.masks[base + at] = label;  // nobody else looks at this pixel's label
        }
    }
    note_row(__ballot_sync(~0u, within && label == 1), i32(blockIdx.x * blockDim.x), y, block);
    add_extent(job, index, block);
}

// A block is one warp wide and `blockDim.y * kRowsOfThread` rows high, blockIdx.z is the mask. Bounds and areas are only
// gathered where the masks stay as they are.
extern "C" __global__ void upsample_masks_kernel(MaskJob job) {
    __shared__ Extent block;
    empty_extent(job, block);
    const i32 x = i32(blockIdx.x * blockDim.x + threadIdx.x);
    const i64 index = blockIdx.z;
    const float* logits = job.logits + index * job.coarse_height * job.coarse_width;
    u8* mask = job.masks + index * job.height * job.width;
    const AxisSample column = axis_sample(x < job.width ? x : job.width - 1, job.coarse_width, job.width);
    i32 y = i32((blockIdx.y * blockDim.y + threadIdx.y) * kRowsOfThread);
    for (i32 i = 0; i < kRowsOfThread; ++i, ++y) {
        bool inside = false;
        if (x < job.width && y < job.height) {
            const AxisSample row = axis_sample(y, job.coarse_height, job.height);
            inside = upsampled(logits, job.coarse_width, row, column) > job.threshold;
            mask[i64(y) * job.width + x] = inside;
        }
        if (job.clean_after == 0) note_row(__ballot_sync(~0u, inside), i32(blockIdx.x * blockDim.x), y, block);
    }
    add_extent(job, index, block);
}

// One thread for each mask: what is left to say.
extern "C" __global__ void finish_masks_kernel(MaskJob job, const u32* sides) {
    const i64 index = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= job.count) return;
    const u32 smaller = sides[2 * index], larger = sides[2 * index + 1];
    job.stability[index] = larger > 0 ? float(smaller) / float(larger) : 1.0f;
    if (job.areas[index] > 0) return;
    for (i32 i = 0; i < 4; ++i) job.boxes_xyxy[4 * index + i] = 0;
}

// Run lengths of masks u8 [count, height, width].
struct RunJob {
    const u8* masks;
    i64 count;
    i32 height, width;
    i32 stretches;  // of a column
    i64* places;    // [count, width * stretches + 1]: changes of each stretch, then of all before it
    i64* starts;    // [count, max_runs]: where each run but the first begins, then the number of pixels
    i64 max_runs;
    char* text;     // [count, max_characters]
    i64 max_characters;
    i64* lengths;   // [count]: characters of each text; -1: it found no room
};

// Calls `found` with the place of each change in a stretch of a column: places go down the columns.
template <typename Found>
__device__ inline void each_change(const RunJob& job, const u8* mask, i32 column, i32 stretch, Found found) {
    const i32 begin = stretch * kStretchRows, behind = begin + kStretchRows;
    const i32 end = behind < job.height ? behind : job.height;
    u8 before = 0;
    if (begin > 0) {
        before = mask[i64(begin - 1) * job.width + column];
    } else if (column > 0) {
        before = mask[i64(job.height - 1) * job.width + column - 1];
    }
    for (i32 y = begin; y < end; ++y) {
        const u8 pixel = mask[i64(y) * job.width + column];
        if (pixel != before) found(i64(column) * job.height + y);
        before = pixel;
    }
}

// One thread for each column and stretch (blockIdx.y), blockIdx.z is the mask.
extern "C" __global__ void count_changes_kernel(RunJob job) {
    const i32 column = i32(blockIdx.x * blockDim.x + threadIdx.x), stretch = i32(blockIdx.y);
    if (column >= job.width) return;
    const i64 index = blockIdx.z, own = i64(job.width) * job.stretches + 1;
    i64 changes = 0;
    each_change(job, job.masks + index * job.height * job.width, column, stretch, [&](i64) { ++changes; });
    job.places[index * own + i64(column) * job.stretches + stretch] = changes;
}

// The sum of the numbers of the threads before this one; `sums` is shared.
__device__ inline i64 sum_of_earlier(i64 number, i64* sums) {
    sums[threadIdx.x] = number;
    __syncthreads();
    i64 before = 0;
    for (u32 i = 0; i < threadIdx.x; ++i) before += sums[i];
    __syncthreads();
    return before;
}

// One block for each mask.
extern "C" __global__ void place_changes_kernel(RunJob job) {
    __shared__ i64 sums[kScanThreads];
    const i64 cells = i64(job.width) * job.stretches, part = (cells + blockDim.x - 1) / blockDim.x;
    i64* places = job.places + i64(blockIdx.x) * (cells + 1);
    const i64 begin = part * threadIdx.x, end = begin + part < cells ? begin + part : cells;
    i64 own = 0;
    for (i64 i = begin; i < end; ++i) own += places[i];
    i64 before = sum_of_earlier(own, sums);
    for (i64 i = begin; i < end; ++i) {
        const i64 changes = places[i];
        places[i] = before;
        before += changes;
    }
    if (threadIdx.x == blockDim.x - 1) places[cells] = before;
}

// As `count_changes_kernel`.
extern "C" __global__ void write_changes_kernel(RunJob job) {
    const i32 column = i32(blockIdx.x * blockDim.x + threadIdx.x), stretch = i32(blockIdx.y);
    if (column >= job.width) return;
    const i64 index = blockIdx.z, own = i64(job.width) * job.stretches + 1;
    i64 place = job.places[index * own + i64(column) * job.stretches + stretch];
    i64* starts = job.starts + index * job.max_runs;
    each_change(job, job.masks + index * job.height * job.width, column, stretch, [&](i64 at) {
        if (place < job.max_runs) starts[place] = at;
        ++place;
    });
}

// Number `i` of a mask's text: a run's length, from the fourth on less that of the run two before.
__device__ inline i64 run_number(const RunJob& job, const i64* starts, i64 changes, i64 i) {
    const i64 pixels = i64(job.height) * job.width;
    const auto start = [&](i64 k) { return k < 0 ? 0 : k < changes ? starts[k] : pixels; };
    const i64 run = start(i) - start(i - 1);
    return i > 2 ? run - (start(i - 2) - start(i - 3)) : run;
}

// One block for each mask.
extern "C" __global__ void write_runs_kernel(RunJob job) {
    __shared__ i64 sums[kScanThreads];
    const i64 index = blockIdx.x, changes = job.places[(index + 1) * (i64(job.width) * job.stretches + 1) - 1];
    if (changes > job.max_runs) {
        if (threadIdx.x == 0) job.lengths[index] = -1;
        return;
    }
    const i64* starts = job.starts + index * job.max_runs;
    char* text = job.text + index * job.max_characters;
    const i64 numbers = changes + 1, part = (numbers + blockDim.x - 1) / blockDim.x;
    const i64 begin = part * threadIdx.x, end = begin + part < numbers ? begin + part : numbers;
    char characters[16];
    i64 own = 0;
    for (i64 i = begin; i < end; ++i) own += write_run(run_number(job, starts, changes, i), characters);
    i64 at = sum_of_earlier(own, sums);
    for (i64 i = begin; i < end; ++i) {
        const u32 length = write_run(run_number(job, starts, changes, i), characters);
        for (u32 k = 0; k < length; ++k, ++at) {
            if (at < job.max_characters) text[at] = characters[k];
        }
    }
    if (threadIdx.x == blockDim.x - 1) job.lengths[index] = at <= job.max_characters ? at : -1;
}

}  // namespace segzero
