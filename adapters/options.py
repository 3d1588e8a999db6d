"""The base of every section of the configuration: typed, strict, immutable."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys and wrong types are refused; a field's docstring is its documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
