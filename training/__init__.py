"""Training, in PyTorch: tabletop scenes, the base policy, the segmenter. The runtime never imports this package."""
