"""Files that are written whole, or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: Path, keep: bool = False) -> Iterator[Path]:
    """A block that writes this file. If writing fails, as on a full disk, no part of the file is left.

    With `keep`, what is written so far stays, for files of independent lines.

    Raises ValueError naming the file and why.
    """
    try:
        yield path
    except (OSError, SafetensorError) as error:
        if not keep and path.is_file():  # which a device is not
            with suppress(OSError):
                path.unlink()
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {path}: {why}. Make room, or name another place") from error
