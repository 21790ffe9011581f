"""Stands for imageio-ffmpeg, 170 MB, which SGLang imports and needs for videos only."""
