"""One forward on several devices: a process (rank) per device, each with all weights.

A batch is divided first by items, which needs no exchange (the two halves of guidance), then by
tokens: everything but attention works on single tokens, and attention needs the keys and values of
all tokens, which ranks send to each other.
"""
