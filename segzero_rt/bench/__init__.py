"""What `segzero bench` measures, one file per kind of measurement."""
