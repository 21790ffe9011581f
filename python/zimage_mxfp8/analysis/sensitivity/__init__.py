"""What quantising a layer does to the transformer's output."""
