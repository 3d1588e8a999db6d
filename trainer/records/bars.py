"""tqdm's bar for where it is shown: a terminal, or a notebook, with widgets or without."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on widgets that are missing: the bar is one of text then
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
