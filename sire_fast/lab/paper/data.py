"""Images and point clouds: from a file or folder that the user has, else generated. Nothing is downloaded.

images   MNIST as idx files (plain, .gz, or inside a .tgz) or mnist.npz; else scikit-learn's 8 x 8 digits
points   .npz with x (N, P, 3), y (N), test (N) bool or 0 and 1; HDF5 of the authors (tr_cloud, tr_labels, test_cloud,
         test_labels), or a folder of ModelNet40 in HDF5 (data, label) with train or test in the names of its files;
         else sampled surfaces
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_SHAPES = ("sphere", "box", "cylinder", "cone", "torus", "disc", "saddle", "helix")


class Split(NamedTuple):
    """Examples with their classes, and where they come from.

    Attributes:
        x, test_x: (N, ...) float32.
        y, test_y: (N) int64.
        classes: number of classes.
        source: for people.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    source: str


@lru_cache(maxsize=1)
def images(path: Path | None = None) -> Split:
    """Images (N, H, W) in 0..1.

    Raises:
        ValueError: the path holds none that can be read, or there is no path and no scikit-learn.
    """
    if path is None:
        return _digits()
    found = _candidates(path, ("*.tgz", "*.tar.gz", "*mnist*.npz", "*idx?-ubyte*"), "MNIST (idx files or mnist.npz)")
    with _readable(found[0]):
        if found[0].suffix == ".npz":
            parts = _npz(found[0], "x_train", "y_train", "x_test", "y_test")
        else:
            parts = _idx_files(found)
        _check(parts, classes=10)
    x, y, test_x, test_y = (torch.from_numpy(part) for part in parts)
    return Split(x.float() / 255, y.long(), test_x.float() / 255, test_y.long(), 10, f"MNIST, {len(x)} + {len(test_x)}")


def _digits() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError(
            "data: expected --data PATH with MNIST, or scikit-learn for its digits: found neither"
        ) from None
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x).float().view(-1, 8, 8) / 16, torch.from_numpy(y).long()
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1400, len(x) - 1400])
    source = f"scikit-learn's 8 x 8 digits, not MNIST, {len(train)} + {len(test)}"
    return Split(x[train], y[train], x[test], y[test], 10, source)


def _idx_files(paths: list[Path]) -> list[np.ndarray]:
    """The four arrays of MNIST, from an archive or from a folder's files."""
    if paths[0].name.endswith(("tgz", "tar.gz")):
        with tarfile.open(paths[0]) as archive:
            members = [m for m in archive.getmembers() if m.isfile()]
            return [_idx(archive.extractfile(_named(name, members))) for name in _IDX]
    arrays = []
    for name in _IDX:
        path = _named(name, paths)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            arrays.append(_idx(file))
    return arrays


def _named(name: str, files: list[Any]) -> Any:
    for file in files:
        if name in file.name.replace(".idx", "-idx"):
            return file
    raise ValueError(f"data: expected a file {name}-ubyte of MNIST, found none")


def _idx(file: Any) -> np.ndarray:
    """The array in an idx file: two zeros, type, number of sizes, sizes (big endian), bytes."""
    content = file.read()
    dimensions = content[3]
    sizes = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy()


@lru_cache(maxsize=1)
def points(path: Path | None = None, shapes: int = 400) -> Split:
    """Point clouds (N, P, 3), each centred and scaled to standard deviation 1; without a path, `shapes` of each
    generated kind for training and a quarter of that for the test.

    Raises:
        ValueError: the path holds none that can be read.
    """
    if path is None:
        return _generated(shapes)
    files = _candidates(path, ("*modelnet*.npz", "*.h5", "*.hdf5"), "point clouds (.npz or .h5)")
    with _readable(files[0]):
        if files[0].suffix == ".npz":
            x, y, test = _npz(files[0], "x", "y", "test")
            test = test.astype(bool)  # as whole numbers they would be positions
            parts = [x[~test], y[~test], x[test], y[test]]
        else:
            parts = _hdf5(files)
        _check(parts)
    train_x, train_y, test_x, test_y = (torch.from_numpy(part) for part in parts)
    train_y, test_y = train_y.long().flatten(), test_y.long().flatten()
    classes = int(train_y.max()) + 1
    name = files[0].stem if len(files) == 1 or files[0].suffix == ".npz" else files[0].parent.resolve().name
    source = f"{name}: {classes} classes, {len(train_x)} + {len(test_x)} shapes of {train_x.shape[1]} points"
    return Split(_standard(train_x), train_y, _standard(test_x), test_y, classes, source)


def _hdf5(paths: list[Path]) -> list[np.ndarray]:
    try:
        import h5py
    except ModuleNotFoundError:
        raise ValueError("HDF5 needs h5py: pip install h5py") from None

    def array(path: Path, name: str) -> np.ndarray:
        with h5py.File(path) as file:
            return np.asarray(file[name])

    if len(paths) == 1:
        return [array(paths[0], name) for name in ("tr_cloud", "tr_labels", "test_cloud", "test_labels")]
    parts = {part: [path for path in paths if part in path.stem] for part in ("train", "test")}
    for part, found in parts.items():
        if not found:
            raise ValueError(f"expected HDF5 files with {part} in their names, found none")
    layout = [(found, name) for found in parts.values() for name in ("data", "label")]
    return [np.concatenate([array(path, name) for path in found]) for found, name in layout]


def _npz(path: Path, *names: str) -> list[np.ndarray]:
    with path.open("rb") as file, np.load(file) as arrays:
        return [arrays[name] for name in names]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Make whatever is wrong with a file a ValueError that names it."""
    try:
        yield
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _check(parts: list[np.ndarray], classes: int | None = None) -> None:
    for x, y in (parts[:2], parts[2:]):
        if x.dtype.kind not in "biuf":
            raise ValueError(f"expected numbers in three dimensions, got {x.dtype}")
        if y.dtype.kind not in "biuf" or (y < 0).any() or (y % 1 != 0).any() or (classes and (y >= classes).any()):
            raise ValueError(f"expected classes as whole numbers from 0 on{f', below {classes}' if classes else ''}")
        if x.ndim != 3 or not len(x) or len(x) != y.size:
            raise ValueError(f"expected three dimensions and a class for each example, got {x.shape} and {y.shape}")


def _standard(x: Tensor) -> Tensor:
    """Each cloud centred, with standard deviation 1 over all its coordinates; outliers clipped first, at 100 times
    the mean size, as the authors do."""
    x = x.float()
    bound = 100 * x.abs().mean((1, 2), keepdim=True)
    x = x.clamp(-bound, bound)
    x = x - x.mean(1, keepdim=True)
    return x / x.std((1, 2), keepdim=True)


def augmented(clouds: Tensor, generator: torch.Generator) -> Tensor:
    """Clouds (T, B, 3), each stretched along its axes by 0.8 to 1.25 and turned about z by up to 18 degrees, as the
    authors do with 5000 points."""
    batch = clouds.shape[1]
    stretch = 0.8 + 0.45 * torch.rand(batch, 3, generator=generator)
    angle = 0.1 * torch.pi * (2 * torch.rand(batch, generator=generator) - 1)
    x, y, z = (clouds * stretch).unbind(-1)
    return torch.stack((x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos(), z), -1)


def _generated(shapes: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(len(_SHAPES)).repeat_interleave(shapes + shapes // 4)
    x = torch.stack([_surface(_SHAPES[kind], 1024, generator) for kind in y.tolist()])
    test = torch.arange(len(y)) % (shapes + shapes // 4) >= shapes
    source = f"generated surfaces, not ModelNet: {len(_SHAPES)} kinds, {int((~test).sum())} + {int(test.sum())} shapes"
    return Split(_standard(x[~test]), y[~test], _standard(x[test]), y[test], len(_SHAPES), source)


def _surface(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Points (n, 3) on a stretched, tilted surface, with noise."""
    u, v = torch.rand(2, n, generator=generator)
    angle, s = 2 * torch.pi * u, 2 * v - 1
    if kind == "sphere":
        ring = (1 - s * s).sqrt()
        x = torch.stack((ring * angle.cos(), ring * angle.sin(), s), 1)
    elif kind == "box":
        x = 2 * torch.rand(n, 3, generator=generator) - 1
        side = torch.randint(3, (n, 1), generator=generator)
        x = x.scatter(1, side, x.gather(1, side).sign())
    else:
        z, radius = {
            "cylinder": (s, torch.ones(n)),
            "cone": (s, (1 - s) / 2),
            "torus": (0.4 * (2 * torch.pi * v).sin(), 1 + 0.4 * (2 * torch.pi * v).cos()),
            "disc": (0 * s, v.sqrt()),
            "saddle": (v * (2 * angle).cos(), v.sqrt()),
            "helix": (2 * u - 1, torch.ones(n)),
        }[kind]
        angle = 3 * angle if kind == "helix" else angle
        x = torch.stack((radius * angle.cos(), radius * angle.sin(), z), 1)
    stretch = 0.6 + 0.8 * torch.rand(3, generator=generator)
    tilt, _ = torch.linalg.qr(torch.eye(3) + 0.3 * torch.randn(3, 3, generator=generator))
    return (x * stretch) @ tilt + 0.05 * torch.randn(n, 3, generator=generator)


def _candidates(path: Path, patterns: tuple[str, ...], what: str) -> list[Path]:
    """The path itself, or the files of a folder that match the first pattern that any does."""
    if path.is_file():
        return [path]
    for pattern in patterns if path.is_dir() else ():
        if found := sorted(p for p in path.rglob(pattern) if p.is_file()):
            return found
    raise ValueError(f"data: expected {what} at {path}, found none")


def neighbours(height: int, width: int) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of pixels side by side or one above the other, numbered along the rows."""
    grid = np.arange(height * width).reshape(height, width)
    pairs = [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])]
    return [(int(i), int(j)) for a, b in pairs for i, j in zip(a.ravel(), b.ravel(), strict=True)]


def local_orders(pairs: Tensor, size: int) -> Tensor:
    """Orders (N, size) in which pairs (N, K, 2) of positions have been exchanged, one after the other."""
    order = torch.arange(size).repeat(len(pairs), 1)
    flat, places = order.view(-1), (pairs + size * torch.arange(len(pairs))[:, None, None]).permute(1, 2, 0)
    for to, of in zip(places.flatten(1), places.flip(1).flatten(1), strict=True):
        flat.index_copy_(0, to, flat[of])
    return order
