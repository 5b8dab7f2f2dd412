"""What `benchmarks.gpu_check` is made of: carried files in pieces, stages within a time budget, and measurements."""
