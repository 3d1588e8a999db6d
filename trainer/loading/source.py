"""The weight source: values of a model's parameters from its files or from a seed."""

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from adapters import seeds
from adapters.layers.base import PackedLayer
from trainer.config.config import Config
from trainer.errors import UserError
from trainer.loading.key_mapping import KeyMapping
from trainer.loading.safetensors_files import PretrainedFiles
from trainer.model.backbone import BuiltModel
from trainer.model.hub import resolve_folder

Request = tuple[str, int | None]
"""A parameter by name, or the matrix (out, in) of one of the experts stacked in it."""


class Source:
    """Values by parameter name, on the device, for a model on meta."""

    def __init__(self, backbone: BuiltModel, config: Config, device: torch.device):
        self.backbone, self.config, self.device = backbone, config, device
        self.model = backbone.model
        self.names = names_of_parameters(self.model)
        """All names of each parameter by its id."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._known_as = {name: self.names[id(p)] for name, p in parameters.items()}
        self._matrices = {
            f"{path}.weight": module
            for path, module in self.model.named_modules()
            if isinstance(module, PackedLayer)
        }
        self._grown = {
            name for path in backbone.tables for name in self._known_as[f"{path}.weight"]
        }
        self.files: PretrainedFiles | None = None
        if config.model.weights == "pretrained":
            self.files = open_files(config, backbone, device)

    def in_turn(self, requests: Iterable[Request]) -> Iterator[Tensor]:
        """Iterate over the requested values, prefetching one."""
        begun: deque[Callable[[], Tensor]] = deque()
        for request in requests:
            begun.append(self._begin(*request))
            if len(begun) > 1:
                yield begun.popleft()()
        while begun:
            yield begun.popleft()()

    def stored(self, name: str) -> Tensor | None:
        """The tensor of a buffer or a head, or None where no file holds it."""
        if self.files is None:
            return None
        key = self.files.find(name)
        return None if key is None else self.files.read(key)

    def check_finite(
        self, name: str, expert: int | None, value: Tensor, dtype: torch.dtype
    ) -> None:
        """Raises UserError where a value from the files is not finite in `dtype`."""
        if self.files is None or not value.numel():
            return
        largest = torch.finfo(dtype).max
        low, high = torch.stack(torch.aminmax(value)).tolist()  # NaN where any is
        if -largest <= low and high <= largest:
            return
        keys = (self.files.find(other) for other in self._known_as.get(name, [name]))
        key = next((key for key in keys if isinstance(key, str)), name)
        which = "" if expert is None else f", expert {expert},"
        raise UserError(
            f"model.id: {self.files.folder}: {key}{which} holds values that are not finite in "
            f"{str(dtype).removeprefix('torch.')}; accepted: finite values"
        )

    def check(self, name: str, expert: int | None) -> None:
        """Raises UserError where the files do not hold what is requested."""
        assert self.files is not None
        if expert is None:
            self.files.check(self._known_as[name], self._stored_shape(name))
        else:
            matrix = self._matrices[name]
            self.files.check_expert(
                name.removesuffix(".weight"), expert, matrix.stored_shape,
                transposed=matrix.transposed,
            )  # fmt: skip

    def _begin(self, name: str, expert: int | None) -> Callable[[], Tensor]:
        wait = self._begin_stored(name, expert)
        added = self.backbone.added
        if added is None or name not in self._grown:
            return wait
        return lambda: added.filled(wait())

    def _begin_stored(self, name: str, expert: int | None) -> Callable[[], Tensor]:
        shape = self._shapes[name]
        if self.files is None:
            if expert is None:
                return partial(self._random, name, shape)
            return partial(self._random, f"{name}.{expert}", shape[1:])
        matrix = self._matrices.get(name)
        if expert is not None:
            assert matrix is not None
            stack = name.removesuffix(".weight")
            wait = self.files.begin_expert(
                stack, expert, matrix.stored_shape, transposed=matrix.transposed
            )
            return lambda: matrix.reoriented(wait())
        wait = self.files.begin(self.files.check(self._known_as[name], self._stored_shape(name)))
        others = [other for other in self._known_as[name] if self.files.find(other) is not None]
        if len(others) > 1:
            wait = partial(self._tied, others, wait)
        return wait if matrix is None else lambda: matrix.reoriented(wait())

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the files."""
        added, matrix = self.backbone.added, self._matrices.get(name)
        if added is not None and name in self._grown:
            return (added.stored, *self._shapes[name][1:])
        return self._shapes[name] if matrix is None else matrix.stored_shape

    def _tied(self, names: list[str], wait: Callable[[], Tensor]) -> Tensor:
        """The value of a parameter that the files hold under several names. Raises UserError where
        they differ: then the files' model has no tied parameters."""
        value, (first, *others) = wait(), names
        for name in others:
            if not torch.equal(value, stored := self.stored(name)):  # type: ignore[arg-type]
                raise UserError(
                    f"model.id: {self.config.model.id}: {first} and {name} differ, but "
                    "config.json ties them; accepted: equal ones, or no tie_word_embeddings"
                )
            del stored
        return value

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Parameters other than weights and biases as the model initialises them; matrices: normal
        with the model's `initializer_range`; biases 0, other vectors 1."""
        if name in self.backbone.initial:
            return self.backbone.initial[name].to(self.device)
        key = self.config.run.seed, zlib.crc32(name.encode())
        generator = seeds.generator(*key, device=self.device)
        if len(shape) == 1 or name.endswith("bias"):  # experts' biases are a matrix
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, device=self.device)
        std = getattr(self.model.config, "initializer_range", 0.02)
        values = torch.empty(shape, dtype=self.backbone.dtype, device=self.device)
        return values.normal_(0.0, std, generator=generator)


def open_files(config: Config, backbone: BuiltModel, device: torch.device) -> PretrainedFiles:
    """The model's safetensors files. Raises UserError."""
    folder = resolve_folder(config.model.id, config.model.revision)
    return PretrainedFiles(folder, KeyMapping(backbone.model, backbone.tensors), device)


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter by its id; tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
