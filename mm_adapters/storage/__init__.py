"""How a store lies on disk; `mm_adapters.store` is what users open."""
