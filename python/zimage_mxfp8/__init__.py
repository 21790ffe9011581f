"""Z-Image in MXFP8."""
