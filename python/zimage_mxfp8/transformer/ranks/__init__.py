"""One forward on several devices: a process (rank) per device, each with all weights.

A batch is divided first by items, which needs no exchange (the two halves of guidance), then by
tokens: everything but attention works on single tokens, and attention on single heads, so ranks
exchange tokens for heads before it and back after it ("Ulysses", Jacobs et al., arXiv:2309.14509).
"""
