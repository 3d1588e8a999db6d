"""The methods by name; the one place that lists them."""

from adapters.methods.adalora import AdaLoRA
from adapters.methods.base import Method
from adapters.methods.dylora import DyLoRA
from adapters.methods.lalora import LaLoRA
from adapters.methods.lelora.method import LeLoRA
from adapters.methods.lora import LoRA
from adapters.methods.pissa import MiLoRA, PiSSA
from adapters.methods.weightlora import RLoRA, WeightLoRA, WeightLoRAPlus

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "pissa": PiSSA,
    "milora": MiLoRA,
    "adalora": AdaLoRA,
    "dylora": DyLoRA,
    "rlora": RLoRA,
    "weightlora": WeightLoRA,
    "weightlora_plus": WeightLoRAPlus,
    "lalora": LaLoRA,
    "lelora": LeLoRA,
}

OPTIONS = {kind: method.Options for kind, method in METHODS.items()}
