"""Search spaces: one YAML file for each family of backbones, read by :mod:`sidt.space.space`."""
