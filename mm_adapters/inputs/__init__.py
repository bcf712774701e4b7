"""Raw texts and images as a model's own arguments."""
