"""The safetensors files of a pretrained model: found, indexed, read tensor by tensor."""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError
from trainer.layout import Layout
from trainer.strict import parse_json

_SAMPLE = 4096  # bytes of each tensor that enter the digest, from its middle


class PretrainedFiles:
    """Tensors by name, read one at a time; no file is ever loaded whole."""

    def __init__(self, folder: Path, layout: Layout | None = None):
        self.folder = folder
        self._layout = layout or Layout()
        self._file_of = _index(folder)
        self._open: tuple[str, safe_open] | None = None

    def find(self, name: str, base_prefix: str) -> str | None:
        """The key under which the files hold parameter `name`, or None.

        A checkpoint may have been saved from the bare backbone (no `model.` or `bert.` prefix) or
        with TensorFlow's names for a layer norm's parameters.
        """
        for known_as in self._layout.names(name):
            key = self._find(known_as, base_prefix)
            if key is not None:
                return key
        return None

    def _find(self, name: str, base_prefix: str) -> str | None:
        candidates = [name, f"{base_prefix}.{name}"]
        if name.startswith(base_prefix + "."):
            candidates.append(name[len(base_prefix) + 1 :])
        for candidate in candidates:
            old = candidate.replace("LayerNorm.weight", "LayerNorm.gamma")
            old = old.replace("LayerNorm.bias", "LayerNorm.beta")
            for key in (candidate, old):
                if key in self._file_of:
                    return key
        return None

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the dtype of the file."""
        with self._reading(key) as file:
            return file.get_tensor(key)

    def check(self, names: list[str], base_prefix: str, shape: tuple[int, ...]) -> str:
        """The key of a parameter known by `names` (several if tied). UserError: absent, or it has
        another shape or no floating-point dtype of ours (prequantised files would load as noise).
        """
        keys = (self.find(name, base_prefix) for name in names)
        key = next((key for key in keys if key is not None), None)
        if key is None:
            near = difflib.get_close_matches(names[0], self._file_of, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise UserError(f"model.id: {self.folder}: no tensor for {names[0]}{hint}")
        stored, dtype = self._header(key)
        if stored != shape:
            raise UserError(
                f"model.id: {self.folder}: {key} is {stored}, config.json makes it {shape}"
            )
        if dtype not in ("F32", "F16", "BF16"):
            raise UserError(
                f"model.id: {self.folder}: {key} is stored as {dtype}; "
                "accepted: float32, float16 or bfloat16"
            )
        return key

    def check_expert(
        self, stack: str, expert: int, base_prefix: str, shape: tuple[int, int, int]
    ) -> list[str]:
        """The keys whose matrices, one below the other, are an expert's (out, in) of `stack`, of
        `shape` (E, out, in); or the key of the whole stack. UserError as in `check`."""
        whole = self.find(stack, base_prefix)
        parts = self._layout.expert_parts(stack, expert)
        if whole is not None or not parts:
            return [self.check([stack], base_prefix, shape)]
        rows = shape[1] // len(parts)
        return [self.check(names, base_prefix, (rows, shape[2])) for names in parts]

    def read_expert(
        self, stack: str, expert: int, base_prefix: str, shape: tuple[int, int, int]
    ) -> Tensor:
        """One expert's matrix (out, in)."""
        keys = self.check_expert(stack, expert, base_prefix, shape)
        if len(self._header(keys[0])[0]) == 3:
            with self._reading(keys[0]) as file:
                return file.get_slice(keys[0])[expert]
        return torch.cat([self.read(key) for key in keys])

    def _header(self, key: str) -> tuple[tuple[int, ...], str]:
        with self._reading(key) as file:
            part = file.get_slice(key)
            return tuple(part.get_shape()), part.get_dtype()

    @contextmanager
    def _reading(self, key: str) -> Iterator[safe_open]:
        """The open file of a tensor; one at a time stays open. What goes wrong is a UserError."""
        file = self._file_of[key]
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(self.folder / file, framework="pt"))
            yield self._open[1]
        except Exception as error:  # safetensors', the system's, and torch's for a dtype or shape
            raise _unreadable(self.folder / file, error) from error

    def digest(self) -> str:
        """Identity of the weights: every tensor's name, dtype, shape and a sample of its bytes.

        A sample, since reading 140 GB to resume a run would take longer than loading it.
        """
        digest = hashlib.sha256()
        for key in sorted(self._file_of):
            tensor = self._slice(key)
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes()[:_SAMPLE])
        return digest.hexdigest()

    def _slice(self, key: str) -> Tensor:
        with self._reading(key) as file:
            part = file.get_slice(key)
            shape = part.get_shape()
            if not shape:
                return file.get_tensor(key).reshape(1)
            middle = shape[0] // 2
            return part[middle : middle + 1].reshape(-1)


def _index(folder: Path) -> dict[str, str]:
    """File name by tensor name."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            file_of = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
            absent = [
                file
                for file in set(file_of.values())
                if Path(file).name != file or not (folder / file).is_file()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"model.id: {index}: no index of safetensors files") from error
        if absent:
            raise UserError(f"model.id: {folder}: {absent[0]} is named in the index but not there")
        return file_of
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        given = f"only {', '.join(others)}" if others else "no weights"
        raise UserError(
            f"model.id: {folder}: {given}; accepted: .safetensors files (pickles are never loaded)"
        )
    file_of = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                file_of.update(dict.fromkeys(opened.keys(), file.name))
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    return file_of


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"model.id: {file}: not a readable safetensors file ({error})")
