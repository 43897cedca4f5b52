"""YAML files that people write: a message says in one line what is wrong on which line of them."""

from pathlib import Path
from typing import Any

import yaml

from igd_ds.errors import UsageError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that a mapping has twice.

    The YAML specification forbids such keys, and PyYAML silently takes the last one.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, Any], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first_line:
                problem = f"key '{key.value}' occurs twice, first on line {first_line[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            first_line[name] = line
        return node


def read_yaml_file(path: str | Path) -> Any:
    """Return what a YAML file in UTF-8 holds; None if it is empty.

    Raises:
        UsageError: the file is not UTF-8 or not valid YAML, or a mapping has a key twice; the
            message names file and line.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
        return yaml.load(text, _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        why = f"line {line}: byte 0x{data[error.start]:02x} is not UTF-8"
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        why = f"line {mark.line + 1}: {problem}" if mark else problem
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        why = f"line {line}: character #x{ord(text[error.position]):04x} is not allowed"
    except (ValueError, RecursionError) as error:  # a date that does not exist; deep nesting
        why = " ".join(str(error).split())
    raise UsageError(f"{path} is not valid YAML ({why})")


def read_yaml_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, such as a run's config.yaml.

    Raises:
        UsageError: as `read_yaml_file`; or the file holds no mapping.
    """
    found = read_yaml_file(path)
    if not isinstance(found, dict):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise UsageError(f"{path}: expected 'setting: value' lines, found {what}")
    return found
