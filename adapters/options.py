"""Base class of the configuration's sections: typed, strict, immutable."""

from pydantic import BaseModel, ConfigDict

PATH = r"^[^\x00]*$"
"""Pattern of keys that name a file or a folder: file systems raise on NUL."""


class Section(BaseModel):
    """Rejects unknown keys and wrong types; a field's docstring is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
