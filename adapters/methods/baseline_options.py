"""Keys of the baselines under `method:`, which train no adapters of the project's own.

Does not import torch."""

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from adapters.methods.options import MethodOptions, Trains

_OF_ADAPTERS = ("rank", "alpha", "dropout", "dropout_on", "train_router")
_OURS = ("target_modules", "task_type", "base_model_name_or_path", "revision", "inference_mode")
"""Keys of PEFT's configuration that follow from the run's."""


def _refuse(options: MethodOptions, keys: tuple[str, ...], accepted: str) -> None:
    """Raises ValueError where a key that has no effect is given."""
    for key in keys:
        given, default = getattr(options, key), type(options).model_fields[key].default
        if given != default:
            raise ValueError(
                f"method.{key}: {given!r} given with method.kind={options.kind}; accepted: "
                f"{accepted}"
            )


class PeftOptions(MethodOptions):
    """Options of `method.kind: peft`."""

    trains: ClassVar[Trains] = "modules"

    kind: Literal["peft"] = "peft"
    """Name of the method."""
    peft: dict[str, Any] = {"peft_type": "LORA"}
    """PEFT's own configuration: `peft_type` (LORA, VERA, IA3, OFT, …) and the keys of its class,
    such as `r`; `method.targets` names the layers."""

    @model_validator(mode="after")
    def _check(self) -> "PeftOptions":
        _refuse(self, _OF_ADAPTERS, "the key of PEFT's configuration under method.peft")
        for key in _OURS:
            if key in self.peft:
                instead = "method.targets" if key == "target_modules" else "what the run has"
                raise ValueError(
                    f"method.peft.{key}: {self.peft[key]!r} given; accepted: {instead}"
                )
        if not isinstance(self.peft.get("peft_type"), str):
            raise ValueError(
                f"method.peft.peft_type: {self.peft.get('peft_type')!r} given; accepted: a kind of "
                "PEFT's, such as LORA, VERA, IA3, OFT"
            )
        return self

    def described(self, units: int) -> str:
        return f"{self.kind}, {self.peft['peft_type'].upper()}, {units} layers"

    def check_units(self, units: object) -> None:
        """PEFT itself refuses what does not fit."""


class FullOptions(MethodOptions):
    """Options of `method.kind: full`."""

    trains: ClassVar[Trains] = "backbone"

    selected: ClassVar[str] = "every parameter"

    kind: Literal["full"] = "full"
    """Name of the method."""

    @model_validator(mode="after")
    def _check(self) -> "FullOptions":
        _refuse(self, ("targets", "include_head", *_OF_ADAPTERS), f"none: {self.selected} trains")
        return self

    def described(self, units: int) -> str:
        return f"{self.kind}, {self.selected}"

    def selects(self, module: str, parameter: str) -> bool:
        """Whether a parameter of that name in a module of that class trains. A new head does in any
        case."""
        return True


class BitFitOptions(FullOptions):
    """Options of `method.kind: bitfit`."""

    selected: ClassVar[str] = "every bias"

    kind: Literal["bitfit"] = "bitfit"  # type: ignore[assignment]
    """Name of the method."""

    def selects(self, module: str, parameter: str) -> bool:
        return parameter.endswith("bias")


class LayerNormOptions(FullOptions):
    """Options of `method.kind: layernorm`."""

    selected: ClassVar[str] = "every normalisation layer"

    kind: Literal["layernorm"] = "layernorm"  # type: ignore[assignment]
    """Name of the method."""

    def selects(self, module: str, parameter: str) -> bool:
        return "norm" in module.lower()  # LayerNorm, LlamaRMSNorm, T5LayerNorm, …
