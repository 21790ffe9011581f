"""Why a recipe is what it is: what quantisation costs a checkpoint, and where."""
