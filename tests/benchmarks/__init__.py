"""Side by side with the peers, in one run: ratios of paired rounds, never seconds."""
