"""What a model does, as its trace shows it. The model is not run.

    program   the operations of a traced function, and the marks of layers in it
    calls     the recorder of the calls of a Linen or NNX model's layers (it needs flax)

Folding asks which layers are adjacent, and interchange which axes a layer's features come from. Both have the model
traced with `calls`, which marks the inputs and outputs of layers, and read the program.
"""
