"""Variants of batch normalization, each for one of its known limits, as pure functions called like `bn_apply`.

    adaptive      evaluation by running and batch statistics                 Schneider et al. (2020)
    ghost         separate statistics for each group of examples             Hoffer, Hubara & Soudry (2017)
    renorm        batch statistics corrected towards the running statistics  Ioffe (2017)
    indexed       separate running statistics for each index                 Cooijmans et al. (2017)
    conditional   a scale and a bias for each class                          de Vries et al. (2017)
    lstm          recurrent batch normalization                              Cooijmans et al. (2017)

The formula, the moments, masks, collectives and derivatives come from `bnjax.core`.
"""
