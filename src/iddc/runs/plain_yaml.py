"""YAML of plain values: a few lines of aliases, or one of digits, can stand for gigabytes."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Reads what stands for itself, and refuses aliases and huge numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="an alias", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > 64:
            raise yaml.MarkedYAMLError(problem="a huge number", problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        Exception: It is no YAML, or holds an alias or a huge number.
    """
    return yaml.load(text, _Loader)
