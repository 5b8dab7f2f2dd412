// The next token of a reply: weights in whole numbers, random bits, and a grammar over bytes. Step by step what
// sample_token.py says, so that every build draws the same token.
#pragma once

#include "portable.cuh"

namespace segzero {

constexpr i32 kWeightFraction = 32;  // sample_token.WEIGHT_BITS
constexpr u32 kDeadState = 0xFFFF;

// A `GrammarTable`, or none: `allowed` is null.
struct Grammar {
    const std::uint16_t* next_state;  // [states, 256]
    const u32* allowed;               // [states, words]
    const i32* steps_to_end;          // [states]
    const i32* token_offsets;         // [vocabulary + 1]
    const u8* token_bytes;
    const u32* end_tokens;  // [words]
    i32 words, ended, most_steps;
};

SZ_HD inline bool has_bit(const u32* bits, i32 index) { return (bits[index >> 5] >> (index & 31) & 1) != 0; }

SZ_HD inline bool is_number(float value) { return value == value; }

SZ_HD inline float finite(float value) {
    const float largest = 3.40282346638528859812e+38f;
    return value > largest ? largest : value < -largest ? -largest : value;
}

// The state after an allowed token.
SZ_HD inline u32 advance(const Grammar& grammar, u32 state, i32 token) {
    if (has_bit(grammar.end_tokens, token)) return u32(grammar.ended);
    for (i32 i = grammar.token_offsets[token]; i < grammar.token_offsets[token + 1] && state != kDeadState; ++i) {
        state = grammar.next_state[state * 256 + grammar.token_bytes[i]];
    }
    return state;
}

// A weight in fixed point: 0 for what is no number or weighs too little.
SZ_HD inline u64 weigh(float logit, float largest, float scale) {
    const float power = (finite(logit) - largest) * scale;
    if (!(power > float(-kWeightFraction - 1))) return 0;
    const float whole = floorf(power), part = power - whole;
    float value = 0.0018970622913911939f;
    value = value * part + 0.00896086823195219f;
    value = value * part + 0.05582844465970993f;
    value = value * part + 0.2401634007692337f;
    value = value * part + 0.6931502223014832f;
    value = value * part + 1.0f;
    return u64(value * 4294967296.0f) >> u32(-whole);
}

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
SZ_HD inline void philox(u32 (&words)[4], u32 first_key, u32 second_key) {
    for (i32 round = 0; round < 10; ++round) {
        const u64 first = u64(words[0]) * 0xD2511F53u, second = u64(words[2]) * 0xCD9E8D57u;
        const u32 a = u32(second >> 32) ^ words[1] ^ first_key, c = u32(first >> 32) ^ words[3] ^ second_key;
        words[1] = u32(second);
        words[3] = u32(first);
        words[0] = a;
        words[2] = c;
        first_key += 0x9E3779B9u;
        second_key += 0xBB67AE85u;
    }
}

SZ_HD inline u64 random_bits(u64 seed, i32 place) {
    u32 words[4] = {u32(place), 0, 0, 0};
    philox(words, u32(seed), u32(seed >> 32));
    return words[0] | u64(words[1]) << 32;
}

// The upper 64 bits of a product.
SZ_HD inline u64 upper_product(u64 a, u64 b) {
    const u64 a_low = u32(a), a_high = a >> 32, b_low = u32(b), b_high = b >> 32;
    const u64 middle = a_high * b_low + (a_low * b_low >> 32);
    return a_high * b_high + (middle >> 32) + ((u32(middle) + a_low * b_high) >> 32);
}

// Which tokens a row may say. `budget` holds it to those after which the tokens left still suffice.
struct Choice {
    const Grammar* grammar;
    u32 state;
    i32 steps_left;
    bool budget;
    bool numbers;  // only where the logit is a number

    SZ_HD bool takes(i32 token, float logit) const {
        if (numbers && !is_number(logit)) return false;
        if (grammar->allowed == nullptr) return true;
        if (!has_bit(grammar->allowed + i64(state) * grammar->words, token)) return false;
        if (!budget) return true;
        const u32 after = advance(*grammar, state, token);
        return after != kDeadState && grammar->steps_to_end[after] < steps_left;
    }
};

// The least weight that is kept, found bit by bit from above: the largest whose heavier and equal weights are enough.
struct WeightSearch {
    u64 lightest = 0;
    i32 bit = kWeightFraction + 1;

    SZ_HD u64 tried() const { return lightest | u64(1) << bit; }
    SZ_HD void take(bool enough) {
        if (enough) lightest = tried();
        --bit;
    }
    SZ_HD bool done() const { return bit < 0; }
};

SZ_HD inline u64 needed_weight(double top_p, u64 total) {
    const u64 needed = u64(top_p * double(total));
    return needed > 0 ? needed : 1;
}

}  // namespace segzero
