// What nvcc and g++ both compile: every function here and in the files beside it runs on the host and on the device.
//
// No allocation, no exceptions, no standard library beyond <cmath> and <cstring>: memory comes from the caller, and what
// goes wrong is a code. Floating-point contraction is off in every build (`-ffp-contract=off`, `-fmad=false`), so that a
// fused multiply-add stands exactly where `fmaf` is written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SZ_HD __host__ __device__
// Functions with several callers and many branches: inlined into one kernel they would take ptxas minutes.
#define SZ_HD_CALL __host__ __device__ __noinline__
#define SZ_HD_INLINE __host__ __device__ inline
#else
// Small steps of a reader: only inlined do its place and its end stay in registers.
#define SZ_HD_INLINE inline __attribute__((always_inline))
#define SZ_HD
#define SZ_HD_CALL
#endif

// What the host's library shows to its caller; everything else is hidden.
#define SZ_EXPORT extern "C" __attribute__((visibility("default")))

namespace segzero {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

// A span of a reply, in bytes. 32 bits: the host refuses longer replies.
struct Span {
    u32 begin;
    u32 end;
};

SZ_HD inline bool is_finite(double value) { return value - value == 0.0; }
SZ_HD inline bool is_digit(u8 c) { return c >= '0' && c <= '9'; }
SZ_HD inline u8 ascii_lower(u8 c) { return c >= 'A' && c <= 'Z' ? u8(c + 32) : c; }
SZ_HD inline bool is_letter(u8 c) { return ascii_lower(c) >= 'a' && ascii_lower(c) <= 'z'; }

// The first `wanted` in [at, end), or `end`.
SZ_HD inline u32 find_byte(const u8* text, u32 at, u32 end, u8 wanted) {
#ifdef __CUDA_ARCH__
    while (at < end && text[at] != wanted) ++at;
    return at;
#else
    if (at < end && text[at] == wanted) return at;  // tags often follow each other, or with a line feed between them
    if (at + 1 < end && text[at + 1] == wanted) return at + 1;
    const void* found = at < end ? std::memchr(text + at, wanted, end - at) : nullptr;
    return found == nullptr ? end : u32(static_cast<const u8*>(found) - text);
#endif
}

// Whether `word` (its length without the closing NUL) stands at `at`.
template <u32 N>
SZ_HD inline bool starts_with(const u8* text, u32 at, u32 end, const char (&word)[N]) {
    if (end < at || end - at < N - 1) return false;
#ifdef __CUDA_ARCH__
    for (u32 i = 0; i < N - 1; ++i) {
        if (text[at + i] != u8(word[i])) return false;
    }
    return true;
#else
    return std::memcmp(text + at, word, N - 1) == 0;  // one or two comparisons of whole words
#endif
}

// The first place of `word` wholly inside [at, end), or `end` + 1.
template <u32 N>
SZ_HD inline u32 find_word(const u8* text, u32 at, u32 end, const char (&word)[N]) {
    for (at = find_byte(text, at, end, u8(word[0])); at < end; at = find_byte(text, at + 1, end, u8(word[0]))) {
        if (starts_with(text, at, end, word)) return at;
    }
    return end + 1;
}

// The last place of `word` wholly inside [0, end), or `end` + 1.
template <u32 N>
SZ_HD inline u32 find_last_word(const u8* text, u32 end, const char (&word)[N]) {
    for (u32 at = end; at-- > 0;) {
        if (text[at] == u8(word[0]) && starts_with(text, at, end, word)) return at;
    }
    return end + 1;
}

}  // namespace segzero
