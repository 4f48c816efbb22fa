"""What may travel is a closed list, and arrays are what the plan's model says or are refused."""

from __future__ import annotations

import io
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsynth.errors import JobFailed
from fedsynth.plan import MODULES, Module
from fedsynth.records import (
    LARGEST_NORM,
    PROGRESS,
    RECEIPT,
    WEIGHTS,
    check_reply,
    check_state,
    from_record,
    progress_record,
    refusal,
    state_digest,
    task_record,
    to_record,
)

STATE: dict[str, Tensor] = {
    "layer.weight": torch.arange(6.0).reshape(2, 3),
    "layer.bias": torch.tensor([0.5, -0.5]),
    "count": torch.tensor(7),
}


def message(state: dict[str, Tensor], name: str = "generator") -> RecordDict:
    return RecordDict({name: to_record(state)})


def code_of(state_or_content: dict[str, Tensor] | RecordDict) -> str:
    content = state_or_content if isinstance(state_or_content, RecordDict) else message(state_or_content)
    with pytest.raises(JobFailed) as caught:
        from_record(content, "generator", STATE)
    return caught.value.code


def test_weights_come_back_as_they_were_sent() -> None:
    back = from_record(message(STATE), "generator", STATE)
    assert list(back) == list(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    back["layer.bias"] += 1  # the copy is writable and its own
    assert STATE["layer.bias"].tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer.weight": STATE["layer.weight"]},
        {**STATE, "more": torch.zeros(1)},
        {**STATE, "layer.weight": STATE["layer.weight"].T},
        {**STATE, "layer.weight": STATE["layer.weight"].flatten()},
        {**STATE, "layer.weight": STATE["layer.weight"].double()},
        {**STATE, "layer.weight": STATE["layer.weight"].half()},
        {**STATE, "count": torch.tensor(7, dtype=torch.int32)},
    ],
)
def test_arrays_of_another_model_are_refused(wrong: dict[str, Tensor]) -> None:
    assert code_of(wrong) == "arrays_differ"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_arrays_that_are_not_finite_are_refused(value: float) -> None:
    assert code_of({**STATE, "layer.bias": torch.tensor([value, 0.0])}) == "arrays_not_finite"


def test_arrays_above_the_largest_norm_are_refused() -> None:
    assert code_of({**STATE, "layer.bias": torch.tensor([LARGEST_NORM * 1.01, 0.0])}) == "arrays_too_large"
    assert code_of({**STATE, "layer.bias": torch.tensor([3e38, 3e38])}) == "arrays_too_large"
    check_state({"just": torch.tensor([LARGEST_NORM])}, "generator")


def test_an_absent_record_or_one_of_another_kind_is_refused() -> None:
    assert code_of(message(STATE, "autoencoder")) == "record_missing"
    assert code_of(RecordDict({"generator": ConfigRecord({"layer.weight": 1})})) == "record_missing"


def declared(values: np.ndarray, like: Tensor) -> Array:
    """An array of these bytes which declares the shape and type of `like`."""
    array = Array(values)
    array.shape, array.dtype = tuple(like.shape), str(like.dtype).removeprefix("torch.")
    return array


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((50, 50), dtype=np.float32),
        np.zeros((2, 3), dtype=np.float64),
        np.zeros((2, 3), dtype=">f4"),
        np.zeros((2, 3), dtype="S4"),
    ],
)
def test_bytes_that_are_not_what_they_declare_are_refused(values: np.ndarray) -> None:
    record = to_record(STATE)
    record["layer.weight"] = declared(values, STATE["layer.weight"])
    assert code_of(RecordDict({"generator": record})) == "arrays_differ"


@pytest.mark.parametrize(
    "data", [b"", b"no array", b"\x93NUMPY\x01\x00", b"PK\x03\x04no archive", b"PK\x05\x06" + bytes(18)]
)
def test_bytes_that_are_no_array_are_refused(data: bytes) -> None:
    record = to_record(STATE)
    record["layer.weight"].data = data
    assert code_of(RecordDict({"generator": record})) == "arrays_differ"


def test_a_header_that_states_a_giant_shape_gets_no_memory() -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}  # 4 TiB
    np.lib.format.write_array_header_1_0(stream, header)
    record = to_record(STATE)
    record["layer.weight"].data = stream.getvalue() + bytes(24)
    tracemalloc.start()
    try:
        assert code_of(RecordDict({"generator": record})) == "arrays_differ"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_archive_of_arrays_is_not_unpacked() -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, STATE=np.zeros(2**23, dtype=np.float32))  # 32 MiB in few bytes
    assert len(stream.getvalue()) < 2**16
    record = to_record(STATE)
    record["layer.weight"].data = stream.getvalue()
    tracemalloc.start()
    try:
        assert code_of(RecordDict({"generator": record})) == "arrays_differ"
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", ["(" * 900, "-" * 900 + "1", "{'shape': " * 90, "[" * 9000 + "]" * 9000])
def test_a_header_that_is_no_header_is_refused(header: str) -> None:
    text = header.encode()
    record = to_record(STATE)
    record["layer.weight"].data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)
    assert code_of(RecordDict({"generator": record})) == "arrays_differ"


def test_pickled_bytes_are_never_opened() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}] * 6, dtype=object).reshape(2, 3), allow_pickle=True)
    record = to_record(STATE)
    record["layer.weight"].data = stream.getvalue()
    assert code_of(RecordDict({"generator": record})) == "arrays_differ"


@pytest.mark.parametrize(
    "other",
    [
        {**STATE, "layer.bias": STATE["layer.bias"] + 1e-7},
        {**STATE, "layer.weight": STATE["layer.weight"].reshape(3, 2)},
        {**STATE, "layer.weight": STATE["layer.weight"].double()},
        {"Layer.weight" if k == "layer.weight" else k: v for k, v in STATE.items()},
        {k: v for k, v in STATE.items() if k != "count"},
        {**STATE, "more": torch.zeros(0)},
    ],
)
def test_the_digest_tells_any_two_states_apart(other: dict[str, Tensor]) -> None:
    assert state_digest(other) != state_digest(STATE)


def test_the_digest_does_not_depend_on_order_or_memory_layout() -> None:
    turned = {name: STATE[name] for name in reversed(STATE)}
    turned["layer.weight"] = STATE["layer.weight"].T.contiguous().T
    assert not turned["layer.weight"].is_contiguous()
    assert state_digest(turned) == state_digest(STATE)
    assert state_digest(from_record(message(STATE), "generator", STATE)) == state_digest(STATE)


# ---- the closed list -------------------------------------------------------------------------------------------------


def reply(module: Module) -> RecordDict:
    values = {"head": "0" * 64, "epsilon": 1.0, "epsilon_lifetime": 1.0, "steps": 3, "private": True}
    assert set(values) == RECEIPT
    return RecordDict(
        {
            WEIGHTS[module]: to_record(STATE),
            "progress": progress_record(dict.fromkeys(PROGRESS[module], 0.5)),
            "receipt": ConfigRecord(values),
        }
    )


def without(content: RecordDict, name: str) -> None:
    del content[name]


FAULTS: dict[str, Callable[[RecordDict, Module], object]] = {
    "an extra array record": lambda c, m: c.update({"discriminator": to_record(STATE)}),
    "an extra metric record": lambda c, m: c.update({"metrics": MetricRecord({"loss": 0.1})}),
    "an extra config record": lambda c, m: c.update({"note": ConfigRecord({"text": "hello"})}),
    "a refusal beside a reply": lambda c, m: c.update({"refusal": ConfigRecord({"code": "x"})}),
    "no weights": lambda c, m: without(c, WEIGHTS[m]),
    "no progress": lambda c, m: without(c, "progress"),
    "no receipt": lambda c, m: without(c, "receipt"),
    "an extra progress value": lambda c, m: c["progress"].update({"real_loss": 0.1}),
    "a missing progress value": lambda c, m: c.update({"progress": MetricRecord({})}),
    "an extra receipt value": lambda c, m: c["receipt"].update({"patients": 117}),
    "a missing receipt value": lambda c, m: c["receipt"].pop("head"),
    "weights of another kind": lambda c, m: c.update({WEIGHTS[m]: ConfigRecord({"a": 1})}),
    "progress of another kind": lambda c, m: c.update({"progress": ConfigRecord(dict.fromkeys(PROGRESS[m], 0.1))}),
    "receipt of another kind": lambda c, m: c.update({"receipt": MetricRecord(dict.fromkeys(RECEIPT, 0.1))}),
}

VALUES: dict[str, Callable[[RecordDict, Module], object]] = {
    "a list where a number belongs": lambda c, m: c["progress"].update({"update_norm": [0.1, 0.2]}),
    "text where a digest belongs": lambda c, m: c["receipt"].update({"head": "Jane Doe"}),
    "bytes where a number belongs": lambda c, m: c["receipt"].update({"epsilon": b"pixels"}),
}


@pytest.mark.parametrize("module", MODULES)
def test_a_reply_or_a_refusal_may_leave(module: Module) -> None:
    check_reply(reply(module), module)
    check_reply(refusal("budget_exceeded"), module)


# A statistic has no progress value that could be left out or replaced.
OF_PROGRESS = {"a missing progress value", "a list where a number belongs"}
CASES = [(f, m) for f in (*FAULTS, *VALUES) for m in MODULES if PROGRESS[m] or f not in OF_PROGRESS]


@pytest.mark.parametrize(("fault", "module"), CASES)
def test_nothing_else_may_leave(fault: str, module: Module) -> None:
    content = reply(module)
    (FAULTS | VALUES)[fault](content, module)
    with pytest.raises(JobFailed) as caught:
        check_reply(content, module)
    assert caught.value.code == ("reply_not_in_closed_list" if fault in FAULTS else "reply_malformed")


@pytest.mark.parametrize(
    "values", [{"code": "x", "text": "y"}, {"text": "y"}, {}, {"code": "No such file: /a/b"}, {"code": 3}, {"code": ""}]
)
def test_a_refusal_with_more_than_a_code_may_not_leave(values: dict[str, str | int]) -> None:
    with pytest.raises(JobFailed) as caught:
        check_reply(RecordDict({"refusal": ConfigRecord(dict(values))}), "gan")
    assert caught.value.code == "reply_malformed"


def test_no_module_may_send_the_weights_of_another() -> None:
    for sent in MODULES:
        for asked in MODULES:
            if sent != asked:
                with pytest.raises(JobFailed):
                    check_reply(reply(sent), asked)


def test_a_refusal_and_a_task_hold_codes_and_numbers_only() -> None:
    assert dict(refusal("cohort_too_small").config_records["refusal"]) == {"code": "cohort_too_small"}
    task = task_record("f" * 64, "gan", 3, "north", "a" * 64)
    assert dict(task) == {"study": "f" * 64, "module": "gan", "round": 3, "site": "north", "head": "a" * 64}
    assert isinstance(to_record(STATE), ArrayRecord)
