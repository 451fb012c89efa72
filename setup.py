"""Which packages there are: all of crypten_espn/, and patches/ as crypten_espn.patches.

Everything else about the project stands in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["crypten_espn*"]), "crypten_espn.patches"],
    package_dir={"crypten_espn": "crypten_espn", "crypten_espn.patches": "patches"},
)
