"""PEFT's own adapters, of any kind that it injects into layers: the yardstick for those here.

PEFT wraps linear layers of the frozen backbone. What it adds is small, so every rank holds it
whole, as it holds this project's adapters: the optimizer trains it, and no sharder sees it. A kind
whose steps PEFT steers from its own loop (AdaLoRA) or that changes W is refused.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.layers.base import AdaptedLayer
from adapters.methods.base import InitialAdapter, Method
from adapters.methods.baseline_options import PeftOptions
from adapters.unit import Unit

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_NAME = "default"
_TENSORS = "adapter_model.safetensors"
_REFUSED = {
    "ADALORA": "method.kind=adalora",  # its ranks are changed from a training loop
    "ADAPTION_PROMPT": "a kind that adapts linear layers",
    "SHADOW": "a kind that adapts linear layers",
    "LN_TUNING": "a kind that adapts linear layers",
    "TRAINABLE_TOKENS": "model.added_tokens",
    "POLY": "a kind that needs no task of a record",
    "XLORA": "a kind without adapters of its own",
    "OSF": "a kind that leaves the backbone as it is",
}
_READ_SHAPES_ONLY = ("LORA", "VERA", "IA3", "OFT", "LOHA", "LOKR")
"""Kinds that start without a look at the weights (LoRA unless it is DoRA)."""
_STARTS = (True, False, "gaussian", "orthogonal")
"""`init_lora_weights` that leave W as it is."""


class Peft(Method):
    """Modules of PEFT's; no decisions."""

    Options = PeftOptions

    def __init__(self, options: PeftOptions, seed: int):
        super().__init__(options, seed)
        self._wrapper: PeftModel | None = None
        self._trained: dict[str, nn.Parameter] = {}
        self._fixed: dict[str, Tensor] = {}

    def attach(
        self,
        units: Sequence[Unit],
        layers: Mapping[str, AdaptedLayer],
        device: torch.device,
        initial_adapters: Mapping[str, InitialAdapter] | None = None,
    ) -> None:
        """Nothing: `attach_modules` does it."""
        self.adapters.units = list(units)

    def check(self, units: Sequence[Unit]) -> None:
        configuration(self.options, [unit.name for unit in units])

    @classmethod
    def trained_size(cls, model: nn.Module, options: PeftOptions, targets: Sequence[str]) -> int:
        _, trained, _ = inject(copy.deepcopy(model), configuration(options, targets), 0)
        return sum(parameter.numel() for parameter in trained.values())

    @property
    def reads_weights(self) -> bool:
        given = self.options.peft
        return given["peft_type"].upper() not in _READ_SHAPES_ONLY or bool(given.get("use_dora"))

    def attach_modules(self, model: nn.Module) -> None:
        config = configuration(self.options, [unit.name for unit in self.units])
        self._wrapper, self._trained, self._fixed = inject(model, config, self.seed)

    @property
    def trained_parameters(self) -> Mapping[str, nn.Parameter]:
        return self._trained

    def exported(self) -> tuple["PeftModel", dict[str, Tensor]]:
        """PEFT's view of the model, and all that PEFT added, by its names."""
        assert self._wrapper is not None
        return self._wrapper, {**self._trained, **self._fixed}

    @contextmanager
    def without(self) -> Iterator[None]:
        assert self._wrapper is not None
        with self._wrapper.disable_adapter():
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """What PEFT drew and does not train, such as VeRA's shared A and B."""
        return dict(self._fixed)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._fixed.items():
            tensor.copy_(state[name])


def configuration(options: PeftOptions, targets: Sequence[str]) -> "PeftConfig":
    """PEFT's configuration for the layers `targets`. Raises ValueError naming the key."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    given = dict(options.peft)
    kind = str(given.pop("peft_type")).upper()
    known = {
        one.value
        for one in PEFT_TYPE_TO_TUNER_MAPPING
        if one.value not in _REFUSED and _adapts_layers(PEFT_TYPE_TO_CONFIG_MAPPING[one])
    }
    if kind not in known:
        accepted = _REFUSED.get(kind, ", ".join(sorted(known)))
        raise ValueError(f"method.peft.peft_type: {kind} given; accepted: {accepted}")
    made: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    unknown = [key for key in given if key not in made.__dataclass_fields__]
    if unknown:
        accepted = ", ".join(sorted(made.__dataclass_fields__.keys() - {"target_modules"}))
        raise ValueError(f"method.peft.{unknown[0]}: unknown to {kind}; accepted: {accepted}")
    for key, none in (("bias", "none"), ("modules_to_save", None)):
        if given.get(key, none) != none:
            raise ValueError(f"method.peft.{key}: {given[key]!r} given; accepted: {none or 'null'}")
    if given.get("init_lora_weights", True) not in _STARTS:
        raise ValueError(
            f"method.peft.init_lora_weights: {given['init_lora_weights']!r} given, which changes "
            f"the backbone; accepted: {', '.join(map(str, _STARTS))}"
        )
    if isinstance(inner := given.get("feedforward_modules"), list):  # IA³: among the targets
        ends = tuple(f".{name}" for name in inner)
        given["feedforward_modules"] = [t for t in targets if f".{t}".endswith(ends)]
    try:
        return made(target_modules=list(targets), **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method.peft: {error}; accepted: what PEFT's {kind} takes") from error


def kind_of(config: "PeftConfig") -> str:
    """PEFT's name of the kind."""
    from peft.utils import PeftType

    return PeftType(config.peft_type).value


def _adapts_layers(kind: Any) -> bool:
    from peft import PromptLearningConfig

    return "target_modules" in kind.__dataclass_fields__ and not issubclass(
        kind, PromptLearningConfig
    )


def inject(
    model: nn.Module, config: "PeftConfig", seed: int
) -> tuple["PeftModel", dict[str, nn.Parameter], dict[str, Tensor]]:
    """Put PEFT's modules into `model`, the same on every rank: (PEFT's view of it, what trains,
    what PEFT added beside), by PEFT's names. Raises ValueError where PEFT cannot."""
    from peft import get_peft_model

    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    trained_before = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        try:
            wrapper = get_peft_model(model, config, adapter_name=_NAME)
        except Exception as error:  # each kind raises what it likes
            first = str(error).strip().partition("\n")[0]
            raise ValueError(f"method.peft: {first}; accepted: what PEFT takes") from error
    for parameter in trained_before:  # PEFT has frozen all but its own
        parameter.requires_grad_(True)
    names: dict[int, str] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in (
        *wrapper.named_parameters(remove_duplicate=False),
        *wrapper.named_buffers(remove_duplicate=False),
    ):
        tensors[id(tensor)] = tensor
        if id(tensor) not in names or len(name) < len(
            names[id(tensor)]
        ):  # shared ones: the tuner's
            names[id(tensor)] = name
    if held.keys() - tensors.keys():
        raise ValueError(
            f"method.peft: {kind_of(config)} replaces parameters of the backbone; accepted: "
            "a kind that leaves it as it is"
        )
    new = {names[key]: tensor for key, tensor in tensors.items() if key not in held}
    trained = {n: t for n, t in new.items() if isinstance(t, nn.Parameter) and t.requires_grad}
    for name, tensor in trained.items():
        if tensor.dim() == 0:
            raise ValueError(f"method.peft: {name} is a scalar; accepted: kinds without")
    if not trained:
        raise ValueError("method.peft: nothing to train; accepted: a configuration that trains")
    return wrapper, trained, {n: t for n, t in new.items() if n not in trained}


def save(
    wrapper: "PeftModel",
    folder: Path,
    tensors: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    described: Mapping[str, Any],
) -> None:
    """PEFT's folder of an adapter. `tensors`: all that PEFT added, by its names; `heads`: modules
    trained in full, by path; `described`: keys of its configuration that follow from the run."""
    from peft import get_peft_model_state_dict

    own = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    found = get_peft_model_state_dict(wrapper, state_dict=own, save_embedding_layers=False)
    for path, head in heads.items():
        found |= {f"base_model.model.{path}.{n}": t.detach().cpu() for n, t in head.items()}
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.clone().contiguous() for name, tensor in found.items()}
    save_file(whole, folder / _TENSORS, metadata={"format": "pt"})
    config = wrapper.peft_config[_NAME]
    held = {key: getattr(config, key) for key in described}
    try:
        for key, value in {**described, "inference_mode": True}.items():
            setattr(config, key, value)
        config.save_pretrained(str(folder))
    finally:
        for key, value in {**held, "inference_mode": False}.items():
            setattr(config, key, value)
