"""WHAT is computed: kernels on tensors, and drivers that only know a Lens."""
