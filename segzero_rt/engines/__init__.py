"""Engines of TensorRT and TensorRT-RTX: built from a bundle's graphs, recorded in its manifest, run on the device."""
