// Enough of CUDA for g++ to compile device code and run it on one thread. Include it before a kernel's source.
//
// The threads of a block are fibers: each runs until it waits for others (`__syncthreads`, a warp's exchange) or ends.
// Between two waits they run in turn, forwards and backwards alternately, so that a result that hangs on their order, as
// where a wait is missing, does not stay the same. What cannot be seen here: threads that really run at one time, memory
// that other threads see late, what nvcc makes of floating point.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// One block: its threads in order of x, then y, then z, as CUDA counts them for warps.
class Block {
  public:
    void run(const Dim3& size, const std::function<void()>& kernel) {
        const size_t count = size_t(size.x) * size.y * size.z;
        if (fibers_.size() < count) fibers_.resize(count);
        kernel_ = &kernel;
        for (size_t i = 0; i < count; ++i) start(i, size);
        live_ = count;
        for (bool backwards = false; live_ > 0; backwards = !backwards) {
            bool ran = false;
            for (size_t i = 0; i < count; ++i) ran = resume(backwards ? count - 1 - i : i) || ran;
            if (!ran && !release(count)) fail("threads wait for others that never come");
        }
    }

    void wait_for_block() { wait(State::kBlock, 0); }

    // Gives a value to the warp's threads in `mask` and takes theirs: 32 values.
    const uint64_t* exchange(unsigned mask, uint64_t value) {
        Fiber& own = fibers_[current_];
        if ((mask >> current_ % 32 & 1) == 0) fail("a thread exchanges values in whose mask it is not");
        // A thread is at most one exchange ahead of another in its warp, so two boards are enough.
        uint64_t* board = boards(current_ / 32) + 32 * (own.exchanges++ % 2);
        board[current_ % 32] = value;
        wait(State::kWarp, mask);
        return board;
    }

  private:
    enum class State { kReady, kBlock, kWarp, kEnded };
    struct Fiber {
        jmp_buf place;
        std::vector<char> stack;  // of a fiber that has run; it is kept for the next block
        State state;
        unsigned mask = 0, exchanges = 0;
        Dim3 index;
    };
    static constexpr size_t kStackBytes = 128 << 10;
    std::vector<Fiber> fibers_;
    std::vector<std::vector<uint64_t>> boards_;
    jmp_buf scheduler_;
    const std::function<void()>* kernel_ = nullptr;
    size_t current_ = 0, live_ = 0;

    [[noreturn]] static void fail(const char* what) {
        std::fprintf(stderr, "broken: %s\n", what);
        std::abort();
    }

    uint64_t* boards(size_t warp) {
        while (boards_.size() <= warp) boards_.emplace_back(64);
        return boards_[warp].data();
    }

    void start(size_t i, const Dim3& size) {
        Fiber& fiber = fibers_[i];
        fiber.state = State::kReady;
        fiber.exchanges = 0;
        fiber.index = {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
    }

    [[noreturn]] static void enter();

    bool resume(size_t i) {
        if (fibers_[i].state != State::kReady) return false;
        current_ = i;
        threadIdx = fibers_[i].index;
        if (_setjmp(scheduler_) != 0) return true;
        if (!fibers_[i].stack.empty()) _longjmp(fibers_[i].place, 1);
        fibers_[i].stack.resize(kStackBytes);
        // Only to begin with: contexts ask the operating system at each switch, `_longjmp` does not.
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibers_[i].stack.data();
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, &Block::enter, 0);
        setcontext(&context);
        fail("a fiber cannot begin");
    }

    void wait(State state, unsigned mask) {
        Fiber& own = fibers_[current_];
        own.state = state;
        own.mask = mask;
        if (_setjmp(own.place) == 0) _longjmp(scheduler_, 1);
    }

    // Lets those go on for whom all others have come; a thread that has ended is waited for by none.
    bool release(size_t count) {
        bool any = false, whole = true;
        for (size_t i = 0; i < count; ++i) {
            whole = whole && (fibers_[i].state == State::kBlock || fibers_[i].state == State::kEnded);
            if (fibers_[i].state != State::kWarp || i % 32 != size_t(__builtin_ctz(fibers_[i].mask))) continue;
            const size_t first = i / 32 * 32;
            bool here = true;
            for (size_t lane = 0; lane < 32; ++lane) {
                if ((fibers_[i].mask >> lane & 1) == 0) continue;
                if (first + lane >= count) fail("a mask names threads that the block does not have");
                const Fiber& other = fibers_[first + lane];
                here = here && other.state == State::kWarp && other.mask == fibers_[i].mask;
            }
            if (!here) continue;
            const unsigned mask = fibers_[i].mask;
            for (size_t lane = 0; lane < 32; ++lane) {
                if (mask >> lane & 1) fibers_[first + lane].state = State::kReady;
            }
            any = true;
        }
        for (size_t i = 0; whole && i < count; ++i) {
            any = any || fibers_[i].state == State::kBlock;
            if (fibers_[i].state == State::kBlock) fibers_[i].state = State::kReady;
        }
        return any;
    }
};
inline Block running_block;
inline void Block::enter() {
    Block& block = running_block;
    while (true) {  // once for each block
        (*block.kernel_)();
        --block.live_;
        block.wait(State::kEnded, 0);
    }
}

inline void __syncthreads() { running_block.wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { running_block.exchange(mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const uint64_t* given = running_block.exchange(mask, predicate != 0);
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; ++lane) ballot |= (mask >> lane & 1) != 0 && given[lane] != 0 ? 1u << lane : 0u;
    return ballot;
}
template <typename T>
T warp_value(unsigned mask, T value, unsigned lane) {
    static_assert(sizeof(T) <= 8, "a warp exchanges at most eight bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    const uint64_t* given = running_block.exchange(mask, bits);
    if (lane < 32 && (mask >> lane & 1) != 0) std::memcpy(&value, given + lane, sizeof(T));
    return value;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return warp_value(mask, value, unsigned(lane) % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return warp_value(mask, value, (threadIdx.x % 32) ^ unsigned(distance));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    return warp_value(mask, value, threadIdx.x % 32 - distance);  // below the first lane: its own
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }

template <typename T, typename Change>
T atomically(T* place, Change change) {
    const T old = *place;
    *place = change(old);
    return old;
}
template <typename T>
T atomicAdd(T* place, T value) {
    return atomically(place, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMin(T* place, T value) {
    return atomically(place, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicMax(T* place, T value) {
    return atomically(place, [=](T old) { return std::max(old, value); });
}

template <typename Visit>
void each_block(const Dim3& grid, const Dim3& block, Visit visit) {
    gridDim = grid;
    blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                visit();
            }
}

// Every thread of the grid in turn: for kernels whose threads know nothing of each other.
template <typename Kernel>
void launch_in_turn(Dim3 grid, Dim3 block, Kernel kernel) {
    each_block(grid, block, [&] {
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
            for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
                for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel();
    });
}

// Blocks in turn, the threads of each as fibers: for kernels whose threads wait for each other.
template <typename Kernel>
void launch_together(Dim3 grid, Dim3 block, Kernel kernel) {
    const std::function<void()> body = kernel;
    each_block(grid, block, [&] { running_block.run(block, body); });
}

// The next argument of a kernel in what a launch was given, aligned as its type is.
template <typename T>
T next_argument(const unsigned char* packed, size_t& at) {
    at = (at + alignof(T) - 1) / alignof(T) * alignof(T);
    T value;
    std::memcpy(&value, packed + at, sizeof(T));
    at += sizeof(T);
    return value;
}

// Launches a kernel with packed arguments; returns how many bytes of them it took.
template <typename... Arguments>
int64_t launch_packed(void (*kernel)(Arguments...), bool together, const unsigned* grid, const unsigned* block,
                      const unsigned char* packed) {
    size_t at = 0;
    const std::tuple<Arguments...> arguments{next_argument<Arguments>(packed, at)...};
    const auto body = [&] { std::apply(kernel, arguments); };
    const Dim3 blocks = {grid[0], grid[1], grid[2]}, threads = {block[0], block[1], block[2]};
    if (together) {
        launch_together(blocks, threads, body);
    } else {
        launch_in_turn(blocks, threads, body);
    }
    return int64_t(at);
}

// What tests/host_device.py calls for a kernel.
#define HOST_LAUNCH(kernel, together)                                                                                \
    extern "C" __attribute__((visibility("default"))) int64_t launch_##kernel(                                       \
        const unsigned* grid, const unsigned* block, const unsigned char* packed) {                                  \
        return launch_packed(segzero::kernel, together, grid, block, packed);                                        \
    }
