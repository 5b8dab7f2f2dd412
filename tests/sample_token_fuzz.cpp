// Under the sanitizers: random logits, grammars and budgets through the host's code and through the device's kernel, whose
// threads run side by side; both have to choose the same tokens. Arguments: how many batches, and the seed.
#include "cuda_on_host.hpp"
//
#include "../segzero_rt/kernels/sample_token.cu"
#include "fuzz_check.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

using namespace segzero;

namespace {

float random_logit(std::mt19937& random) {
    switch (random() % 16) {
        case 0: return NAN;
        case 1: return random() % 2 ? HUGE_VALF : -HUGE_VALF;
        case 2: return 0.0f;
        default: return float(i32(random() % 4000) - 2000) * 0.01f;
    }
}

// Any automaton over four bytes, any tokens of up to five of them; what is allowed is what can be spelled.
struct RandomGrammar {
    std::vector<std::uint16_t> next_state;
    std::vector<u32> allowed, end_tokens;
    std::vector<i32> steps_to_end, token_offsets{0};
    std::vector<u8> token_bytes;

    Grammar make(std::mt19937& random, i32 states, i32 vocabulary) {
        const i32 words = (vocabulary + 31) / 32;
        next_state.assign(size_t(states) * 256, std::uint16_t(kDeadState));
        for (i32 state = 0; state + 1 < states; ++state) {
            for (i32 byte = 0; byte < 4; ++byte) {
                if (random() % 4) next_state[size_t(state * 256 + byte)] = std::uint16_t(random() % u32(states - 1));
            }
        }
        end_tokens.assign(size_t(words), 0);
        for (i32 token = 0; token < vocabulary; ++token) {
            if (random() % 20 == 0) end_tokens[size_t(token / 32)] |= 1u << token % 32;
            for (u32 length = random() % 6; length > 0; --length) token_bytes.push_back(u8(random() % 4));
            token_offsets.push_back(i32(token_bytes.size()));
        }
        i32 most = 0;
        for (i32 state = 0; state < states; ++state) {
            steps_to_end.push_back(state + 1 == states ? 0 : i32(random() % 9));
            most = steps_to_end.back() > most ? steps_to_end.back() : most;
        }
        Grammar grammar = {next_state.data(), nullptr, steps_to_end.data(), token_offsets.data(), token_bytes.data(),
                           end_tokens.data(), words, states - 1, most};
        allowed.assign(size_t(states) * size_t(words), 0);
        for (i32 state = 0; state < states; ++state) {
            for (i32 token = 0; token < vocabulary; ++token) {
                if (random() % 5 == 0 || advance(grammar, u32(state), token) == kDeadState) continue;
                allowed[size_t(state * words + token / 32)] |= 1u << token % 32;
            }
        }
        grammar.allowed = allowed.data();
        return grammar;
    }
};

void run(std::mt19937& random) {
    const i32 vocabulary = 1 + i32(random() % (random() % 4 ? 90 : 700)), states = 2 + i32(random() % 6);
    const size_t count = random() % 4;
    RandomGrammar tables;
    SampleJob job = {};
    job.count = i64(count);
    job.vocabulary = vocabulary;
    job.scale = random() % 3 ? float(random() % 300) * 0.01f : 0.0f;
    job.top_p = double(1 + random() % 100) / 100;
    if (random() % 4) job.grammar = tables.make(random, states, vocabulary);
    std::vector<float> logits(count * size_t(vocabulary));
    for (float& logit : logits) logit = random_logit(random);
    std::vector<i32> at(count), left(count), places(count);
    std::vector<i32> host(count, -5), host_states(count), device(count, -6), device_states(count);
    std::vector<u64> seeds(count), weights(count * size_t(vocabulary));
    for (size_t i = 0; i < count; ++i) {
        at[i] = job.grammar.allowed == nullptr ? 0 : i32(random() % u32(states));
        left[i] = i32(random() % 12);
        places[i] = i32(random() % 1000);
        seeds[i] = u64(random()) << 32 | random();
    }
    job.logits = logits.data();
    job.states = at.data();
    job.steps_left = left.data();
    job.seeds = seeds.data();
    job.places = places.data();
    job.token_ids = host.data();
    job.next_states = host_states.data();
    check(segzero_sample_token(&job) == 0, "outcome");
    job.token_ids = device.data();
    job.next_states = device_states.data();
    launch_together({unsigned(count), 1, 1}, {32 * (1 + unsigned(random() % 2)), 1, 1}, [&] { sample_token_kernel(job, weights.data()); });
    check(host == device, "the builds choose the same tokens");
    check(host_states == device_states, "the builds are in the same states");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    std::mt19937 random(u32(std::atoi(arguments[2])));
    for (int jobs = std::atoi(arguments[1]); jobs > 0; --jobs) run(random);
    return 0;
}
