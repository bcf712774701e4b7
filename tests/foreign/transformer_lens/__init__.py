"""TransformerLens' own tests, passed by our towers in place of its HookedTransformer and its bridge."""
