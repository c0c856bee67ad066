"""What a model computes, read from its trace. The model is not run.

    program   the operations of a traced function, and the marks of layers in it
    calls     the recorder of the calls of a Linen or NNX model's layers (it needs flax)

Folding needs the adjacent layers, and `bnjax.interop` the axes that a layer's features come from. Both trace the model
with `calls`, which marks the inputs and outputs of layers, and read the program.
"""
