"""Reads the YAML file of `moefleet serve --config`."""

from pathlib import Path

import yaml
from typing_extensions import override

from router.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice: PyYAML takes the last one, and the first block would be lost in silence."""

    @override
    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        """As the base class. Each mapping is seen here once, as it is written: merges (`<<`) add keys later."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"{key.value} comes a second time in one mapping"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def load_config_file(path: Path) -> dict[str, object]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, is no YAML mapping, or has a key twice; names file and line.
    """
    try:
        loaded: object = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}; name a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"config file {path}{line}: {error.problem or 'is no YAML'}; mend the YAML") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        # PyYAML's own words for tags and keys that fit no value of Python's are none of its errors.
        raise ConfigError(f"config file {path}: {error}; mend the YAML") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"config file {path} must hold keys such as `model: DIR`, got {loaded!r:.80}")
    return loaded
