// How a fuzzer says that something does not hold: a line, and an end that sanitizers report.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "broken: %s\n", what);
    std::abort();
}

}  // namespace
