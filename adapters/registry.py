"""The methods by name; the one place that lists them."""

from adapters.lora import LoRA
from adapters.method import Method

METHODS: dict[str, type[Method]] = {"lora": LoRA}
