"""The list of packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

subpackages = find_packages(include=["core", "core.*", "nodes", "nodes.*"])
setup(
    script_name="setup.py",  # keeps this file, which lies in the folder of the package, out of the package
    packages=["continual_concepts", *(f"continual_concepts.{name}" for name in subpackages)],
)
