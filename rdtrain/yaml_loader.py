"""How YAML files are read and written. A name that stands twice, where PyYAML would silently drop the first, is an error.

Numbers are what everybody means by them. PyYAML has YAML 1.1, in which 3e-4 is text, 010 is 8 and 1:30 is 90; here the first is a number,
and the others are text.
"""

import re

import yaml


class YamlLoader(yaml.SafeLoader):
    """`yaml.SafeLoader`, but for a name that stands twice in one mapping, a ComposerError, which tells the place, and for numbers."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The next mapping of the file, before its merge keys (`<<`) are resolved."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands twice in one mapping", key.start_mark)
            names.add((key.tag, str(key.value)))
        return node


class YamlDumper(yaml.SafeDumper):
    """`yaml.SafeDumper`, which quotes what YamlLoader would take for a number as well."""


INTEGER = re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$")
FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$")
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", INTEGER, list("-+0123456789"))
for kind in (YamlLoader, YamlDumper):
    kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
