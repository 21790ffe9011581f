"""Analysis of the layers' sensitivity from weights alone."""
