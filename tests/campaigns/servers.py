"""Do vLLM and SGLang load what is exported? The table in docs/runs.md:

    pip download --no-deps vllm==0.33.0 sglang==0.5.23 -d WHEELS
    python -m tests.campaigns.servers WHEELS

Adapters of every method on tiny models are given to the servers' own loading code, taken from their
wheels: vLLM's `PEFTHelper` (validation) and `LoRAModel.from_local_checkpoint`, SGLang's `LoRAConfig`
and `LoRAAdapter`, without a GPU and without the rest of the servers, for which empty modules stand.
Then ΔW of every matrix, as the server holds it, is compared with the merged model minus the base.
"""

import importlib
import importlib.abc
import importlib.machinery
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import lean_runs, quick_config, save_mixture, save_random_model
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run

REAL = {
    "vllm": ["vllm/lora/peft_helper.py", "vllm/lora/lora_model.py", "vllm/lora/lora_weights.py",
             "vllm/lora/utils.py"],
    "sglang": ["sglang/srt/lora/lora.py", "sglang/srt/lora/lora_config.py",
               "sglang/srt/lora/utils.py", "sglang/srt/layers/utils/common.py"],
}  # fmt: skip
"""Files of the servers that run; all other modules of theirs are empty."""
METHODS = {
    "lora": (), "dora": (), "pissa": (), "milora": (), "lelora": (),
    "lalora": (), "rlora": (), "weightlora": ("method.warmup_steps=2",),
    "weightlora_plus": ("method.warmup_steps=2",),
    "adalora": ("method.tinit=1", "method.tfinal=1", "method.delta_t=1"), "dylora": (),
}  # fmt: skip
MODELS = ("llama", "qwen3_moe", "mixtral")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = {
    "llama": ("gate_proj", "up_proj", "down_proj"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj"),
    "mixtral": ("w1", "w2", "w3"),
}  # fmt: skip
MAX_RANK = 64


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the real files, and for any other module of the servers an empty one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in REAL:
            return None
        file = self.folder / (name.replace(".", "/") + ".py")
        if file.is_file():
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        class Module(ModuleType):
            PIN_MEMORY = False

            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return MagicMock(name=name)

        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It stays empty."""


def unpack(wheels: Path, folder: Path) -> dict[str, str]:
    """The real files of the servers; returns their versions."""
    versions = {}
    for server, files in REAL.items():
        (wheel,) = wheels.glob(f"{server}-*.whl")
        versions[server] = wheel.name.split("-")[1]
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                archive.extract(file, folder)
    sys.meta_path.insert(0, Empty(folder))
    layers = importlib.import_module("sglang.srt.layers.utils")
    common = importlib.import_module("sglang.srt.layers.utils.common")
    layers.get_layer_id = common.get_layer_id  # type: ignore[attr-defined]
    return versions


def by_vllm(adapter: Path, model: str) -> Iterator[tuple[str, Tensor]]:
    """(matrix, ΔW) as vLLM holds them. Raises what it raises."""
    helpers = importlib.import_module("vllm.lora.peft_helper")
    loader = importlib.import_module("vllm.lora.lora_model")
    helper = helpers.PEFTHelper.from_local_dir(str(adapter), 256)
    helper.validate_legal(SimpleNamespace(max_lora_rank=MAX_RANK))
    expected = {*ATTENTION, *PROJECTIONS[model], "experts"}
    expected |= {f"experts.{e}.{name}" for e in range(4) for name in PROJECTIONS[model]}
    loaded = loader.LoRAModel.from_local_checkpoint(
        str(adapter), expected, helper, lora_model_id=1, device="cpu"
    )
    stacks: dict[str, dict[tuple[int, str], Any]] = {}
    for name, lora in loaded.loras.items():
        # The declared rank (of an expert, the common one) is not used: buffers take the tensors'.
        assert lora.lora_a.shape[0] <= MAX_RANK, f"{name}: rank {lora.lora_a.shape[0]}"
        stack, _, expert = name.rpartition(".experts.")
        if stack:
            number, projection = expert.split(".")
            stacks.setdefault(stack, {})[int(number), projection] = lora
        yield name, lora.scaling * (lora.lora_b @ lora.lora_a)
    packed = importlib.import_module("vllm.lora.lora_weights").PackedLoRALayerWeights
    first, second, down = ("w1", "w3", "w2") if model == "mixtral" else PROJECTIONS[model]
    for stack, loras in stacks.items():
        order = [(expert, name) for expert in range(4) for name in (first, down, second)]
        packed.pack_moe([loras.get(key) for key in order], stack)


def by_sglang(adapter: Path, model: str) -> Iterator[tuple[str, Tensor]]:
    """The same of SGLang, whose buffers have one rank for all matrices, and hold q, k and v, and gate
    and up, together."""
    configs = importlib.import_module("sglang.srt.lora.lora_config")
    loader = importlib.import_module("sglang.srt.lora.lora")
    config = configs.LoRAConfig(str(adapter))
    assert not config.use_dora, "DoRA"
    base = AutoConfig.from_pretrained(adapter.parent.parent / "model")
    held = loader.LoRAAdapter("a", config, base, None, None)
    held.initialize_weights_from_tensors(load_file(adapter / "adapter_model.safetensors"))
    size = base.head_dim
    heads = [base.num_attention_heads * size] + 2 * [base.num_key_value_heads * size]
    for layer in held.layers:
        for name, A in layer.weights.items():
            if "lora_A" not in name:
                continue
            B = layer.weights[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            parts = [path]
            rows = [B.shape[0]]
            if path.endswith("qkv_proj"):
                parts = [path.replace("qkv_proj", one) for one in ATTENTION[:3]]
                rows = heads
            elif path.endswith("gate_up_proj"):
                parts = [path.replace("gate_up_proj", one) for one in ("gate_proj", "up_proj")]
                rows = [B.shape[0] // 2] * 2
            assert A.shape[0] == len(parts) * config.r, (
                f"buffer of rank {config.r} x {len(parts)}, matrix of {A.shape[0]}: {path}"
            )
            pieces = zip(parts, A.chunk(len(parts)), B.split(rows), strict=True)
            for part, left, right in pieces:
                yield part, held.scaling * (right @ left)


def check(loaded: Iterator[tuple[str, Tensor]], delta: dict[str, Tensor], model: str) -> str:
    """Whether all that was learned is there, and is what was learned."""
    found = {}
    for name, value in loaded:
        if model == "mixtral":  # SGLang renames them
            for new, old in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                name = name.replace(f".{new}", f".{old}") if ".experts." in name else name
        found[name] = value
    learned = {name for name, value in delta.items() if value.abs().max() > 1e-5}
    missing = sorted(learned - set(found))
    if missing:
        return f"no: lost {len(missing)} of {len(learned)}, such as {missing[0]}"
    worst = max(float((found[name] - delta[name]).abs().max()) for name in found)
    size = max(float(value.abs().max()) for value in delta.values())
    return "yes" if worst < 1e-4 * max(1.0, size) + 1e-5 else f"no: ΔW differs by {worst:.2g}"


def outcome(load: Callable[[Path, str], Iterator], adapter: Path, delta: dict, model: str) -> str:
    try:
        return check(load(adapter, model), delta, model)
    except Exception as error:
        return f"no: {str(error).splitlines()[0][:110] if str(error) else repr(error)}"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def trial(tmp: Path, model: str, method: str, keys: tuple[str, ...]) -> list[str]:
    """A row of the table."""
    folder = tmp / model / "model"
    if not folder.exists():
        if model == "llama":
            save_random_model(folder, "llama", AutoModelForCausalLM)
        else:
            save_mixture(folder, model)
    config = quick_config(
        tmp / model, f"model.id={folder}", "run.steps=3", f"run.name={method}", "data.eval=null",
        "method.targets=all-linear", "method.rank=4", f"method.kind={method}", *keys,
    )  # fmt: skip
    row = [model, f"`{method}`"]
    out = tmp / model / method
    try:
        with lean_runs():
            run(config, World())
        merged = tmp / model / method / "merged"
        export_run(config.run_folder, merged, World(), what="merged", dtype="float32")
        export_run(config.run_folder, out / "adapter", World())
    except UserError as error:
        return [*row, "", f"not trained: {error}", ""]
    base = tensors_of(folder)
    delta = {
        name.removesuffix(".weight"): value - base[name]
        for name, value in tensors_of(merged).items()
        if value.dim() == 2 and "embed" not in name and "lm_head" not in name
    }
    patterns = "yes" if '"rank_pattern": {}' not in config_of(out / "adapter") else "no"
    row += [patterns, outcome(by_vllm, out / "adapter", delta, model)]
    same = out / "adapter"
    try:
        export_run(config.run_folder, out / "same", World(), same_rank=True)
        same = out / "same"
    except UserError:
        pass  # DoRA has no such layout
    return [*row, outcome(by_sglang, same, delta, model)]


def config_of(adapter: Path) -> str:
    return (adapter / "adapter_config.json").read_text(encoding="utf-8")


def main() -> None:
    torch.manual_seed(0)
    tmp = Path(tempfile.mkdtemp(prefix="servers-"))
    try:
        versions = unpack(Path(sys.argv[1]), tmp / "servers")
        head = ["model", "method", "rank patterns", f"vLLM {versions['vllm']}"]
        head.append(f"SGLang {versions['sglang']}, `--same-rank`")
        print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head))))
        for model in MODELS:
            for method, keys in METHODS.items():
                print(f"| {' | '.join(trial(tmp, model, method, keys))} |", flush=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


if __name__ == "__main__":
    main()
