"""What is wrong with the batch normalization of a model: `measure` finds it, `plot` draws it."""
