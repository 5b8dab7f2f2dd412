// Enough of CUDA for g++ to compile device code and run it: a grid's threads one after another, or the threads of a block
// side by side where they wait for each other. Include it before a kernel's source.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __CUDACC__ 1
#define __CUDA_ARCH__ 800
#define __global__
#define __host__
#define __device__
#define __shared__ static

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dim3 threadIdx, blockIdx;
inline Dim3 blockDim, gridDim;

// Lets the threads of a block go on when all of them have come.
class BlockBarrier {
  public:
    void expect(unsigned count) { count_ = count; }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const unsigned long round = round_;
        if (++waiting_ == count_) {
            waiting_ = 0;
            ++round_;
            changed_.notify_all();
        } else {
            changed_.wait(lock, [&] { return round_ != round; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    unsigned count_ = 1, waiting_ = 0;
    unsigned long round_ = 0;
};
inline BlockBarrier block_barrier;
inline void __syncthreads() { block_barrier.wait(); }

// Every thread of the grid in turn: for kernels whose threads know nothing of each other.
template <typename Kernel>
void launch_in_turn(Dim3 grid, Dim3 block, Kernel kernel) {
    gridDim = grid;
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
                for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
                    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel();
}

// Blocks in turn, the threads of each side by side: for kernels with `__syncthreads` and one dimension.
template <typename Kernel>
void launch_together(unsigned blocks, unsigned threads, Kernel kernel) {
    gridDim = {blocks, 1, 1};
    blockDim = {threads, 1, 1};
    block_barrier.expect(threads);
    for (unsigned block = 0; block < blocks; ++block) {
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread) {
            running.emplace_back([=] {
                blockIdx = {block, 0, 0};
                threadIdx = {thread, 0, 0};
                kernel();
            });
        }
        for (std::thread& one : running) one.join();
    }
}
