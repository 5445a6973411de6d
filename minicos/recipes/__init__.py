"""Recipes: experiments of at most 25 lines that run on the embedded model and draw a picture, e.g.
`python -m minicos.recipes.knockout`. Copy one and change it.

    knockout         from which frame does the answer come? attention to it is cut
    probe            where can the answer be read? a linear probe for each layer, cross-validated
    word_maps        where does each word attend? cross-attention as pictures
    head_ablation    which heads matter? each is set to zero
    steering         add the difference between two prompts to the stream
    early_selection  one of six seeds, chosen by an early clean estimate
    attribution      which part of the picture decides? gradients
    prompt_switch    until which step can another prompt change the answer?
    sae_export       activations on disk, as rows for a sparse autoencoder
    lens             the network's head applied to earlier layers
"""
