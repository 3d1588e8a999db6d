"""Index and read the safetensors files of a pretrained model, tensor by tensor."""

import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.loading import mxfp4
from trainer.loading.async_reader import Reader, read_into, unreadable
from trainer.loading.key_mapping import KeyMapping

_SAMPLE = 4096  # bytes of each tensor that enter the digest, from its middle

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Location:
    """File, offset, shape and dtype of a stored tensor."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str
    """Its dtype by safetensors' name."""

    @property
    def dtype(self) -> torch.dtype:
        if self.kind not in _DTYPES:
            raise unreadable(self.file, ValueError(f"it holds {self.kind}"))
        return _DTYPES[self.kind]

    def row(self, index: int) -> "_Location":
        """The location of one slice along the first dimension."""
        shape = self.shape[1:]
        offset = self.offset + index * math.prod(shape) * self.dtype.itemsize
        return _Location(self.file, offset, shape, self.kind)


class PretrainedFiles:
    """Reads tensors by name onto `device`; never loads a whole file."""

    def __init__(
        self,
        folder: Path,
        key_mapping: KeyMapping | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
    ):
        self.folder = folder
        self._key_mapping = key_mapping or KeyMapping()
        self._file_of = _index(folder)
        self._locations: dict[str, dict[str, _Location]] = {}
        self._reader = Reader(device)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, excluding the digest's samples."""
        return self._reader.bytes_read

    @property
    def mxfp4(self) -> bool:
        """Whether any stack of experts is stored in MXFP4."""
        return any(
            f"{key.removesuffix(mxfp4.BLOCKS)}{mxfp4.SCALES}" in self._file_of
            for key in self._file_of
            if key.endswith(mxfp4.BLOCKS)
        )

    def find(self, name: str, base_prefix: str) -> str | None:
        """The key under which the files hold parameter `name`, or None.

        A checkpoint may have been saved from the bare backbone (no `model.` or `bert.` prefix) or
        with TensorFlow's names for a layer norm's parameters.
        """
        for known_as in self._key_mapping.names(name):
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
        """One tensor, in the dtype of the file."""
        return self.begin(key)()

    def begin(self, key: str) -> Callable[[], Tensor]:
        """Start to read a tensor. Returns a function that waits for it and returns it."""
        return self._begin(self._location(key))

    def check(
        self,
        names: list[str],
        base_prefix: str,
        shape: tuple[int, ...],
        kinds: tuple[str, ...] = ("F32", "F16", "BF16"),
    ) -> str:
        """The key of a parameter with these `names` (several if tied). Raises UserError where it is
        absent, of another shape, or of a dtype not in `kinds` (prequantised files would load as
        noise)."""
        keys = (self.find(name, base_prefix) for name in names)
        key = next((key for key in keys if key is not None), None)
        if key is None:
            nearest = difflib.get_close_matches(names[0], self._file_of, n=1)
            hint = f" (nearest: {nearest[0]})" if nearest else ""
            raise UserError(f"model.id: {self.folder}: no tensor for {names[0]}{hint}")
        stored = self._location(key)
        if stored.shape != shape:
            raise UserError(
                f"model.id: {self.folder}: {key} is {stored.shape}, config.json makes it {shape}"
            )
        if stored.kind not in kinds:
            accepted = " or ".join(str(_DTYPES[kind]).removeprefix("torch.") for kind in kinds)
            raise UserError(
                f"model.id: {self.folder}: {key} is stored as {stored.kind}; accepted: {accepted}"
            )
        return key

    def check_expert(
        self,
        stack: str,
        expert: int,
        base_prefix: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
    ) -> list[str]:
        """The keys of the matrices whose concatenation by rows is one expert (out, in) of `stack`,
        of `shape` (E, out, in); or the key of the stack, (E, in, out) if `transposed`; or the two
        keys of a stack in MXFP4. Raises UserError as `check` does."""
        stored = self.find(stack, base_prefix)
        if stored is None and self.holds_mxfp4(stack, base_prefix):
            packed = mxfp4.packed_shapes(shape, transposed=transposed)
            return [
                self.check([f"{stack}{ending}"], base_prefix, of_it, ("U8",))
                for ending, of_it in packed.items()
            ]
        parts = self._key_mapping.expert_parts(stack, expert)
        if stored is not None or transposed or not parts:
            return [self.check([stack], base_prefix, shape)]
        rows = shape[1] // len(parts)
        return [self.check(names, base_prefix, (rows, shape[2])) for names in parts]

    def holds_mxfp4(self, stack: str, base_prefix: str) -> bool:
        """Whether a stack of experts is stored in MXFP4."""
        return self.find(f"{stack}{mxfp4.BLOCKS}", base_prefix) is not None

    def read_expert(
        self,
        stack: str,
        expert: int,
        base_prefix: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
    ) -> Tensor:
        """One expert's matrix (out, in), or (in, out) if `transposed`."""
        return self.begin_expert(stack, expert, base_prefix, shape, transposed=transposed)()

    def begin_expert(
        self,
        stack: str,
        expert: int,
        base_prefix: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
    ) -> Callable[[], Tensor]:
        """Start to read one expert's matrix, as `read_expert`. Returns a function as `begin`
        does."""
        keys = self.check_expert(stack, expert, base_prefix, shape, transposed=transposed)
        locations = [self._location(key) for key in keys]
        if locations[0].kind == "U8":
            blocks, scales = (self._begin(location.row(expert)) for location in locations)
            return lambda: mxfp4.unpack(blocks(), scales(), transposed=transposed)
        if len(locations[0].shape) == 3:
            return self._begin(locations[0].row(expert))
        parts = [self._begin(location) for location in locations]
        return parts[0] if len(parts) == 1 else lambda: torch.cat([part() for part in parts])

    def _begin(self, location: _Location) -> Callable[[], Tensor]:
        try:
            return self._reader.begin(
                location.file, location.offset, location.shape, location.dtype
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # from torch, for an impossible shape
            raise unreadable(location.file, error) from error

    def _location(self, key: str) -> _Location:
        file = self._file_of[key]
        if file not in self._locations:
            self._locations[file] = _locations(self.folder / file)
        if key not in self._locations[file]:
            raise unreadable(self.folder / file, KeyError(key))
        return self._locations[file][key]

    def digest(self) -> str:
        """Digest of the weights: every tensor's name, dtype, shape and a sample of its bytes.

        A sample, since hashing 140 GB to resume a run would take longer than loading it.
        """
        digest = hashlib.sha256()
        for key in sorted(self._file_of):
            location = self._location(key)
            empty = 0 in location.shape
            row = location.row(location.shape[0] // 2) if location.shape else location
            count = 0 if empty else math.prod(row.shape)
            sample = bytearray(min(count * row.dtype.itemsize, _SAMPLE))
            read_into(memoryview(sample), row.file, row.offset)
            digest.update(f"{key} {row.dtype} {[count]}".encode())
            digest.update(sample)
        return digest.hexdigest()


def _locations(file: Path) -> dict[str, _Location]:
    """Locations of a file's tensors by key. Raises UserError where it is no safetensors file."""
    try:
        with safe_open(file, framework="pt"):  # validates offsets, sizes and length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
        start = 8 + length
        return {
            key: _Location(file, start + e["data_offsets"][0], tuple(e["shape"]), e["dtype"])
            for key, e in header.items()
            if key != "__metadata__"
        }
    except Exception as error:  # of safetensors, the system and our parser
        raise unreadable(file, error) from error


def _index(folder: Path) -> dict[str, str]:
    """File name by tensor name, from the index or the files. Raises UserError."""
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
            raise unreadable(file, error) from error
    return file_of
