"""Build script: maps the top-level kernels/ and benchmarks/ folders into the kdfast package. Metadata is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"kdfast.kernels": "kernels", "kdfast.benchmarks": "benchmarks", "kdfast.benchmarks.results": "benchmarks/results"}

setup(
    license="MIT",
    packages=find_packages(include=["kdfast", "kdfast.*"]) + list(FOLDERS),
    package_dir={"kdfast": "kdfast", **FOLDERS},
    package_data={"kdfast": ["py.typed"], "kdfast.report": ["*.html"], "kdfast.benchmarks.results": ["*.json"]},
)
