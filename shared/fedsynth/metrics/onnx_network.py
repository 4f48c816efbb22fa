"""Feature networks and perceptual distances from a file: ONNX beside a small TOML description.

ONNX is a graph of known operators with their weights: reading it runs no code of the file's author, as reading a pickled
PyTorch file would. The weights of Inception, RadImageNet or LPIPS networks are not part of this software; whoever has
them exports them once (``torch.onnx.export``) and writes beside ``inception.onnx`` a file ``inception.toml``::

    name = "Inception v3, ImageNet, pool 3"   # shown in every figure that uses it, with the digest of the weights
    label = "Inception"                       # in the titles of figures
    kind = "features"                         # or "distance", for two inputs and a distance, such as LPIPS
    size = 299                                # pixels of the input's side
    channels = 3                              # of the input
    sequences = "each"                        # or "together", see OnnxDescription
    range = 255.0                             # what an intensity of 1 becomes
    mean = [0.0, 0.0, 0.0]                    # subtracted after that, one a channel
    sd = [1.0, 1.0, 1.0]                      # divided by after that
    output = "pool"                           # name of the output; left out: the only one

The optional dependency ``fedsynth[extractors]`` runs it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn import functional

from fedsynth.errors import UsageError
from fedsynth.metrics.feature_network import Ensemble
from fedsynth.toml import load_toml

LARGEST_FILE = 2**31 - 1  # bytes; ONNX itself ends there, larger models have their weights in files beside it


class OnnxDescription(BaseModel):
    """The TOML beside an ONNX file.

    Attributes:
        name: what the network is and was trained on.
        label: one or two words for the titles of figures.
        kind: features of one image, or a distance of two.
        size: height and width of the input in pixels; slices are resampled (bilinear, antialiased).
        channels: of the input.
        sequences: ``"each"``: every sequence is a grey image, repeated over the input's channels, and features are
            averaged over sequences. ``"together"``: the sequences are the input's channels, so there must be as many;
            one sequence alone is then repeated over all channels. A distance takes each sequence by itself.
        range: what an intensity of 1 becomes, before `mean` and `sd`.
        mean: subtracted, one a channel.
        sd: divided by, one a channel.
        inputs: names of the input tensors; empty for those of the file in their order.
        output: name of the output tensor; empty for the only one. Features of more than two dimensions are averaged
            over the last ones.
        sha256: digest of the ONNX file, if the file must be the one meant.
        batch: images at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    label: str = Field(min_length=1, max_length=40)
    kind: Literal["features", "distance"] = "features"
    size: int = Field(ge=8, le=1024)
    channels: int = Field(ge=1, le=16)
    sequences: Literal["each", "together"] = "each"
    range: float = Field(default=1.0, gt=0)
    mean: list[float]
    sd: list[float]
    inputs: list[str] = []
    output: str = ""
    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    batch: int = Field(default=64, ge=1, le=1024)

    @model_validator(mode="after")
    def _one_a_channel(self) -> Self:
        if len(self.mean) != self.channels or len(self.sd) != self.channels or min(self.sd) <= 0:
            raise ValueError(f"mean and sd must have {self.channels} entries, and those of sd must be above 0")
        return self


@dataclass(frozen=True)
class OnnxNetwork:
    """A network that was loaded by `load_onnx`: a `FeatureNetwork`, or, of kind ``"distance"``, a `PairDistance`."""

    description: OnnxDescription
    session: Any
    inputs: tuple[str, ...]
    output: str
    digest: str
    num_features: int

    @property
    def name(self) -> str:
        """The description's name and the first digits of the file's SHA-256."""
        return f"{self.description.name} (weights {self.digest[:12]})"

    def features(self, images: NDArray[np.float32], sequence: int | None = None) -> NDArray[np.float64]:
        """See `FeatureNetwork`.

        Raises:
            UsageError: ``extractor_channels``: the slices have another number of sequences than the input channels.
        """
        channels = self.description.channels
        if sequence is not None:
            return self._of(np.repeat(images[:, [sequence]], channels, axis=1))
        if self.description.sequences == "together":
            if images.shape[1] != channels:
                raise UsageError(
                    "extractor_channels",
                    f"{self.description.label} takes {channels} sequences together, the study has {images.shape[1]}.",
                    'Set sequences = "each" beside the network.',
                )
            return self._of(images)
        each = [self._of(np.repeat(images[:, [c]], channels, axis=1)) for c in range(images.shape[1])]
        return np.mean(each, axis=0)

    def distance(self, left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
        """See `PairDistance`."""
        channels = self.description.channels
        columns = []
        for c in range(left.shape[1]):
            pair = (np.repeat(side[:, [c]], channels, axis=1) for side in (left, right))
            columns.append(self._run(*pair).reshape(len(left), -1).mean(axis=1))
        return np.stack(columns, axis=1)

    def _of(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        values = self._run(images)
        return values.reshape(*values.shape[:2], -1).mean(axis=2)

    def _run(self, *images: NDArray[np.float32]) -> NDArray[np.float64]:
        """The output for batches of prepared images, (N, ...) float64."""
        parts = []
        for start in range(0, len(images[0]), self.description.batch):
            rows = slice(start, start + self.description.batch)
            feed = {name: prepare(x[rows], self.description) for name, x in zip(self.inputs, images, strict=True)}
            parts.append(np.asarray(self.session.run([self.output], feed)[0], dtype=np.float64))
        return np.concatenate(parts) if parts else np.zeros((0, self.num_features))


def prepare(images: NDArray[np.float32], description: OnnxDescription) -> NDArray[np.float32]:
    """Slices (N, C, H, W) in [0, 1] as the network wants them: resampled, scaled, centred."""
    values = torch.from_numpy(np.ascontiguousarray(images))
    if values.shape[-2:] != (description.size, description.size):
        values = functional.interpolate(values, (description.size,) * 2, mode="bilinear", antialias=True)
    mean, sd = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (description.mean, description.sd))
    return np.asarray(((values * description.range - mean) / sd).numpy())


def load_onnx(path: Path, kind: Literal["features", "distance"] = "features") -> OnnxNetwork:
    """Read a network of `kind` from `path` and the description of the same name with the ending ``.toml``.

    Raises:
        UsageError: ``extractors_not_installed``; ``extractor_missing``, ``extractor_not_toml`` or ``extractor_invalid``
            (the description); ``extractor_kind``, ``extractor_digest``, ``extractor_unreadable`` or
            ``extractor_output`` (the network).
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(
            "extractors_not_installed",
            "A network from a file needs onnxruntime, which is not installed.",
            "Install it with: pip install 'fedsynth[extractors]'.",
        ) from None
    description = load_toml(path.with_suffix(".toml"), OnnxDescription, "extractor")
    if description.kind != kind:
        raise UsageError("extractor_kind", f"{path} is described as of kind {description.kind}, not {kind}.")
    if not path.is_file():
        raise UsageError("extractor_missing", f"There is no network at {path}.")
    if path.stat().st_size > LARGEST_FILE:
        raise UsageError("extractor_unreadable", f"{path} is larger than an ONNX file can be.")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if description.sha256 and digest != description.sha256:
        raise UsageError(
            "extractor_digest",
            f"{path} has the digest {digest[:12]}..., its description wants {description.sha256[:12]}....",
            "It is another network than the one described, or was damaged.",
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        # From the bytes that were hashed. A model whose weights lie in other files cannot be loaded so, and is refused.
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 (its exceptions have no common class)
        raise UsageError(
            "extractor_unreadable",
            f"{path} is not an ONNX network that runs by itself ({type(error).__name__}).",
            "Export it with its weights inside the one file.",
        ) from None
    inputs = tuple(description.inputs or [each.name for each in session.get_inputs()])
    outputs = [each.name for each in session.get_outputs()]
    output = description.output or (outputs[0] if len(outputs) == 1 else "")
    wanted = 1 if kind == "features" else 2
    if (
        len(inputs) != wanted
        or not set(inputs) <= {each.name for each in session.get_inputs()}
        or output not in outputs
    ):
        raise UsageError(
            "extractor_output",
            f"{path} has inputs {[each.name for each in session.get_inputs()]} and outputs {outputs}, which do not fit "
            f"the {wanted} input{'s' if wanted > 1 else ''} and one output of a network of {kind}.",
            "Name inputs and output in its description.",
        )
    return _tried(OnnxNetwork(description, session, inputs, output, digest, 0), path)


def onnx_ensemble(network: OnnxNetwork) -> Ensemble:
    """A network from a file as an ensemble of its own."""
    return Ensemble(
        network.description.label,
        (network,),
        "Comparable with published values only if weights, resampling, slices and their number are theirs too.",
    )


def _tried(network: OnnxNetwork, path: Path) -> OnnxNetwork:
    """The network with its number of features, found by running it on two empty images."""
    blank = np.zeros((2, network.description.channels, 64, 64), dtype=np.float32)
    try:
        values = network._run(*[blank] * len(network.inputs))
    except Exception as error:  # noqa: BLE001 (its exceptions have no common class)
        raise UsageError(
            "extractor_output",
            f"{path} does not run on a batch of {network.description.channels} x {network.description.size} x "
            f"{network.description.size} images ({type(error).__name__}).",
            "Check size and channels, and export it with a free batch size.",
        ) from None
    if values.ndim < 1 or len(values) != 2 or (network.description.kind == "features" and values.ndim < 2):
        raise UsageError(
            "extractor_output", f"{path} gives an output of shape {values.shape} for two images.", "Name another one."
        )
    features = values.shape[1] if network.description.kind == "features" else 1
    return OnnxNetwork(network.description, network.session, network.inputs, network.output, network.digest, features)
