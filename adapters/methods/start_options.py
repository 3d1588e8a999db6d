"""Keys under `method.start_options`, of methods whose A may start from the data. Does not import
torch."""

from typing import Literal

from pydantic import Field

from adapters.options import Section

StartKind = Literal["lora", "activation", "gradient"]


class StartOptions(Section):
    """Keys under `method.start_options`."""

    batches: int = Field(4, gt=0)
    """Batches of `data.batch_size` that are looked at: the first ones of the run, in its own
    order."""
    passes: int = Field(2, ge=2)
    """Passes over them: more are nearer the exact singular vectors; an even number for
    gradients."""
    center: bool = True
    """start=activation: directions of the largest variance (EVA), or else of the largest sum of
    squares."""
    scale: Literal["unit", "lora", "output"] = "unit"
    """Rows of A have norm 1 (EVA), the norm of LoRA's (1/√3), or norm 1 and a gate that gives each
    component's output the size that LoRA's has."""
    ranks: Literal["fixed", "redistributed"] = "fixed"
    """Give every matrix `method.rank` components, or share them out by explained variance
    (activation) or singular values (gradient); matrices may end up without an adapter."""
    budget: float | None = Field(None, gt=0)
    """ranks=redistributed: mean rank of all matrices; none: `method.rank`."""
    count: Literal["parameters", "components"] = "parameters"
    """ranks=redistributed: the budget counts trained parameters, so that there are no more than at
    equal ranks, or components (EVA)."""
    rho: float = Field(2.0, ge=1)
    """ranks=redistributed: largest rank of a matrix, over `method.rank`."""

    def check(self, start: StartKind) -> None:
        """Raises ValueError, naming the key, for what has no effect with this `method.start`."""
        defaults = type(self).model_construct()  # keys of a saved configuration are all given
        given = {key for key in self.model_fields_set if getattr(self, key) != getattr(defaults, key)}
        if start == "lora" and given:
            raise ValueError(
                f"method.start_options.{min(given)}: given with method.start=lora, where it has no "
                "effect; accepted: with activation or gradient"
            )
        if start == "gradient" and self.passes % 2:
            raise ValueError(
                f"method.start_options.passes: {self.passes} given; accepted with "
                "method.start=gradient: an even number"
            )
        if start == "gradient" and "center" in given:
            raise ValueError(
                "method.start_options.center: given with method.start=gradient; accepted: with "
                "activation"
            )
        if self.ranks == "fixed" and (unused := given & {"budget", "count", "rho"}):
            raise ValueError(
                f"method.start_options.{min(unused)}: given with start_options.ranks=fixed; "
                "accepted: with redistributed"
            )

    def check_fixed(self, kind: str) -> None:
        """Raises ValueError where ranks or gates would change under a method that decides them."""
        for key, accepted in (("ranks", "fixed"), ("scale", "unit or lora")):
            value = getattr(self, key)
            if value in ("redistributed", "output"):
                raise ValueError(
                    f"method.start_options.{key}: {value} given with method.kind={kind}, which "
                    f"decides ranks and gates itself; accepted: {accepted}"
                )
