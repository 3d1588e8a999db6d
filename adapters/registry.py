"""The methods by name; the one place that lists them."""

from adapters.adalora import AdaLoRA
from adapters.dylora import DyLoRA
from adapters.lalora import LaLoRA
from adapters.lelora import LeLoRA
from adapters.lora import LoRA
from adapters.method import Method
from adapters.pissa import MiLoRA, PiSSA
from adapters.weightlora import RLoRA, WeightLoRA, WeightLoRAPlus

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
