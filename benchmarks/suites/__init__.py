"""One module per suite, with `COLUMNS`, `add_arguments` and `run`."""
