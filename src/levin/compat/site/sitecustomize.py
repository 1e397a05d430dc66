"""Installs levin's import alias at the start of a process, and then runs the `sitecustomize` that stands behind this one.

Python imports the first `sitecustomize` that it finds; `levin.compat.install` puts this folder into PYTHONPATH. It may meet
any Python, one without levin too, so it keeps to what each of them understands.
"""

import os
import sys


def _install() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    # Only the start of a process needs the folder; the environment keeps it for the processes to come.
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != here]
    try:
        from levin.compat.finder import install_finder
    except ModuleNotFoundError as error:
        if error.name != "levin":
            raise
        # Another environment's Python, in which there is no levin to answer with.
    else:
        install_finder()


def _run_next() -> None:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_install()
_run_next()
