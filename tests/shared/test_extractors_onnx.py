"""Networks from ONNX files: what they compute, how they are named, and what is refused. The files are made here."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedsynth.errors import UsageError
from fedsynth.evaluation import fidelity_pixels
from fedsynth.evaluation.columns import Columns
from fedsynth.evaluation.fidelity import fidelity
from fedsynth.evaluation.fidelity_distances import GroupNames
from fedsynth.evaluation.samples import Volumes
from fedsynth.metrics.domain_extractor import DomainExtractor
from fedsynth.metrics.feature_network import domain_ensemble
from fedsynth.metrics.onnx_network import load_onnx, onnx_ensemble

DESCRIPTION = """
name = "a tiny network"
label = "tiny"
size = 16
channels = 3
mean = [0.5, 0.5, 0.5]
sd = [0.25, 0.25, 0.25]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def written(description: str = DESCRIPTION, features: int = 5, pair: bool = False, seed: int = 0) -> Path:
        """A convolution and a pool (N, D, h, w); or of two images the mean square of their difference (N, 1, 1, 1)."""
        weights = np.random.default_rng(seed).normal(size=(features, 3, 3, 3)).astype(np.float32)
        shape = ["n", 3, 16, 16]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (["a", "b"] if pair else ["x"])
        ]
        if pair:
            nodes = [
                helper.make_node("Sub", ["a", "b"], ["d"]),
                helper.make_node("Mul", ["d", "d"], ["s"]),
                helper.make_node("GlobalAveragePool", ["s"], ["c"]),
                helper.make_node("ReduceMean", ["c", "axes"], ["y"], keepdims=1),
            ]
            constants = [numpy_helper.from_array(np.array([1], dtype=np.int64), "axes")]
        else:
            nodes = [
                helper.make_node("Conv", ["x", "w"], ["c"]),
                helper.make_node("Relu", ["c"], ["y"]),
            ]
            constants = [numpy_helper.from_array(weights, "w")]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        path = tmp_path / "network.onnx"
        path.write_bytes(model.SerializeToString())
        path.with_suffix(".toml").write_text(description, encoding="utf-8")
        assert onnx.__version__
        return path

    return written


def images(n: int, channels: int = 3, size: int = 16, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((n, channels, size, size)).astype(np.float32)


def by_torch(x: NDArray[np.float32], features: int = 5, seed: int = 0) -> NDArray[np.float64]:
    import torch

    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=(features, 3, 3, 3)).astype(np.float32))
    scaled = (torch.from_numpy(x) - 0.5) / 0.25
    return np.asarray(torch.relu(torch.nn.functional.conv2d(scaled, weights)).mean(dim=(2, 3)).double().numpy())


def test_features_are_those_of_the_network_after_the_described_scaling(write: Write) -> None:
    network = load_onnx(write(DESCRIPTION + 'sequences = "together"\n'))
    assert network.num_features == 5
    x = images(70)
    assert np.allclose(network.features(x), by_torch(x), atol=1e-5)
    alone = np.repeat(x[:, [2]], 3, axis=1)
    assert np.allclose(network.features(x, sequence=2), by_torch(alone), atol=1e-5)


def test_each_sequence_is_seen_as_a_grey_image_and_the_features_are_averaged(write: Write) -> None:
    network = load_onnx(write())
    x = images(4, channels=2)
    each = [by_torch(np.repeat(x[:, [c]], 3, axis=1)) for c in range(2)]
    assert np.allclose(network.features(x), np.mean(each, axis=0), atol=1e-5)
    assert network.features(images(3, channels=1, size=40)).shape == (3, 5)


def test_the_name_holds_the_digest_of_the_very_weights(write: Write) -> None:
    path = write()
    first = load_onnx(path).name
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:12] in first and "a tiny network" in first
    assert load_onnx(write(seed=1)).name != first


def test_a_distance_is_taken_of_each_sequence(write: Write) -> None:
    path = write(DESCRIPTION + 'kind = "distance"\n', pair=True)
    a, b = images(5, channels=2), images(5, channels=2, seed=2)
    expected = np.square((a - b) / 0.25).mean(axis=(2, 3))
    assert np.allclose(load_onnx(path, "distance").distance(a, b), expected, rtol=1e-4)
    with pytest.raises(UsageError, match="extractor_kind"):
        load_onnx(path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (('name = "a tiny network"', ""), "extractor_invalid"),
        (("mean = [0.5, 0.5, 0.5]", "mean = [0.5]"), "extractor_invalid"),
        (("size = 16", "size = 16\nsha256 = '" + "0" * 64 + "'"), "extractor_digest"),
        (("size = 16", "size = 16\noutput = 'z'"), "extractor_output"),
        (("size = 16", "size = 16\nunknown = 1"), "extractor_invalid"),
        (("size = 16", "size = 32"), "extractor_output"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(write: Write, change: tuple[str, str], code: str) -> None:
    with pytest.raises(UsageError, match=code):
        load_onnx(write(DESCRIPTION.replace(*change)))


def test_a_damaged_a_missing_and_a_pickled_file_are_refused(write: Write, tmp_path: Path) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="extractor_unreadable"):
        load_onnx(path)
    path.write_bytes(b"\x80\x04\x95\x00")
    with pytest.raises(UsageError, match="extractor_unreadable"):
        load_onnx(path)
    path.unlink()
    with pytest.raises(UsageError, match="extractor_missing"):
        load_onnx(path)
    with pytest.raises(UsageError, match="extractor_missing"):
        load_onnx(tmp_path / "no description.onnx")


def test_together_wants_as_many_sequences_as_the_input_has_channels(write: Write) -> None:
    network = load_onnx(write(DESCRIPTION + 'sequences = "together"\n'))
    with pytest.raises(UsageError, match="extractor_channels"):
        network.features(images(2, channels=2))


def test_without_onnxruntime_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "onnxruntime":
            raise ImportError(name)
        return real_import(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"extractors_not_installed.*fedsynth\[extractors\]"):
        load_onnx(tmp_path / "network.onnx")


@pytest.mark.parametrize("features", [6, 300])
def test_with_networks_from_files_nothing_is_skipped(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: int
) -> None:
    """Narrow features and wide ones (more than slices): every figure and group of a whole section has its numbers."""
    monkeypatch.setattr(fidelity_pixels, "PAIRS", 20)
    monkeypatch.setattr(fidelity_pixels, "PAIRS_IN_CLASS", 5)
    monkeypatch.setattr(fidelity_pixels, "MOST_NEAREST", 10)
    network = load_onnx(write(features=features))
    lpips = load_onnx(write(DESCRIPTION + 'kind = "distance"\n', pair=True), "distance")
    rng = np.random.default_rng(0)

    def some(n: int, sites: NDArray[np.int64]) -> Volumes:
        pictures = 0.4 + 0.1 * rng.random((n, 2, 4, 16, 16)) + 0.2 * rng.random((n, 1, 1, 1, 1))
        masks = np.zeros((n, 4, 16, 16), dtype=bool)
        masks[:, 1:3, 4:9, 4:9] = True
        return Volumes(pictures.astype(np.float16), masks, np.arange(n) % 2, sites)

    train, holdout = some(96, np.arange(96) // 2 % 2), some(48, np.arange(48) // 2 % 2)
    ensembles = [domain_ensemble((DomainExtractor(2, 3, "nothing"),)), onnx_ensemble(network)]
    section = fidelity(
        Columns(some(48, np.full(48, -1)), train),
        holdout,
        ensembles,
        GroupNames(("low", "high"), ("T1", "T1c"), ("north", "south")),
        (1.0, 1.0, 1.0),
        rng,
        lpips=lpips,
        max_slices=192,
    )
    figures = {figure.metric: figure for figure in section.figures}
    for name, figure in figures.items():
        assert figure.synthetic is not None and figure.real is not None and figure.floor is not None, (
            name,
            figure.note,
        )
        assert "Not measured" not in figure.note
        assert all(group.synthetic is not None for group in figure.groups), (name, figure.groups)
    for measure in ("FID", "KID", "Precision", "Recall", "Density", "Coverage"):
        figure = figures[f"{measure} in tiny features"]
        assert figure.extractor == network.name
        # With more features than slices an interval would mean nothing, and there is none.
        assert (figure.interval is None) == (measure == "FID" and features == 300), measure
    assert figures["LPIPS between patients"].extractor == lpips.name
