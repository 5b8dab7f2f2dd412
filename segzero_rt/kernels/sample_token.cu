// sample_token: the next token of each reply, greedily or at random, held to a grammar. The contract and its reference
// stand in sample_token.py.
//
// On a device one block takes a row. All that is summed are whole numbers, so the order of the threads changes nothing;
// each thread adds up a stretch of the vocabulary for the draw, so that running sums go by token numbers. What a reply
// goes on from may be written where it was read, so that the next token needs nothing of the host.
#include <new>
#include <vector>

#include "sampling.cuh"

namespace segzero {

// Fields as in `SampleJob` of sample_token_host.py.
struct SampleJob {
    const float* logits;  // [count, vocabulary]
    i64 count;
    i32 vocabulary;
    float scale;  // log2(e) / temperature; 0: greedily
    double top_p;
    Grammar grammar;
    const i32* states;      // [count]
    i32* steps_left;        // [count]
    const u64* seeds;       // [count]
    i32* places;            // [count]
    i32* token_ids;         // [count]
    i32* next_states;       // [count]; may be `states`
    i32 advance;            // 1: steps_left and places are moved on for the next token
};

SZ_HD inline Choice first_choice(const SampleJob& job, i64 row) {
    const bool budget = job.grammar.allowed != nullptr && job.steps_left[row] < job.grammar.most_steps;
    return {&job.grammar, u32(job.states[row]), job.steps_left[row], budget, true};
}

// What is left aside when nothing can be said: first that a logit be a number, then the budget. False: nothing is left.
SZ_HD inline bool loosen(Choice& choice) {
    if (!choice.numbers && !choice.budget) return false;
    if (choice.numbers) {
        choice.numbers = false;
    } else {
        choice.budget = false;
        choice.numbers = true;
    }
    return true;
}

SZ_HD inline void settle(const SampleJob& job, i64 row, i32 token) {
    job.token_ids[row] = token;
    const bool goes_on = token >= 0 && job.grammar.allowed != nullptr;
    job.next_states[row] = goes_on ? i32(advance(job.grammar, u32(job.states[row]), token)) : job.states[row];
    if (job.advance == 0) return;
    --job.steps_left[row];
    ++job.places[row];
}

#ifdef __CUDACC__

constexpr u32 kSampleThreads = 1024;  // of a block; no more, and whole warps
constexpr u32 kWarp = 32, kWholeWarp = ~0u, kMostWarps = kSampleThreads / kWarp;

// The sum of every thread's number, for all of them.
__device__ inline u64 block_sum(u64 own, u64* shared) {
    for (i32 distance = kWarp / 2; distance > 0; distance /= 2) own += __shfl_xor_sync(kWholeWarp, own, distance);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = own;
    __syncthreads();
    u64 sum = 0;
    for (u32 i = 0; i < blockDim.x / kWarp; ++i) sum += shared[i];
    __syncthreads();
    return sum;
}

// The sum of the numbers of the threads before this one.
__device__ inline u64 sum_before(u64 own, u64* shared) {
    u64 sum = own;
    for (u32 distance = 1; distance < kWarp; distance *= 2) {
        const u64 below = __shfl_up_sync(kWholeWarp, sum, distance);
        if (threadIdx.x % kWarp >= distance) sum += below;
    }
    if (threadIdx.x % kWarp == kWarp - 1) shared[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum -= own;
    for (u32 i = 0; i < threadIdx.x / kWarp; ++i) sum += shared[i];
    __syncthreads();
    return sum;
}

// A token and its logit; -1 for none.
struct Best {
    i32 token;
    float logit;

    // The larger logit, of equals the first token.
    __device__ void take(i32 other, float value) {
        if (other < 0 || (token >= 0 && (value < logit || (value == logit && other > token)))) return;
        token = other;
        logit = value;
    }
};

// The best candidate of a row, of equals the first; -1 for none.
__device__ inline i32 block_best(const float* logits, i32 vocabulary, const Choice& choice, Best* shared) {
    Best best = {-1, 0.0f};
    for (i32 token = i32(threadIdx.x); token < vocabulary; token += i32(blockDim.x)) {
        const float logit = choice.numbers ? finite(logits[token]) : 0.0f;
        if ((best.token < 0 || logit > best.logit) && choice.takes(token, logit)) best = {token, logit};
    }
    for (i32 distance = kWarp / 2; distance > 0; distance /= 2) {
        const i32 other = __shfl_xor_sync(kWholeWarp, best.token, distance);
        best.take(other, __shfl_xor_sync(kWholeWarp, best.logit, distance));
    }
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = best;
    __syncthreads();
    best = shared[0];
    for (u32 i = 1; i < blockDim.x / kWarp; ++i) best.take(shared[i].token, shared[i].logit);
    __syncthreads();
    return best.token;
}

// One block of whole warps per row; `weights` [count, vocabulary] is scratch, of which a greedy job needs none.
extern "C" __global__ void __launch_bounds__(kSampleThreads) sample_token_kernel(SampleJob job, u64* weights) {
    __shared__ u64 sums[kMostWarps];
    __shared__ Best bests[kMostWarps];
    const i64 row = blockIdx.x;
    const i32 vocabulary = job.vocabulary;
    const float* logits = job.logits + row * vocabulary;
    Choice choice = first_choice(job, row);
    i32 best = block_best(logits, vocabulary, choice, bests);
    while (best < 0 && loosen(choice)) best = block_best(logits, vocabulary, choice, bests);
    if (job.scale == 0.0f || best < 0 || !choice.numbers) {
        if (threadIdx.x == 0) settle(job, row, best);
        return;
    }
    u64* own = weights + row * vocabulary;
    const i32 stretch = (vocabulary + i32(blockDim.x) - 1) / i32(blockDim.x);
    const i32 begin = stretch * i32(threadIdx.x), limit = begin + stretch;
    const i32 end = limit < vocabulary ? limit : vocabulary;
    const float largest = finite(logits[best]);
    u64 total = 0;
    for (i32 token = begin; token < end; ++token) {
        own[token] = choice.takes(token, logits[token]) ? weigh(logits[token], largest, job.scale) : 0;
        total += own[token];
    }
    const u64 needed = needed_weight(job.top_p, block_sum(total, sums));
    WeightSearch search;
    while (!search.done()) {
        u64 heavy = 0;
        for (i32 token = begin; token < end; ++token) heavy += own[token] >= search.tried() ? own[token] : 0;
        search.take(block_sum(heavy, sums) >= needed);
    }
    u64 kept = 0;
    for (i32 token = begin; token < end; ++token) kept += own[token] >= search.lightest ? own[token] : 0;
    const u64 all = block_sum(kept, sums);
    const u64 drawn = upper_product(all, random_bits(job.seeds[row], job.places[row]));
    const u64 before = sum_before(kept, sums);
    if (before > drawn || before + kept <= drawn) return;  // it falls into another thread's stretch
    i32 token = begin;
    for (u64 sum = before; token < end; ++token) {
        sum += own[token] >= search.lightest ? own[token] : 0;
        if (sum > drawn) break;
    }
    settle(job, row, token);
}

#endif

namespace {

// Candidates of one row and their weights, in the order of tokens.
struct Candidates {
    std::vector<i32> tokens;
    std::vector<u64> weights;

    // The likeliest, of equals the first; -1 for none.
    i32 gather(const SampleJob& job, const float* logits, const Choice& choice) {
        tokens.clear();
        i32 best = -1;
        float value = 0.0f;
        const u32* allowed = job.grammar.allowed;
        if (allowed != nullptr) allowed += i64(choice.state) * job.grammar.words;
        for (i32 token = 0; token < job.vocabulary; ++token) {
            if (allowed != nullptr && token % 32 == 0 && allowed[token / 32] == 0) {
                token += 31;  // none of these 32: most of the vocabulary, inside an answer
                continue;
            }
            if (!choice.takes(token, logits[token])) continue;
            tokens.push_back(token);
            if (best < 0 || finite(logits[token]) > value) {
                best = token;
                value = finite(logits[token]);
            }
        }
        return best;
    }

    i32 draw(const SampleJob& job, const float* logits, float largest, u64 random) {
        weights.clear();
        u64 total = 0;
        for (const i32 token : tokens) {
            weights.push_back(weigh(logits[token], largest, job.scale));
            total += weights.back();
        }
        const u64 needed = needed_weight(job.top_p, total);
        WeightSearch search;
        while (!search.done()) search.take(heavy(search.tried()) >= needed);
        const u64 drawn = upper_product(heavy(search.lightest), random);
        u64 sum = 0;
        size_t i = 0;
        for (; i < tokens.size(); ++i) {
            sum += weights[i] >= search.lightest ? weights[i] : 0;
            if (sum > drawn) break;
        }
        return tokens[i];
    }

  private:
    u64 heavy(u64 from) const {
        u64 sum = 0;
        for (const u64 weight : weights) sum += weight >= from ? weight : 0;
        return sum;
    }
};

thread_local Candidates candidates;

void sample_row(const SampleJob& job, i64 row) {
    const float* logits = job.logits + row * job.vocabulary;
    Choice choice = first_choice(job, row);
    i32 best = candidates.gather(job, logits, choice);
    while (best < 0 && loosen(choice)) best = candidates.gather(job, logits, choice);
    if (job.scale != 0.0f && best >= 0 && choice.numbers) {
        best = candidates.draw(job, logits, finite(logits[best]), random_bits(job.seeds[row], job.places[row]));
    }
    settle(job, row, best);
}

}  // namespace

// 0: done; 2: no memory.
SZ_EXPORT i32 segzero_sample_token(const SampleJob* job) try {
    for (i64 row = 0; row < job->count; ++row) sample_row(*job, row);
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

}  // namespace segzero
