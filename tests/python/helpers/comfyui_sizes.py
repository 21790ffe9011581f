"""Sizes of the Z-Image that the tests load in ComfyUI."""

DIM = 1024  # the smallest width that ComfyUI's NextDiT has with Z-Image's modulation
CAPTION, HIDDEN, LAYERS = 96, 2816, 3
