"""Training of the policy and the segmenter, and the scenes they learn from. Installed as `segzero_rt.training`."""
