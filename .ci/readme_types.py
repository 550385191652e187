#!/usr/bin/env python3
"""Check README's ``python`` blocks with mypy --strict and pyright: ``readme_types.py BIN``, a folder that has both.

Blocks that begin with a comment ``# name.py`` are written under that name, so that the ones after them can import them.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

TOP = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = """
[tool.mypy]
strict = true
python_version = "3.10"
[[tool.mypy.overrides]]
module = ["pyarrow.*", "duckdb.*", "pandas.*", "polars.*"]
ignore_missing_imports = true
follow_imports = "skip"
[tool.pyright]
reportMissingImports = false
reportMissingModuleSource = false
reportMissingTypeStubs = false
"""


def main(tools: pathlib.Path) -> int:
    """Write the blocks, run both checkers over them, return whether one complained."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (TOP / "README.md").read_text(encoding="utf-8"), re.M | re.S
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(TOP / "vgi_rpc.py", folder)
        pathlib.Path(folder, "pyproject.toml").write_text(SETTINGS)
        names = []
        for number, block in enumerate(blocks):
            named = re.match(r"# (\w+\.py)\n", block)
            name = f"block_{number}.py"
            if named:
                name = named[1]
            pathlib.Path(folder, name).write_text(block)
            names.append(name)
        failed = False
        for command in (["mypy", "--no-error-summary", *names], ["pyright", "--level", "error", *names]):
            print(f"{command[0]} over {len(names)} blocks of README.md", flush=True)
            failed |= subprocess.run([str(tools / command[0]), *command[1:]], cwd=folder).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
