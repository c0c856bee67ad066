"""Variants of batch normalization for its known limits, each a pure function with the call of `bn_apply`.

    ghost         each group of examples by its own statistics               Hoffer, Hubara & Soudry (2017)
    renorm        the batch's statistics corrected towards the running ones  Ioffe (2017)
    indexed       running statistics for each of several indices             Cooijmans et al. (2017)
    conditional   a scale and a bias for each class                          de Vries et al. (2017)
    lstm          recurrent batch normalization                              Cooijmans et al. (2017)

Formula, moments, masks, devices and derivatives are those of `bnjax.core`.
"""
