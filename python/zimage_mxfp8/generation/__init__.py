"""Image generation: the transformer with the other parts of a diffusers folder."""
