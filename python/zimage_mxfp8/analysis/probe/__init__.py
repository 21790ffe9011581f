"""Which layers are sensitive, told from weights alone."""
