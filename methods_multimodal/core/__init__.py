"""What methods share: records, batches, progress, what they ask of a model."""
