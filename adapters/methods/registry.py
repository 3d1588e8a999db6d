"""Registry of the methods by name.

`METHODS[kind]` is the method's class, `OPTIONS[kind]` the class of its keys, which imports no torch
for the methods here. A method whose class has an attribute `Options` needs only its class:
`"mine": "my_package.mine:Mine"`.
"""

from typing import TYPE_CHECKING

from adapters.registry import Registry

if TYPE_CHECKING:
    from adapters.methods.base import Method
    from adapters.methods.options import MethodOptions

METHODS: "Registry[Method, MethodOptions]" = Registry(
    __package__,
    {
        "lora": (".lora:LoRA", ".options:LoRAOptions"),
        "dora": (".dora:DoRA", ".options:DoRAOptions"),
        "pissa": (".pissa:PiSSA", ".options:PiSSAOptions"),
        "milora": (".pissa:MiLoRA", ".options:MiLoRAOptions"),
        "adalora": (".adalora:AdaLoRA", ".options:AdaLoRAOptions"),
        "dylora": (".dylora:DyLoRA", ".options:DyLoRAOptions"),
        "rlora": (".rlora:RLoRA", ".selection_options:RLoRAOptions"),
        "weightlora": (".weightlora:WeightLoRA", ".selection_options:WeightLoRAOptions"),
        "weightlora_plus": (
            ".weightlora:WeightLoRAPlus",
            ".selection_options:WeightLoRAPlusOptions",
        ),
        "lalora": (".lalora:LaLoRA", ".options:LaLoRAOptions"),
        "lelora": (".lelora.method:LeLoRA", ".lelora.options:LeLoRAOptions"),
        "peft": (".peft:Peft", ".baseline_options:PeftOptions"),
        "full": (".full:Full", ".baseline_options:FullOptions"),
        "bitfit": (".full:BitFit", ".baseline_options:BitFitOptions"),
        "layernorm": (".full:LayerNorm", ".baseline_options:LayerNormOptions"),
    },
)

OPTIONS = METHODS.options

DEFAULT = "lora"
"""The method of a configuration that names none."""
