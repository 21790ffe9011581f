"""Effect of quantising a layer on the transformer's output."""
