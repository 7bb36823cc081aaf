"""Build script: packages, and the C that runs on CPUs. Metadata is in pyproject.toml.

kdfast/kernels and kdfast/benchmarks are symbolic links to the top-level folders, so nothing is mapped here.
"""

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

THREADS = ["-fopenmp"]


class Build(build_ext):
    """Extensions without threads where the compiler knows no OpenMP, and none (they are optional) where there is no compiler."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception:  # what a compiler's failure raises depends on the version of setuptools
            ext.extra_compile_args = [flag for flag in ext.extra_compile_args if flag not in THREADS]
            ext.extra_link_args = []
            super().build_extension(ext)


setup(
    license="MIT",
    packages=find_packages(include=["kdfast", "kdfast.*"], exclude=["kdfast.benchmarks.maintain*", "kdfast.benchmarks.tests*"]),
    package_data={"kdfast": ["py.typed"], "kdfast.report": ["*.html"]},
    ext_modules=[
        Extension(
            "kdfast.kernels._lion_cpu",
            ["kernels/lion_cpu.c"],
            # NaNs are values, and fused only what is asked for; comparisons that may trap, and functions that set errno, keep compilers
            # from vector instructions
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-fno-fast-math",
                "-ffp-contract=off",
                "-fno-trapping-math",
                "-fno-math-errno",
                *THREADS,
            ],
            extra_link_args=THREADS,
            depends=["setup.py"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
)
