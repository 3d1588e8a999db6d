"""Images of records: folders of them, and the encoded bytes of what a row holds."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.data.messages import no_column
from trainer.errors import BadRecord, first_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The images in the subfolders of a folder, which are named after the classes; in order."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and _is_shown(path))
    return [
        path
        for inside in classes
        for path in sorted(inside.rglob("*"))
        if path.suffix.lower() in SUFFIXES and _is_shown(path) and path.is_file()
    ]


def folder_rows(folder: Path) -> Iterator[dict]:
    """A row {image, label} for each of them."""
    for path in image_files(folder):
        yield {"image": path, "label": path.relative_to(folder).parts[0]}


def encoded_image(row: dict, column: str) -> bytes:
    """The bytes of a row's image file. The column holds them, or the path of a file, or, as
    `datasets` keeps images, {bytes, path}. Raises BadRecord, also where they are no image."""
    from PIL import Image, UnidentifiedImageError

    if column not in row:
        raise BadRecord(no_column(column, row))
    found: Any = row[column]
    if isinstance(found, dict):
        found = found.get("bytes") or found.get("path")
    if not isinstance(found, bytes | str | Path) or not found:
        raise BadRecord(
            f"{column} holds a {type(row[column]).__name__}; accepted: an image as {{bytes, "
            "path}}, its bytes, or its path"
        )
    try:
        data = found if isinstance(found, bytes) else Path(found).read_bytes()
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # PIL raises many types on damaged files
        where = "" if isinstance(found, bytes) else f"{found}: "
        is_unknown = isinstance(error, UnidentifiedImageError)  # whose text names an object
        why = "of no format that Pillow knows" if is_unknown else first_line(error)
        raise BadRecord(f"{column}: {where}no image that can be read ({why})") from error
    if image.mode.startswith(("I", "F")):  # Pillow would make white of all above 255
        where = "" if isinstance(found, bytes) else f"{found}: "
        raise BadRecord(
            f"{column}: {where}an image of more than 8 bits a colour (Pillow's mode {image.mode}); "
            "accepted: one of 8 bits"
        )
    return data


def _is_shown(path: Path) -> bool:
    return not path.name.startswith((".", "_"))
