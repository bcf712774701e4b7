"""HOW other libraries use the adapters."""
