"""Measurements against peers, baselines and ablations. Nothing in here is installed."""
