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

import os
import sys
from types import TracebackType

from minicos.errors import MinicosError


def in_one_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print a mistake that a user can fix as the `minicos` command does (for `sys.excepthook`)."""
    if isinstance(error, MinicosError):
        print(f"minicos: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # this package is imported for `python -m minicos.recipes.NAME`
    sys.excepthook = in_one_sentence
    # Figures are files, so no backend is needed; matplotlib fails to import if it is unknown.
    os.environ.pop("MPLBACKEND", None)
