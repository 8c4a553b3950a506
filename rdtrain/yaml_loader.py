"""How YAML files are read: a name that stands twice, where PyYAML would silently drop the first, is an error."""

import yaml


class YamlLoader(yaml.SafeLoader):
    """`yaml.SafeLoader`, but for a name that stands twice in one mapping: a ComposerError, which tells the place."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """The next mapping of the file, before its merge keys (`<<`) are resolved."""
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in names:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands twice in one mapping", key.start_mark)
            names.add((key.tag, str(key.value)))
        return node
