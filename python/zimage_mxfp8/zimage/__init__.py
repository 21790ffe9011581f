"""Facts about the Z-Image model: its layers, sizes, constants and timesteps."""
