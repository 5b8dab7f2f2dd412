"""Readers of published data sets, for evaluation and for training alike."""
