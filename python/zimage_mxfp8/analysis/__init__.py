"""Why a recipe is what it is: analyses of a checkpoint."""
