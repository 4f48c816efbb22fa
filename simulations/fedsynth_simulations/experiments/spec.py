"""The specification of an experiment: one short TOML file that says what is compared, on which data, beside which figures.

    title = "..."                      # what it shows
    system = "..."                     # the system of the paper, in a few words
    paper = "..."                      # citation
    runner = "images"                  # the module of this package that runs it
    data = "tumour-slices"
    seed = 1
    [plan.gan]                         # keys of the study plan that all columns share
    [[columns]]
    name = "epsilon 10"
    epsilon = 10.0                     # inf: without privacy, and marked so
    plan.gan.loss = "hinge"            # keys of the study plan in which this column differs
    [options]                          # of the runner
    [published.fid]                    # the paper's figure of the row of this id, and why (not) comparable
    [quick.plan.gan]                   # what a quick run on simulated data changes

Unknown keys are errors, those of the plan and of the runner's options included.
"""

from __future__ import annotations

import importlib
import math
import re
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from fedsynth.errors import UsageError
from fedsynth.plan import Section, StudyPlan
from fedsynth.toml import load_toml

DataKind = Literal["tumour-slices", "tcga-lgg", "expression", "simulated"]
# The module of this package that runs a specification. Each offers `Options` and `ColumnOptions`, tables of the file
# (`fedsynth.plan.Section`), `SECTIONS`, the sections of the plan that it heeds, and
# ``run(experiment: Experiment) -> Findings`` (`fedsynth_simulations.experiments.run`).
Runner = Literal["images", "detection", "autoencoder", "radiogenomics", "translation"]
RUNNERS: tuple[Runner, ...] = get_args(Runner)
# Sections of the plan that decide how the data are prepared, which all columns share.
_OF_DATA = ("image", "morphology", "label")

Overrides = dict[str, dict[str, Any]]


class Column(Section):
    """What is compared: a plan that differs in `plan` from that of the others, at a budget `epsilon` of its own.

    `sites` overrides the experiment's; `options` are of the runner.
    """

    name: Annotated[str, Field(min_length=1, max_length=60)]
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=True)] = math.inf
    sites: Literal[1, 3] | None = None
    plan: Overrides = Field(default={})
    options: dict[str, Any] = Field(default={})

    @property
    def private(self) -> bool:
        """Whether it is trained under a finite epsilon."""
        return math.isfinite(self.epsilon)

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


class Published(Section):
    """What the paper reports for a row, as it reports it, and whether that can be compared with ours."""

    value: str
    comparable: bool = False
    why: Annotated[str, Field(min_length=1)]


class Quick(Section):
    """What a quick run changes: it is of simulated data and shows that all works, nothing else."""

    plan: Overrides = Field(default={})
    options: dict[str, Any] = Field(default={})


class Spec(Section):
    """A whole specification; its name is that of its file.

    Attributes:
        sites: 1 pools all patients in one place, as the papers do; 3 is a federation that averages.
        epsilon of a column is spent on images alone.
    """

    title: str
    system: str
    paper: str
    runner: Runner
    data: DataKind
    seed: Annotated[int, Field(ge=0)]
    sites: Literal[1, 3] = 1
    plan: Overrides = Field(default={})
    columns: list[Column] = Field(min_length=1)
    options: dict[str, Any] = Field(default={})
    published: dict[str, Published] = Field(default={})
    quick: Quick = Quick()
    notes: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        slugs = [column.slug for column in self.columns]
        if len(set(slugs)) != len(slugs) or "" in slugs:
            raise ValueError("columns: names must differ in their letters and digits")
        return self

    @model_validator(mode="after")
    def _plan_keys_exist(self) -> Self:
        tables = {"plan": self.plan, "quick.plan": self.quick.plan}
        tables |= {f"columns.{column.slug}.plan": column.plan for column in self.columns}
        for place, overrides in tables.items():
            for section, keys in overrides.items():
                known = plan_section(section)
                unknown = sorted(set(keys) - set(known.model_fields)) if known else [section]
                if unknown:
                    raise ValueError(f"{place}.{section}: the study plan has no {', '.join(unknown)}")
        return self

    @model_validator(mode="after")
    def _plan_keys_are_heeded(self) -> Self:
        # What is not heeded would still be printed beside the results as a setting.
        heeded = runner_module(self.runner).SECTIONS
        columns = {f"columns.{column.slug}.plan": column.plan for column in self.columns}
        for place, overrides in ({"plan": self.plan, "quick.plan": self.quick.plan} | columns).items():
            if ignored := sorted(set(overrides) - heeded):
                raise ValueError(f"{place}: the runner {self.runner!r} does not look at {', '.join(ignored)}")
            if "epsilon" in overrides.get("privacy", {}):
                raise ValueError(f"{place}.privacy.epsilon: a column's epsilon is its own key, by which it is marked")
        for place, overrides in columns.items():
            if shared := [section for section in _OF_DATA if section in overrides]:
                raise ValueError(
                    f"{place}.{shared[0]}: all columns share the data, so this belongs in plan.{shared[0]}"
                )
        return self

    @model_validator(mode="after")
    def _options_are_the_runners(self) -> Self:
        module = runner_module(self.runner)
        try:
            module.Options.model_validate(self.options)
            module.Options.model_validate(self.options | self.quick.options)
            for column in self.columns:
                module.ColumnOptions.model_validate(column.options)
        except ValidationError as error:
            faults = [
                f"options.{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in error.errors(include_url=False)
            ]
            raise ValueError("; ".join(faults)) from None
        return self

    def quickened(self) -> Spec:
        """The same experiment as a quick run: simulated data, and what `quick` changes."""
        changes = {
            "data": "expression" if self.data == "expression" else "simulated",
            "plan": merged(self.plan, self.quick.plan),
            "columns": [
                column.model_copy(update={"plan": merged(column.plan, self.quick.plan)}) for column in self.columns
            ],
            "options": self.options | self.quick.options,
            "published": {},
        }
        return self.model_copy(update=changes)


def merged(first: Overrides, second: Overrides) -> Overrides:
    """The keys of both; where both have one, that of `second`."""
    return {section: first.get(section, {}) | second.get(section, {}) for section in {**first, **second}}


def plan_section(name: str) -> type[BaseModel] | None:
    """The model of the plan's section `name`; None where it has none."""
    field = StudyPlan.model_fields.get(name)
    if field is None:
        return None
    candidates = [field.annotation, *get_args(field.annotation)]
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def runner_module(runner: Runner) -> ModuleType:
    """The module that runs specifications of `runner`."""
    return importlib.import_module(f"fedsynth_simulations.experiments.{runner}")


def folder() -> Path:
    """Where the shipped specifications lie: in the installed package, or beside it in the source tree.

    Raises:
        UsageError: ``experiments_missing``: in neither.
    """
    packaged = Path(str(files("fedsynth_simulations"))) / "experiments" / "specs"
    beside = Path(__file__).parents[2] / "experiments"
    for candidate in (packaged, beside):
        if any(candidate.glob("*.toml")):
            return candidate
    raise UsageError("experiments_missing", "This installation carries no experiments.", "Name a TOML file instead.")


def names() -> list[str]:
    """The names of the shipped specifications."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file of a shipped experiment, or the path that `name` is.

    Raises:
        UsageError: ``experiment_unknown``.
    """
    if name.endswith(".toml"):
        return Path(name)
    if name not in names():
        raise UsageError("experiment_unknown", f"There is no experiment {name!r}.", f"Known: {', '.join(names())}.")
    return folder() / f"{name}.toml"


def load_spec(path: Path) -> Spec:
    """Read and validate a specification.

    Raises:
        UsageError: ``experiment_missing``, ``experiment_not_toml`` or ``experiment_invalid``, with every key named.
    """
    return load_toml(path, Spec, "experiment")
