"""From a name to a model: folders, the hub, transformers, diffusers, open_clip."""
