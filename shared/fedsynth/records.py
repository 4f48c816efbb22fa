"""What travels between coordinator and site: a closed list of message types and records, checked on both sides.

A message to a site carries a task (plan digest, module, round, the site's name, the newest entry of its ledger that the
coordinator has a receipt of) and model weights. A reply carries the module's weights (of a statistic: its noisy sum), a
progress record of quantities that are post-processing of noisy states, and a receipt of the ledger; or a refusal code.
An evaluation is asked for and answered in the same way: networks trained on synthetic patients, and a noisy sum.
Nothing else is defined, so nothing else can leave.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from io import BytesIO

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.lib import format as numpy_format
from torch import Tensor

from fedsynth.errors import JobFailed
from fedsynth.plan import MODULES, Activity, Module, StudyPlan

State = dict[str, Tensor]

MESSAGE_TYPES: dict[Activity, str] = {
    **{module: f"train.{module}" for module in MODULES},
    "evaluation": "evaluate.holdout",
}
# The record that holds a module's weights, in a task and in its reply; of a statistic and of an evaluation, the reply's sum.
WEIGHTS: dict[Activity, str] = {
    "moments": "moments",
    "autoencoder": "autoencoder",
    "radiogenomics": "radiogenomics",
    "embedding": "embedding",
    "gan": "generator",
    "translation": "translation",
    "evaluation": "evaluation",
}
# The record with the public weights that a statistic's rows are computed with.
PUBLIC: dict[Module, str] = {"moments": "moments_public", "embedding": "embedding_public"}
# The networks, trained on synthetic patients only, that an evaluation is made with.
EVALUATORS = "evaluators"
# The model that the server fits to the noisy moments.
PROFILES = "profiles"
# Progress quantities a reply may carry; each is computed from noisy states and synthetic data only.
PROGRESS: dict[Activity, frozenset[str]] = {
    "moments": frozenset(),
    "embedding": frozenset(),
    "autoencoder": frozenset({"update_norm"}),
    "radiogenomics": frozenset({"update_norm"}),
    "gan": frozenset({"update_norm", "generator_loss", "fake_score"}),
    # Its losses are of translated private slices, so none of them is a function of noisy states alone.
    "translation": frozenset({"update_norm"}),
    "evaluation": frozenset(),
}
# Of a variational autoencoder, which makes no fakes while it trains: all its losses are of private slices.
PROGRESS_WITHOUT_FAKES = frozenset({"update_norm"})
# Receipt of the ledger: public functions of public plans, and the digest of the ledger's newest entry. Both epsilons are of
# the population that was charged: of an evaluation, of held-out patients.
RECEIPT = frozenset({"head", "epsilon", "epsilon_lifetime", "steps", "private"})
LARGEST_NORM = 1e4
_LONGEST_HEADER = 1000  # of a NumPy array; those of states have about 120 characters


def norm_limit(activity: Activity) -> float:
    """Largest norm of what a site may send of `activity`: that of sums grows with patients and noise, so they have none."""
    return math.inf if activity in PUBLIC or activity == "evaluation" else LARGEST_NORM


def to_record(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Pack a state dict (name -> tensor) as a Flower record."""
    return ArrayRecord({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def from_record(
    content: RecordDict, name: str, expected: Mapping[str, Tensor], *, largest_norm: float = LARGEST_NORM
) -> State:
    """Unpack the arrays called `name`, which must look exactly like `expected`.

    Args:
        content: a message's content.
        name: record name.
        expected: a state dict of the model that the weights are for.
        largest_norm: of all arrays together; arrays whose very digest was approved need no limit.

    Raises:
        JobFailed: ``record_missing``, ``arrays_differ`` (names, shapes or types, in what is declared or in the bytes),
            ``arrays_not_finite`` or ``arrays_too_large``.
    """
    if name not in content.array_records:
        raise JobFailed("record_missing", f"The message carries no arrays called {name!r}.")
    arrays = content.array_records[name]
    if set(arrays) != set(expected):
        raise JobFailed("arrays_differ", f"The arrays of {name!r} are not those of the plan's model.")
    for key, model_tensor in expected.items():
        array = arrays[key]
        if tuple(array.shape) != tuple(model_tensor.shape) or array.dtype != _numpy_dtype(model_tensor):
            raise JobFailed("arrays_differ", f"{name}/{key} is {array.dtype}{tuple(array.shape)}, not as in the plan.")
    state: State = {key: _tensor(arrays[key], name, model_tensor) for key, model_tensor in expected.items()}
    check_state(state, name, largest_norm)
    return state


def _tensor(array: Array, name: str, expected: Tensor) -> Tensor:
    # What an array declares and what its bytes hold are two things, and both come from the other side. The header is read
    # first: NumPy would make room for whatever shape it states, and would unpack an archive of arrays.
    stream = BytesIO(array.data)
    try:
        if numpy_format.read_magic(stream) != (1, 0):
            raise ValueError("not the version of arrays this small")
        shape, _, dtype = numpy_format.read_array_header_1_0(stream, max_header_size=_LONGEST_HEADER)
    except Exception:  # noqa: BLE001 (NumPy reads a header as Python, and lets through whatever its parser trips over)
        raise JobFailed("arrays_differ", f"The bytes of {name!r} are no arrays.") from None
    size = len(array.data) - stream.tell()
    if (
        shape != tuple(expected.shape)
        or str(dtype) != _numpy_dtype(expected)
        or size != expected.numel() * dtype.itemsize
    ):
        raise JobFailed("arrays_differ", f"The arrays of {name!r} are not what they declare to be.")
    try:
        values = array.numpy()
    except (ValueError, TypeError):  # e.g. a way of packing that Flower does not know
        raise JobFailed("arrays_differ", f"The bytes of {name!r} are no arrays.") from None
    return torch.from_numpy(values.copy())


def check_state(state: Mapping[str, Tensor], name: str, largest_norm: float = LARGEST_NORM) -> None:
    """Refuse weights that are not finite or absurdly large.

    Raises:
        JobFailed: ``arrays_not_finite`` or ``arrays_too_large``.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise JobFailed("arrays_not_finite", f"The arrays of {name!r} hold values that are not finite.")
    norm = math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in state.values()))
    if norm > largest_norm:
        raise JobFailed("arrays_too_large", f"The arrays of {name!r} have norm {norm:.3g}, above {largest_norm:g}.")


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def _numpy_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def task_weights(plan: StudyPlan, activity: Activity) -> tuple[str, ...]:
    """Names of the records of weights that a task of `activity` carries."""
    if activity == "evaluation":
        return (EVALUATORS, *profile_weights(plan))
    if activity in PUBLIC:
        return (PUBLIC[activity],)
    if activity != "gan":
        return (WEIGHTS[activity],)
    return (WEIGHTS["gan"], "discriminator", *profile_weights(plan))


def profile_weights(plan: StudyPlan) -> tuple[str, ...]:
    """Names of the weights that synthetic profiles are drawn from."""
    return (PROFILES,) if plan.profile_engine == "moments" else ("autoencoder", "radiogenomics")


def task_record(study: str, module: Activity, round_number: int, site: str, head: str = "") -> ConfigRecord:
    """What is asked of a site.

    Args:
        study: the plan's digest.
        module: what to compute.
        round_number: from 1.
        site: whom the coordinator takes the node for; a site of another name refuses.
        head: the newest entry of the site's ledger that the coordinator has a receipt of, empty before the first: a site
            whose ledger does not hold it has been set back to an older copy, and would spend the same budget twice.
    """
    return ConfigRecord({"study": study, "module": module, "round": round_number, "site": site, "head": head})


def check_task(content: RecordDict, known: Collection[str]) -> None:
    """Refuse a message that carries a record beside those that it may have, unread.

    Raises:
        JobFailed: ``task_not_in_closed_list``.
    """
    unknown = set(content) - set(known)
    if unknown:
        raise JobFailed("task_not_in_closed_list", f"The message carries {len(unknown)} records that it may not have.")


def progress_of(plan: StudyPlan, activity: Activity) -> frozenset[str]:
    """The progress quantities that a reply of `activity` carries under `plan`."""
    if activity == "gan" and plan.gan.architecture == "vae":
        return PROGRESS_WITHOUT_FAKES
    return PROGRESS[activity]


def refusal(code: str) -> RecordDict:
    """The reply of a site that does not do what was asked: a code, without text."""
    return RecordDict({"refusal": ConfigRecord({"code": code})})


def check_reply(content: RecordDict, module: Activity, progress_keys: frozenset[str] | None = None) -> None:
    """Make sure that a reply holds exactly the records and values that `module` may send, or a refusal's code alone.

    Args:
        content: the reply.
        module: what was asked for.
        progress_keys: `progress_of` the plan and the module; by default those of a plan with fakes.

    Raises:
        JobFailed: ``reply_not_in_closed_list`` (records or keys) or ``reply_malformed`` (a value of another kind: a list
            or text where a number belongs, text where a code or digest belongs).
    """
    names = set(content)
    if names == {"refusal"}:
        refused = content.config_records.get("refusal")
        if refused is None or set(refused) != {"code"} or not _matches(refused["code"], r"[a-z0-9_]{1,64}"):
            raise JobFailed("reply_malformed", "A refusal holds something else than a code.")
        return
    progress, receipt = content.metric_records.get("progress"), content.config_records.get("receipt")
    if (
        names != {WEIGHTS[module], "progress", "receipt"}
        or WEIGHTS[module] not in content.array_records
        or progress is None
        or set(progress) != (PROGRESS[module] if progress_keys is None else progress_keys)
        or receipt is None
        or set(receipt) != RECEIPT
    ):
        raise JobFailed("reply_not_in_closed_list", f"A reply of {module!r} holds records that it may not hold.")
    numbers = [*progress.values(), *(receipt[key] for key in RECEIPT - {"head"})]
    if not all(isinstance(value, int | float) for value in numbers) or not _matches(receipt["head"], r"[0-9a-f]{64}"):
        raise JobFailed(
            "reply_malformed", f"A reply of {module!r} holds something else where a number or digest belongs."
        )


def _matches(value: object, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def progress_record(values: Mapping[str, float]) -> MetricRecord:
    """Progress quantities as a Flower record."""
    return MetricRecord({key: float(value) for key, value in values.items()})
