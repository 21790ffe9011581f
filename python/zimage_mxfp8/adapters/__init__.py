"""LoRA and its kin: files read, names resolved, formulas turned into branches.

Nothing here needs torch: `conversion` merges branches into weights with NumPy, `transformer`
attaches them to layers.
"""
