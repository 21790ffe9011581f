"""The diffusion transformer: Z-Image's S3-DiT, run from an MXFP8 or a plain checkpoint."""
