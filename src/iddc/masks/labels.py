"""RUN/labels.json: what a person called the clusters. Names are edited here and nowhere else.

Clusters of one name are one class. The name `ignore` takes a cluster out of every mask. A cluster
that nobody named is called by its number. Nothing is ever trained again because of a name.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import numpy as np
from jaxtyping import Integer, UInt8
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    model_validator,
)

from iddc.errors import ConfigError, DataError
from iddc.masks.colours import palette
from iddc.runs import WRITTEN, explain, read_text, refuse_newer, write_atomic
from iddc.runs.files import locked

LABELS = "labels.json"
"""The file in RUN."""
IGNORED = "ignore"
"""The name of clusters that belong to no class."""
MAX_NAME = 100
"""The longest name, in characters."""
MAX_HISTORY = 100
"""How many edits can be undone."""


def cluster_names(num: int) -> tuple[str, ...]:
    """The names of clusters until somebody gives better ones."""
    return tuple(f"cluster {index}" for index in range(num))


def _checked_name(text: str) -> str:
    name = normalize("NFC", text)  # or two names could look alike and differ
    if not (0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()):
        raise ValueError(
            f"a name has 1 to {MAX_NAME} printable characters, in one line and without spaces "
            f"around it, found {reprlib.repr(text)}"
        )
    return name


def _checked_colour(text: str) -> str:
    if not re.fullmatch("#[0-9a-f]{6}", text.lower()):
        raise ValueError(f"a colour looks like #87ceeb, found {reprlib.repr(text)}")
    return text.lower()


Name = Annotated[str, AfterValidator(_checked_name)]
Colour = Annotated[str, AfterValidator(_checked_colour)]


@dataclass(frozen=True, eq=False)
class Classes:
    """What the ids of a mask mean. Classes are in the order of their lowest cluster."""

    names: tuple[str, ...]
    """One per class; no two are equal."""
    colours: UInt8[np.ndarray, "c 3"]
    """RGB, one per class."""
    of_cluster: Integer[np.ndarray, " k"]
    """The class of every cluster: uint8 where that is enough, else uint16. Ignored clusters have
    the highest value of the type, 255 or 65535."""


class _Edit(BaseModel):
    """What names and colours were before an edit; None: there was no colour."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id2label: dict[int, Name] = {}
    colours: dict[int, Colour | None] = {}


class Labels(BaseModel):
    """The content of labels.json. `id2label` is as in a configuration of `transformers`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id2label: dict[int, Name]
    """The name of every cluster."""
    colours: dict[int, Colour] = {}
    """The colours that a person chose. A class has that of its lowest cluster with one."""
    history: tuple[_Edit, ...] = ()
    """What undoes the last edits, the oldest first."""

    @model_validator(mode="after")
    def _whole(self) -> Labels:
        clusters = range(len(self.id2label))
        if sorted(self.id2label) != [*clusters]:
            raise ValueError("id2label must name every cluster from 0 on")
        named = [*self.colours]
        for edit in self.history:
            named += [*edit.id2label, *edit.colours]
        if any(cluster not in clusters for cluster in named):
            raise ValueError("a colour or an earlier name belongs to no cluster")
        if all(name == IGNORED for name in self.id2label.values()):
            raise ValueError(f"every cluster is named {IGNORED}, so that no class is left")
        return self

    @classmethod
    def numbered(cls, num_clusters: int) -> Labels:
        """The labels before anybody named a cluster."""
        return cls(id2label=dict(enumerate(cluster_names(num_clusters))))

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every cluster, in order."""
        return tuple(self.id2label[cluster] for cluster in range(len(self.id2label)))

    @cached_property
    def classes(self) -> Classes:
        """Clusters of one name as one class."""
        members: dict[str, list[int]] = {}
        for cluster, name in enumerate(self.names):
            if name != IGNORED:
                members.setdefault(name, []).append(cluster)
        colours = palette(len(self.id2label))[[clusters[0] for clusters in members.values()]]
        some_ignored = IGNORED in self.id2label.values()
        kind = np.uint8 if len(members) + some_ignored <= 256 else np.uint16
        of_cluster = np.full(len(self.id2label), np.iinfo(kind).max, kind)
        for index, clusters in enumerate(members.values()):
            of_cluster[clusters] = index
            chosen = [self.colours[cluster] for cluster in clusters if cluster in self.colours]
            if chosen:
                colours[index] = [*bytes.fromhex(chosen[0][1:])]
        return Classes(tuple(members), colours, of_cluster)

    @property
    def cluster_colours(self) -> UInt8[np.ndarray, "k 3"]:
        """RGB, one per cluster: that of its class, black for ignored ones."""
        classes = self.classes
        result = np.zeros((len(self.id2label), 3), np.uint8)
        kept = classes.of_cluster < len(classes.names)
        result[kept] = classes.colours[classes.of_cluster[kept]]
        return result

    def edit(
        self, names: Mapping[int, str] | None = None, colours: Mapping[int, str] | None = None
    ) -> Labels:
        """Name clusters and choose colours. The edit can be undone.

        Args:
            names: By cluster. The same name for several merges them, `ignore` takes one out, an
                empty one gives a cluster its number back.
            colours: By cluster, such as #87ceeb, for its whole class; empty: our own.

        Raises:
            ConfigError: There is no such cluster, or a name or a colour is none.
        """
        names, colours = names or {}, colours or {}
        wrong = [cluster for cluster in (*names, *colours) if cluster not in self.id2label]
        if wrong:
            raise ConfigError(
                f"No cluster {wrong[0]}: this model has the clusters 0 to {len(self.id2label) - 1}."
            )
        own = cluster_names(len(self.id2label))
        id2label = dict(self.id2label)
        for cluster, name in names.items():
            id2label[cluster] = normalize("NFC", name.strip()) or own[cluster]
        chosen: dict[int, str | None] = dict(self.colours)
        for cluster, colour in colours.items():
            for other, name in id2label.items():
                if name == id2label[cluster]:
                    chosen[other] = colour.strip() or None
        return self._changed(id2label, chosen)

    def undo(self) -> Labels:
        """Take the last edit back.

        Raises:
            ConfigError: There is none.
        """
        if not self.history:
            raise ConfigError("There is no edit of the labels to undo.")
        last = self.history[-1]
        result = self._changed(self.id2label | last.id2label, {**self.colours, **last.colours})
        return result.model_copy(update={"history": self.history[:-1]})

    def _changed(self, id2label: Mapping[int, str], colours: Mapping[int, str | None]) -> Labels:
        """With these names and colours, and with what undoes the difference."""
        try:
            new = Labels.model_validate(
                {
                    "id2label": id2label,
                    "colours": {key: value for key, value in colours.items() if value},
                }
            )
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            cluster = f"Cluster {problem['loc'][1]}: " if len(problem["loc"]) > 1 else ""
            text = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{cluster}{text if cluster else text.capitalize()}.") from None
        before = _Edit(
            id2label={
                cluster: name
                for cluster, name in self.id2label.items()
                if name != new.id2label[cluster]
            },
            colours={
                cluster: self.colours.get(cluster)
                for cluster in self.id2label
                if self.colours.get(cluster) != new.colours.get(cluster)
            },
        )
        if before == _Edit():
            return self
        return new.model_copy(update={"history": (*self.history, before)[-MAX_HISTORY:]})


def read_labels(folder: Path, num_clusters: int) -> Labels:
    """Read labels.json of a folder with a model; without one, clusters have numbers.

    Raises:
        DataError: It is damaged, belongs to another model or comes from a newer iddc.
    """
    path = folder / LABELS
    try:
        record = json.loads(read_text(path))
    except FileNotFoundError:
        return Labels.numbered(num_clusters)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}). Repair it or move it away.") from error
    if isinstance(record, dict):
        refuse_newer(record, path)
        record = {key: value for key, value in record.items() if key not in WRITTEN}
    try:
        labels = Labels.model_validate(record)
    except ValidationError as error:
        raise DataError(f"{path}: {explain(error)} Repair it or move it away.") from None
    if len(labels.id2label) != num_clusters:
        raise DataError(
            f"{path} names {len(labels.id2label)} clusters, but the model has {num_clusters}: it "
            "belongs to another model. Move it away."
        )
    return labels


def write_labels(folder: Path, labels: Labels) -> None:
    """Write labels.json, completely or not at all.

    Raises:
        SetupError: It cannot be written.
    """
    record = {**WRITTEN, **labels.model_dump(mode="json")}
    write_atomic(folder / LABELS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def edit_labels(folder: Path, num_clusters: int, change: Callable[[Labels], Labels]) -> Labels:
    """Read, change and write the labels of a run, one process at a time.

    Args:
        folder: RUN.
        num_clusters: K of its model.
        change: Such as `Labels.undo`.

    Raises:
        ConfigError: From `change`; the file stays as it was.
        DataError: See `read_labels`.
        SetupError: It cannot be written.
    """
    with locked(folder / ".lock", wait=True):
        before = read_labels(folder, num_clusters)
        after = change(before)
        if after != before:
            write_labels(folder, after)
    return after
