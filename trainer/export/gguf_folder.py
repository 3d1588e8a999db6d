"""A folder for llama.cpp and Ollama: a GGUF file, the Modelfile that names it, a card."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from trainer.checkpoint.saved import Saved
from trainer.config.config import Config
from trainer.errors import UserError
from trainer.export.card import Training, write_gguf_card
from trainer.export.gguf_file import (
    ADAPTER_FILE,
    MODEL_FILE,
    refuse_gguf,
    write_gguf_adapter,
    write_gguf_model,
)
from trainer.export.gguf_vocab import read_tokenizer
from trainer.export.tokenizer import save_tokenizer_of
from trainer.model.hub import end_tokens, load_model_config, resolve_folder
from trainer.tasks.registry import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def refuse(saved: Saved, config: Config, *, adapter: bool) -> None:
    """Raises UserError, before any work, for what cannot become a GGUF file: the model, its task,
    its tokenizer, or what an adapter holds beside LoRA."""
    base = _base_config(config)
    refuse_gguf(base.to_dict())
    auto_class = TASKS[config.task.kind].auto_class.__name__
    if auto_class != "AutoModelForCausalLM":
        raise UserError(
            f"--what: gguf given for a run of task.kind={config.task.kind}, a model of "
            f"{auto_class}; accepted: a run whose model continues texts"
        )
    beside = [
        name
        for name in saved.tensors
        if name.startswith(("head/", "rows/")) or name.endswith(".magnitude")
    ]
    if adapter and beside:
        raise UserError(
            f"--what: gguf-adapter given for a run that trained {beside[0].split('/')[1]} beside "
            "LoRA on linear layers; accepted: gguf, which merges it"
        )
    if not adapter:
        with TemporaryDirectory() as folder:
            save_tokenizer_of(config, saved.state, Path(folder))
            read_tokenizer(Path(folder))


@contextmanager
def inner_folder(folder: Path) -> Iterator[Path]:
    """A folder in `folder`, deleted at the end of the context."""
    inner = folder / ".safetensors"
    try:
        yield inner
    finally:
        shutil.rmtree(inner, ignore_errors=True)


def write_gguf(source: Path, out: Path, training: Training, dtype: str | None) -> None:
    """Convert the folder `source` of a merged model, or of an adapter (`dtype` None), into `out`.
    `dtype`: `auto` for that of the folder's tensors. Raises UserError."""
    from transformers import AutoTokenizer

    config, name = training.config, training.config.run.name
    adapter = dtype is None
    base = _base_config(config)
    if dtype is None:
        write_gguf_adapter(source, out / ADAPTER_FILE, base.to_dict(), name)
        use = f"llama-cli -m base.gguf --lora {ADAPTER_FILE}"
    else:
        if dtype == "auto":
            dtype = json.loads((source / "config.json").read_text(encoding="utf-8"))["dtype"]
        write_gguf_model(source, out / MODEL_FILE, dtype, name)
        use = f"llama-cli -m {MODEL_FILE}"
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    ends = end_tokens(config.model, base, tokenizer)
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in ends]
    chats = bool(tokenizer.chat_template)
    write_modelfile(out, adapter=adapter, base=training.base, stops=stops, chats=chats)
    use += f"\nollama create {name} -f Modelfile && ollama run {name}"
    write_gguf_card(out, training, use, adapter=adapter)


def write_modelfile(
    folder: Path, *, adapter: bool, base: str, stops: list[str], chats: bool
) -> None:
    """Ollama's Modelfile beside a GGUF. `base`: of an adapter; `stops`: the end tokens; `chats`:
    the GGUF has a chat template, which Ollama recognises; others get the bare prompt."""
    lines = [f"FROM ./{MODEL_FILE}"]
    if adapter:
        lines = [f"# {base} as GGUF:", "FROM ./base.gguf", f"ADAPTER ./{ADAPTER_FILE}"]
    elif not chats:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _base_config(config: Config) -> "PretrainedConfig":
    folder = resolve_folder(config.model.id, config.model.revision, with_weights=False)
    return load_model_config(folder, config.model)
