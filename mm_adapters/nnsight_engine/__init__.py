"""Sites in nnsight's interleaver."""
