"""Pytrees of arrays as safetensors files: a flat name for each array, and a header of texts."""

from collections.abc import Mapping
from importlib.resources import as_file
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sim.config import ConfigError
from sim.files import whole

Tree = Any  # a pytree of arrays
Tensors = dict[str, np.ndarray]


def write(path: Path, tensors: Tensors, header: Mapping[str, str]) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as draft:
        save_file(tensors, draft, dict(header))


def read(path: Path | Traversable, key: str) -> tuple[Tensors, dict[str, str]]:
    """Arrays and header of a file.

    Raises:
        ConfigError: naming `key`, if it is not there or not such a file.
    """
    try:
        with as_file(path) as file, safe_open(file, framework="numpy") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return tensors, content.metadata() or {}
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(key, str(path), "there is no such file") from None
    except SafetensorError as error:
        raise ConfigError(key, str(path), f"not a whole safetensors file ({error})") from None


def flat(tree: Tree) -> Tensors:
    """The arrays of a tree by name, such as `params.Dense_0.kernel`; random keys as their data."""
    leaves, _ = tree_flatten_with_path(tree)
    return {
        keystr(path, simple=True, separator="."): np.array(
            jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C"
        )
        for path, leaf in leaves
    }


def restored(tensors: Tensors, like: Tree, key: str) -> Tree:
    """A tree of the kind of `like`, NumPy where that is, with arrays as of `flat`.

    Raises:
        ConfigError: naming `key`, if they are not the arrays of such a tree.
    """
    wanted = shapes(jax.eval_shape(lambda: jax.tree.map(_data, like)))
    check_shapes(tensors, wanted, key)
    leaves, structure = jax.tree.flatten(like)
    arrays: list[Tree] = []
    for name, leaf in zip(wanted, leaves, strict=True):
        if isinstance(leaf, np.ndarray | np.generic):
            arrays.append(tensors[name])
        elif _is_key(leaf):
            arrays.append(jax.random.wrap_key_data(jnp.array(tensors[name])))
        else:
            arrays.append(jnp.array(tensors[name]))
    return jax.tree.unflatten(structure, arrays)


def shapes(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each array of a tree, by name."""
    return {
        keystr(path, simple=True, separator="."): leaf
        for path, leaf in tree_flatten_with_path(tree)[0]
    }


def check_finite(tensors: Tensors, where: str) -> None:
    """Refuse arrays with an element that is infinite or NaN.

    Raises:
        ConfigError: naming `where`, the array and the element.
    """
    for name, array in tensors.items():
        finite = np.isfinite(array)
        if not finite.all():
            raise ConfigError(f"{where}: {name}", float(array[~finite][0]), "must be finite")


def check_shapes(tensors: Tensors, wanted: Mapping[str, jax.ShapeDtypeStruct], key: str) -> None:
    """Refuse arrays that are not those wanted.

    Raises:
        ConfigError: naming `key`, the array, its shape and the one wanted.
    """

    def told(array: np.ndarray | jax.ShapeDtypeStruct | None) -> str:
        return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"

    for name in dict.fromkeys((*wanted, *tensors)):
        given, needed = told(tensors.get(name)), told(wanted.get(name))
        if given != needed:
            raise ConfigError(f"{key}: {name}", given, f"must be {needed}")


def _is_key(leaf: Tree) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _data(leaf: Tree) -> Tree:
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)
