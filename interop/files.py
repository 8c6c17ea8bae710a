"""Weights in a file: the safetensors format, which holds arrays and text, and no code."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError, ConversionError, MissingDependencyError
from .named_weights import load_weights, weights
from .parameters import is_quantity

__all__ = ["load", "save", "write"]

_FORMAT = "interop.save 1"


def save(
    path: str | os.PathLike[str], model: Any, *, params: Any = None, state: Any = None
) -> None:
    """Write a model's weights to a safetensors file.

    The file holds what :func:`interop.weights` returns, with dtypes, units and a checksum, and
    no code; any reader of safetensors can read it. It appears under its name once it is
    complete: a save that fails leaves an older file as it was. Arrays on several devices are
    gathered: leave sharded and asynchronous checkpoints to orbax.

    Args:
        path: the file, such as ``"model.safetensors"``; replaced if it is there.
        model, params, state: as in :func:`interop.weights`.

    Raises:
        ArgumentError, ConversionError: as :func:`interop.weights`; or ``path`` is no path, the
            format has no such dtype, or an array is abstract or was donated.
        MissingDependencyError: safetensors is not installed.

    Example:
        >>> import brainstate, interop, tempfile
        >>> file = tempfile.mkdtemp() + "/model.safetensors"
        >>> a, b = brainstate.nn.Linear(3, 4), brainstate.nn.Linear(3, 4)
        >>> interop.save(file, a)
        >>> b = interop.load(file, b)
        >>> bool((a.weight.value["weight"] == b.weight.value["weight"]).all())
        True
    """
    _check_path(path, "save")
    safetensors = _package()
    found = weights(model, params=params, state=state)
    arrays = {name: _on_host(name, leaf) for name, leaf in found.items()}
    units = {name: str(leaf.unit) for name, leaf in found.items() if is_quantity(leaf)}
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    facts = {
        "format": _FORMAT,
        "dtypes": json.dumps(dtypes),
        "units": json.dumps(units),
        "sha256": _digest(arrays, dtypes, units),
    }
    try:
        data = importlib.import_module("safetensors.numpy").save(arrays, metadata=facts)
    except safetensors.SafetensorError as e:
        raise ConversionError(
            f"the safetensors format cannot hold these weights ({e})",
            path="model",
            remedy="Convert arrays of that dtype first, or save the model with orbax",
        ) from e
    write(path, data)


def load(
    path: str | os.PathLike[str],
    model: Any,
    *,
    strict: bool = True,
    params: Any = None,
    state: Any = None,
    source: Any = None,
    sample_input: Any = None,
) -> Any:
    """Give a model the weights of a file that :func:`interop.save` wrote.

    Args:
        path: the file.
        model, strict, params, state, source, sample_input: as in
            :func:`interop.load_weights`: with ``source``, a file that was written from a
            model of one framework loads into what it converts to in another.

    Returns:
        The loaded model, as :func:`interop.load_weights` does.

    Raises:
        ConversionError: the file is corrupt, truncated or of another origin, or its weights
            do not fit; nothing was changed.
        FileNotFoundError: there is no such file.
        ArgumentError, InteropError: as :func:`interop.load_weights`; or ``path`` is no path.
        MissingDependencyError: safetensors is not installed.

    Example:
        >>> import brainstate, interop, tempfile
        >>> from pathlib import Path
        >>> trained, fresh = brainstate.nn.Linear(3, 4), brainstate.nn.Linear(3, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     interop.save(Path(folder) / "weights.safetensors", trained)
        ...     loaded = interop.load(Path(folder) / "weights.safetensors", fresh)
        >>> bool((loaded.weight.value["weight"] == trained.weight.value["weight"]).all())
        True
    """
    _check_path(path, "load")
    arrays, units = _read(path)
    given: Mapping[str, Any] = arrays
    if units:
        given = {
            name: _Measured(arrays[name], units[name]) if name in units else arrays[name]
            for name in arrays
        }
    return load_weights(
        model,
        given,
        strict=strict,
        params=params,
        state=state,
        source=source,
        sample_input=sample_input,
    )


class _Measured:
    """An array of a file with its unit in words; a model's own array knows the unit itself."""

    mantissa: Any = None  # of the class as well, by which is_quantity tells
    unit: str = ""

    def __init__(self, mantissa: Any, unit: str):
        self.mantissa, self.unit = mantissa, unit


def _package() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ModuleNotFoundError as e:
        raise MissingDependencyError("interop.save and load", "safetensors") from e


def _on_host(name: str, leaf: Any) -> Any:
    array = leaf.mantissa if is_quantity(leaf) else leaf
    if isinstance(array, jax.ShapeDtypeStruct) or (
        isinstance(array, jax.Array) and array.is_deleted()
    ):
        raise ConversionError(
            "the array has no values: it is abstract, or was donated to a compiled function",
            path=name,
            remedy="Save a model that holds its weights",
        )
    return np.asarray(array, order="C")  # the package writes the buffer of a view as it lies


def _check_path(path: object, name: str) -> None:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(
            f"path must be the name of a file, got {type(path).__qualname__}",
            remedy=f"Write interop.{name}(path, model)",
        )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a file and their units, by name.

    Raises:
        ConversionError: it is no file of ours, or damaged.
    """
    safetensors, file = _package(), os.fspath(path)
    data = Path(file).read_bytes()
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as e:
        raise ConversionError(
            f"{file} is no safetensors file, or it is damaged ({e})",
            remedy="Nothing was changed. Take another copy of the file",
        ) from e
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    facts = header.get("__metadata__", {})
    if facts.get("format") != _FORMAT:
        raise ConversionError(
            f"{file} was not written by interop.save: its format is {facts.get('format')!r}, "
            f"not {_FORMAT!r}",
            remedy="Nothing was changed. Read a foreign file with safetensors, give its arrays "
            "the names of interop.weights(model), and pass them to interop.load_weights",
        )
    try:
        dtypes, units = json.loads(facts["dtypes"]), json.loads(facts["units"])
        arrays = {
            name: np.frombuffer(tensor["data"], jnp.dtype(dtypes[name])).reshape(
                tensor["shape"]
            )
            for name, tensor in tensors
        }
        if facts["sha256"] != _digest(arrays, dtypes, units):
            raise ValueError("its bytes have changed")
    except (KeyError, TypeError, ValueError) as e:
        raise ConversionError(
            f"{file} is damaged: what it says of its arrays does not fit them ({e!r})",
            remedy="Nothing was changed. Take another copy of the file",
        ) from e
    return arrays, units


def _digest(arrays: Mapping[str, Any], dtypes: Any, units: Any) -> str:
    """A hash of the arrays, what they are called and are; the format has none of its own."""
    shapes = {name: array.shape for name, array in arrays.items()}
    found = hashlib.sha256(json.dumps([dtypes, units, shapes], sort_keys=True).encode())
    for _, array in sorted(arrays.items()):
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole file, or leave what is there.

    Raises:
        ArgumentError: the folder does not exist.
        OSError: it cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ArgumentError(
            f"there is no folder {str(target.parent)!r} to write {target.name!r} in",
            remedy="Create it first",
        )
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)
