"""Index and read the safetensors files of a pretrained model, tensor by tensor."""

import difflib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config.yaml import parse_json
from trainer.errors import UserError
from trainer.loading import mxfp4
from trainer.loading.async_reader import Reader, read_into, unreadable
from trainer.loading.key_mapping import Conversion, Converted, Key, KeyMapping

_SAMPLE = 4096  # bytes of each tensor that enter the digest, from its middle

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


_EXPERT = re.compile(r"(?<=experts\.)\d+")


@dataclass(frozen=True)
class Location:
    """File, offset, shape and dtype of a stored tensor."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: str
    """Its dtype by safetensors' name."""
    key: str

    @property
    def dtype(self) -> torch.dtype:
        if self.kind not in _DTYPES:
            raise unreadable(self.file, ValueError(f"it holds {self.kind}"))
        return _DTYPES[self.kind]

    def row(self, index: int) -> "Location":
        """The location of one slice along the first dimension."""
        shape = self.shape[1:]
        offset = self.offset + index * math.prod(shape) * self.dtype.itemsize
        return Location(self.file, offset, shape, self.kind, self.key)


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
        self._index = self._key_mapping.index(self._file_of)
        self._locations: dict[str, dict[str, Location]] = {}
        self._reader = Reader(device)
        self._begun: dict[tuple[Path, int], str] = {}
        """Keys of what was read, by file and offset."""
        self._converted: tuple[Conversion, dict[str, Tensor]] | None = None
        """The last conversion and what it made: its tensors are asked for in turn."""

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, excluding the digest's samples."""
        return self._reader.bytes_read

    @property
    def dtype(self) -> torch.dtype:
        """The most frequent one of the floating-point tensors in 16 bits or more; bfloat16 where
        all are packed."""
        wide = ("F32", "F16", "BF16")
        kinds = Counter(kind for key in self._file_of if (kind := self.stored(key).kind) in wide)
        return _DTYPES[kinds.most_common(1)[0][0] if kinds else "BF16"]

    @property
    def unused(self) -> dict[str, str]:
        """Keys that are no tensor of the model, with the name that transformers gives them."""
        return self._index.unused

    @property
    def mxfp4(self) -> bool:
        """Whether any stack of experts is stored in MXFP4."""
        return any(
            f"{key.removesuffix(mxfp4.BLOCKS)}{mxfp4.SCALES}" in self._file_of
            for key in self._file_of
            if key.endswith(mxfp4.BLOCKS)
        )

    def check_copies(self) -> None:
        """Raises UserError where two tensors that are one in the model differ. Reads both."""
        for name, used, other in self._index.copies:
            first, second = self.read(used), self.read(other)
            if first.shape != second.shape or not bool((first == second).all()):
                raise UserError(
                    f"model.id: {self.folder}: {_described(used)} and {_described(other)} differ, "
                    f"and both are {name} of the model; accepted: one of them, or equal ones"
                )

    def find(self, name: str) -> Key | None:
        """Where the files hold parameter `name`, or None."""
        return self._index.found.get(self._key_mapping.name(name))

    def read(self, key: Key) -> Tensor:
        """One tensor, in the dtype of the file."""
        return self.begin(key)()

    def begin(self, key: Key) -> Callable[[], Tensor]:
        """Start to read a tensor. Returns a function that waits for it and returns it."""
        if isinstance(key, Converted):
            return partial(self._convert, key)
        return self._begin(self.stored(key))

    def shape(self, key: Key) -> tuple[int, ...]:
        """Shape of a tensor, after its conversion."""
        if isinstance(key, Converted):
            parts = {part: self.stored(part) for part in key.conversion.keys}
            made = self._key_mapping.convert(
                key.conversion,
                {
                    part: torch.empty(where.shape, dtype=where.dtype, device="meta")
                    for part, where in parts.items()
                },
            )
            return tuple(self._made(key, made).shape)
        return self.stored(key).shape

    def check(
        self,
        names: list[str],
        shape: tuple[int, ...],
        kinds: tuple[str, ...] = ("F32", "F16", "BF16"),
    ) -> Key:
        """Where the files hold a parameter with these `names` (several if tied). Raises UserError
        where it is absent, of another shape, or of a dtype not in `kinds` (prequantised files would
        load as noise)."""
        found = (self.find(name) for name in names)
        key = next((key for key in found if key is not None), None)
        if key is None:
            nearest = difflib.get_close_matches(names[0], self._file_of, n=1)
            hint = f" (nearest: {nearest[0]})" if nearest else ""
            raise UserError(f"model.id: {self.folder}: no tensor for {names[0]}{hint}")
        self._check(key, shape, kinds)
        return key

    def _check(
        self,
        key: Key,
        shape: tuple[int, ...],
        kinds: tuple[str, ...] = ("F32", "F16", "BF16"),
    ) -> None:
        parts = key.conversion.keys if isinstance(key, Converted) else [key]
        for part in parts:
            if (kind := self.stored(part).kind) not in kinds:
                accepted = " or ".join(str(_DTYPES[k]).removeprefix("torch.") for k in kinds)
                raise UserError(
                    f"model.id: {self.folder}: {part} is stored as {kind}; accepted: {accepted}"
                )
        if (stored := self.shape(key)) != shape:
            raise UserError(
                f"model.id: {self.folder}: {_described(key)} is {stored}; accepted: {shape}, as "
                "config.json makes it"
            )

    def check_expert(
        self, stack: str, expert: int, shape: tuple[int, ...], *, transposed: bool = False
    ) -> list[Key]:
        """Where the files hold the matrices whose concatenation by rows is one expert (out, in) of
        `stack`, of `shape` (E, out, in); or the stack, (E, in, out) if `transposed`; or the blocks
        and scales of a stack in MXFP4. Raises UserError as `check` does."""
        stored = self.find(stack)
        if stored is None and self.find(f"{stack}{mxfp4.BLOCKS}") is not None:
            packed = mxfp4.packed_shapes(shape, transposed=transposed)
            return [self.check([f"{stack}{end}"], packed[end], ("U8",)) for end in packed]
        experts = stored.conversion.experts if isinstance(stored, Converted) else None
        if experts is None:
            return [self.check([stack], shape)]
        rows = shape[1] // len(experts)
        for keys in experts:
            if len(keys) != shape[0]:
                raise UserError(
                    f"model.id: {self.folder}: {len(keys)} tensors for {stack}; accepted: one "
                    f"for each of {shape[0]} experts"
                )
            self._check(keys[expert], (rows, shape[2]))
        return [keys[expert] for keys in experts]

    def read_expert(
        self, stack: str, expert: int, shape: tuple[int, ...], *, transposed: bool = False
    ) -> Tensor:
        """One expert's matrix (out, in), or (in, out) if `transposed`."""
        return self.begin_expert(stack, expert, shape, transposed=transposed)()

    def begin_expert(
        self, stack: str, expert: int, shape: tuple[int, ...], *, transposed: bool = False
    ) -> Callable[[], Tensor]:
        """Start to read one expert's matrix, as `read_expert`. Returns a function as `begin`
        does."""
        keys = self.check_expert(stack, expert, shape, transposed=transposed)
        if isinstance(keys[0], Converted):
            whole = self.begin(keys[0])
            return lambda: whole()[expert]
        locations = [self.stored(str(key)) for key in keys]
        if locations[0].kind == "U8":
            blocks, scales = (self._begin(location.row(expert)) for location in locations)
            return lambda: mxfp4.unpack(blocks(), scales(), transposed=transposed)
        if len(locations[0].shape) == 3:
            return self._begin(locations[0].row(expert))
        parts = [self._begin(location) for location in locations]
        return parts[0] if len(parts) == 1 else lambda: torch.cat([part() for part in parts])

    def _convert(self, key: Converted) -> Tensor:
        """A tensor that is made from others, which may yield further ones."""
        if self._converted is None or self._converted[0] is not key.conversion:
            self._converted = None
            waiting = {part: self.begin(part) for part in key.conversion.keys}
            parts = {part: read() for part, read in waiting.items()}
            self._converted = key.conversion, self._key_mapping.convert(key.conversion, parts)
        return self._made(key, self._converted[1])

    def _made(self, key: Converted, made: dict[str, Tensor]) -> Tensor:
        if key.name not in made:
            raise UserError(
                f"model.id: {self.folder}: {key.conversion.operations} of transformers makes "
                f"{', '.join(made)}, not {key.name}"
            )
        return made[key.name]

    def _begin(self, location: Location) -> Callable[[], Tensor]:
        self._begun[location.file, location.offset] = location.key
        try:
            return self._reader.begin(
                location.file, location.offset, location.shape, location.dtype
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # from torch, for an impossible shape
            raise unreadable(location.file, error) from error

    def stored(self, key: str) -> Location:
        """Where and how a key is stored. Raises UserError."""
        file = self._file_of[key]
        if file not in self._locations:
            self._locations[file] = _locations(self.folder / file)
        if key not in self._locations[file]:
            raise unreadable(self.folder / file, KeyError(key))
        return self._locations[file][key]

    def parts_read(self) -> dict[tuple[str, int], bytes]:
        """Digests of all that was read, by key and position (bytes) within its tensor."""
        return {
            (key := self._begun[file, offset], offset - self.stored(key).offset): digest
            for (file, offset), digest in self._reader.digests.items()
        }

    def digest(self) -> str:
        """Digest of the weights: every tensor's name, dtype, shape and a sample of its bytes,
        whether or not it was read."""
        digest = hashlib.sha256()
        for key in sorted(self._file_of):
            location = self.stored(key)
            empty = 0 in location.shape
            row = location.row(location.shape[0] // 2) if location.shape else location
            count = 0 if empty else math.prod(row.shape)
            sample = bytearray(min(count * row.dtype.itemsize, _SAMPLE))
            read_into(memoryview(sample), row.file, row.offset)
            digest.update(f"{key} {row.dtype} {[count]}".encode())
            digest.update(sample)
        return digest.hexdigest()


def tensor_digests(parts: Mapping[tuple[str, int], bytes]) -> dict[str, str]:
    """Digests of whole tensors from those of their parts (`PretrainedFiles.parts_read` of all
    ranks), by key; of all experts of a layer together."""
    digests: dict[str, xxhash.xxh3_64] = {}
    for (key, position), digest in sorted(parts.items()):
        whole = digests.setdefault(_EXPERT.sub("*", key), xxhash.xxh3_64())
        whole.update(f"{key} {position} ".encode() + digest)
    return {name: whole.hexdigest() for name, whole in digests.items()}


def _described(key: Key) -> str:
    return f"{key.name}, converted," if isinstance(key, Converted) else key


def _locations(file: Path) -> dict[str, Location]:
    """Locations of a file's tensors by key. Raises UserError where it is no safetensors file."""
    try:
        with safe_open(file, framework="pt"):  # validates offsets, sizes and length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length))
        start = 8 + length
        return {
            key: Location(file, start + e["data_offsets"][0], tuple(e["shape"]), e["dtype"], key)
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
    # As transformers: beside it, other files hold the same under a vendor's own names.
    whole = folder / "model.safetensors"
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
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
