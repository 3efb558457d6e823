"""Where the packages lie; everything else about the installation is in ``setup.cfg``.

``kernels``, ``trainers``, ``splitters`` and ``configs`` are folders beside ``upcycle/`` and are installed inside of it. ``upcycle/``
holds links to them, but git makes small text files of links where ``core.symlinks`` is false, as on Windows: so no package is
looked for through a link.
"""

from setuptools import find_namespace_packages, setup

BESIDE = ("configs", "kernels", "splitters", "trainers")

inside = find_namespace_packages(include=["upcycle*"], exclude=[f"upcycle.{name}*" for name in BESIDE])
beside = [
    package
    for name in BESIDE
    for package in (f"upcycle.{name}", *(f"upcycle.{name}.{found}" for found in find_namespace_packages(name)))
]
setup(packages=[*inside, *beside], package_dir={f"upcycle.{name}": name for name in BESIDE})
