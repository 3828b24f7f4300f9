"""Builds the optional extension ``owlore._C`` and ships ``kernels/`` as ``owlore.kernels``.

Without torch in the build environment (plain ``pip install .``) the package is pure Python. With it
(``pip install . --no-build-isolation``) the C++ sources are compiled, and the CUDA ones too when
both ``torch.version.cuda`` and ``CUDA_HOME`` are there.

Environment:
    OWLORE_BUILD_EXT: 1 makes a failed build of the extension an error, 0 skips the extension;
        by default a failure falls back to pure Python with a message.
    TORCH_CUDA_ARCH_LIST: Architectures to compile for; sm_80 to sm_100 and PTX by default.
    MAX_JOBS: Parallel compilations, as for every torch extension.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent

# The oldest torch that the compiled extension must run on: 2.11.
TORCH_TARGET_VERSION = "0x020b000000000000"
# One binary for Python 3.10 and later.
WHEEL_TAG = "cp310"
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0")


def say(message: str) -> None:
    print(f"owlore: {message}", file=sys.stderr)


def default_cuda_archs(cuda_version: str) -> str:
    """The architectures that this CUDA release knows, the last one as PTX too."""
    release = tuple(int(part) for part in cuda_version.split(".")[:2])
    archs = [arch for arch in CUDA_ARCHS if arch != "10.0" or release >= (12, 8)]
    return ";".join(archs) + "+PTX"


def extension(cpp_extension) -> Extension:
    """The extension for the torch that is installed here."""
    import torch

    # What this machine can compile for decides, not whether a GPU is plugged in.
    with_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx = [*macros, "-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=on"]
    flags = {"cxx": cxx}
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_cuda_archs(torch.version.cuda))
        sources += sorted((ROOT / "csrc").glob("*.cu"))
        macros += ["-DUSE_CUDA"]
        cxx += ["-DUSE_CUDA"]
        flags["nvcc"] = [*macros, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return kind(
        "owlore._C",
        [str(source.relative_to(ROOT)) for source in sources],
        depends=[str(header.relative_to(ROOT)) for header in (ROOT / "csrc").glob("*.h")],
        extra_compile_args=flags,
        py_limited_api=True,
    )


def build_settings() -> dict:
    """The part of ``setup()`` that depends on what can be compiled here."""
    wanted = os.environ.get("OWLORE_BUILD_EXT", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"owlore: OWLORE_BUILD_EXT must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        say("OWLORE_BUILD_EXT=0: pure Python, without the compiled extension")
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if wanted == "1":
            raise SystemExit(
                "owlore: OWLORE_BUILD_EXT=1 needs torch in the build environment: install torch, "
                f"setuptools and ninja, then pip install . --no-build-isolation ({error})"
            ) from error
        say(
            "no torch in the build environment: pure Python. For the compiled extension: "
            "pip install . --no-build-isolation"
        )
        return {}

    class BuildExtension(cpp_extension.BuildExtension):
        """torch's builder, with the pure-Python fallback."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                # Compilers fail in many ways (DistutilsError, CalledProcessError, RuntimeError,
                # OSError); each means the same here.
                if wanted == "1":
                    raise
                self.extensions = []
                self.distribution.ext_modules = []
                say(
                    f"THE EXTENSION DID NOT BUILD, going on in pure Python: {error}\n"
                    "owlore: everything works, outlier statistics are slower. OWLORE_BUILD_EXT=1 "
                    "makes this an error, OWLORE_BUILD_EXT=0 skips the attempt."
                )

        def get_source_files(self) -> list:
            return [] if not self.extensions else super().get_source_files()

    try:
        module = extension(cpp_extension)
    except Exception as error:
        if wanted == "1":
            raise
        say(f"the extension cannot be configured, pure Python: {error}")
        return {}
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": WHEEL_TAG}},
    }


setup(
    # STYLE: an installed top-level `kernels` breaks transformers, so the folder is mapped.
    packages=["owlore", "owlore.kernels"],
    package_dir={"owlore": "owlore", "owlore.kernels": "kernels"},
    package_data={"owlore": ["py.typed"]},
    **build_settings(),
)
