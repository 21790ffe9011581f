"""Images: the transformer between the other parts of a diffusers folder."""
