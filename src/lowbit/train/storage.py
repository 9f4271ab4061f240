"""Writing tensors so that a full disk is one line, whichever library met it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from lowbit.files import cannot_write, replacing


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the operating system, safetensors or torch say of a failed write into CannotWrite for ``path``."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except SafetensorError as error:
        raise cannot_write(path, _os_error(error)) from error
    except RuntimeError as error:
        # torch.save tells of a failed write in its own words, and not why it failed.
        if not re.search(r"PytorchStreamWriter|unexpected pos|inline_container", str(error)):
            raise
        raise cannot_write(path, OSError(errno.ENOSPC, "torch could not write the whole file")) from error


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all. Raises CannotWrite."""
    with replacing(path) as partial, writing(path):
        safetensors.torch.save_file(dict(tensors), partial, dict(metadata) if metadata is not None else None)


def _os_error(error: SafetensorError) -> OSError:
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
