"""Checkpoints that survive a kill at any moment.

A new checkpoint is written beside the old one, brought to the disk, and put in its place by one rename. Whenever the
process dies, the path holds either the complete old checkpoint or the complete new one.
"""

import os
import pickle
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = 1


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, and dicts, lists and tuples of these) to `path`, all or nothing."""
    replace_file(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state that `save` wrote, its tensors on `device`.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is damaged, or is not a checkpoint of this version of pckernels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}; name the folder that the run was given with --out.")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"The checkpoint {path} cannot be read ({_first_line(error)}); delete it and train again.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint that this version of pckernels wrote; choose another --out folder.")
    return state


def require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless the settings in a checkpoint are the ones wanted; the message names every difference."""
    names = sorted(saved.keys() | wanted.keys())
    differing = [name for name in names if saved.get(name) != wanted.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {saved.get(name)!r} and is now {wanted.get(name)!r}" for name in differing)
        raise ValueError(f"The run at {path} cannot resume with other settings: {changes}. Use the old ones, or another --out folder.")


def rng_state() -> dict[str, Any]:
    """The states of torch's, Python's and, where it is in use, NumPy's random generators, as plain data."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the random generators back to where `rng_state` found them."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


def replace_file(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace the file at `path` by what `write` puts into the open binary file that it is given, all or nothing.

    The temporary file lies in the same folder, since a rename is atomic only within one file system, and has a fixed
    name, so that repeated kills leave at most one behind.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
