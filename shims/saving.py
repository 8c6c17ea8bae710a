"""Traced modules in files: the exported programs and the arrays, and no code."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from interop.errors import ArgumentError, ConversionError
from interop.files import write
from interop.registry import registry

from .core import side_of
from .program import Program, key_data

__all__ = ["load_into", "save_traced"]

FORMAT = 1
_HEADER = "header.json"
_DIGEST = hashlib.sha256().digest_size  # bytes before the archive: a hash of all that follows


def save_traced(path: str | os.PathLike[str], model: Any) -> None:
    """Write a traced module, its programs and its arrays, into one file.

    The file holds no code of anybody's: StableHLO programs and plain arrays, with their dtypes.
    It is written beside ``path`` first, and put in its place when it is complete.

    Args:
        path: the file.
        model: what ``materialize(method="trace")`` returned: the module, or ``(module,
            variables)`` for Linen, ``(module, state)`` for an Equinox module with state.

    Raises:
        ArgumentError: ``model`` is something else, its state is missing, or the folder does
            not exist.
        ConversionError: an array of it has another shape or dtype than it was traced with.
        OSError: the file cannot be written; what was there before still is.

    Example:
        >>> import brainstate, jax.numpy as jnp, shims, tempfile
        >>> from pathlib import Path
        >>> shim = shims.ToNNX(brainstate.nn.Linear(3, 4))
        >>> traced = shim.materialize(method="trace", sample_input=jnp.ones((5, 3)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shims.save_traced(Path(folder) / "block.traced", traced)
        ...     (Path(folder) / "block.traced").exists()
        True
    """
    module: Any = model[0] if isinstance(model, tuple) else model
    host = _whole(registry.framework_of(module) or "")
    if host is None or not isinstance(module, host.module_type):
        raise ArgumentError(
            f"{type(module).__qualname__} is no traced module",
            remedy='Save what materialize(method="trace", sample_input=...) returned',
        )
    program, values, training = host.parts(model)
    program.check_values(values)
    arrays = [np.asarray(key_data(values[value.path])) for value in program.values]
    header = {
        "format": FORMAT,
        "training": training,
        "program": program.header(),
        "shapes": [array.shape for array in arrays],  # hidden state may be for another batch
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_HEADER, json.dumps(header))
        for name, data in program.parts().items():
            archive.writestr(name, data)
        for i, array in enumerate(arrays):
            archive.writestr(f"value.{i}", array.tobytes())
    data = file.getvalue()
    write(path, hashlib.sha256(data).digest() + data)


def load_into(path: str | os.PathLike[str], into: str) -> Any:
    """:func:`load_traced`."""
    registry.adapter(into)  # says which package is missing or broken
    host = _whole(into)
    if host is None:
        raise ArgumentError(f"{into} has no traced modules")
    try:
        data = Path(path).read_bytes()
        digest, data = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("its bytes have changed")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            header = json.loads(archive.read(_HEADER))
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}")
            parts = {name: archive.read(name) for name in archive.namelist()}
        program = Program.assemble(header["program"], parts)
        values = {
            value.path: _array(value, shape, parts[f"value.{i}"])
            for i, (value, shape) in enumerate(
                zip(program.values, header["shapes"], strict=True)
            )
        }
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as e:
        raise ConversionError(
            f"{os.fspath(path)} is no traced module, or damaged ({type(e).__name__}: {e})",
            remedy="Load a file that shims.save_traced wrote",
        ) from e
    return host.close(host.make(program, values, training=header["training"]))


def _array(value: Any, shape: Any, data: bytes) -> Any:
    array = np.frombuffer(data, jnp.dtype(value.dtype)).reshape(shape)
    return value.wrapped(jnp.asarray(array))


def _whole(framework: str) -> Any:
    return side_of(framework, "whole") if framework else None
