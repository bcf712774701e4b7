"""A small diffusion model that is trained again and again: what training images really did."""
