"""From checkpoints to bundles, graph by graph. Needs PyTorch; installed as `segzero_rt.export`."""
