"""The package itself; what it runs on is pinned in requirements/ and installed by scripts/install.sh, in an order that
no resolver finds (openrlhf declares flash-attn, which needs CUDA to build)."""

from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path("openrlhf_apo/__init__.py").read_text(), version)

setup(
    name="openrlhf_apo",
    version=version["__version__"],
    description="Alpha-divergence preference optimisation (arXiv 2512.22953) on OpenRLHF",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["openrlhf_apo*"]),
    python_requires=">=3.11,<3.12",
    install_requires=["torch"],
)
