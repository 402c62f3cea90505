"""Prints what a project and some of its extras need, one requirement per line.

    python3 docker/requirements.py pyproject.toml sidecar,redis

So that the image installs them before it copies the sources, which change more often.
"""

import sys
from pathlib import Path

import tomllib

__all__: list[str] = []

file, extras = sys.argv[1:]
project = tomllib.loads(Path(file).read_text())["project"]
lists = [project["dependencies"]]
lists += [project["optional-dependencies"][extra] for extra in extras.split(",") if extra]
sys.stdout.writelines(f"{requirement}\n" for each in lists for requirement in each)
