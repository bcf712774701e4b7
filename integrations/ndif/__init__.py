"""A real NDIF on this machine, which serves this package's models to nnsight."""
