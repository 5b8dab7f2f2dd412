"""One program per runtime, each run by the interpreter of its own environment; see `benchmarks.decoder_peers`."""
