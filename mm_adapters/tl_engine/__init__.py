"""HookPoints, caches and towers for TransformerLens."""
