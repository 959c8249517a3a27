"""Recipes that ship with the package, as YAML files; `thrifty train NAME` takes them by name."""
