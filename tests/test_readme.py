"""The README's code runs, top to bottom, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# A python block, and the text block right behind it if there is one.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n?```text\n(.*?)```)?", re.DOTALL)
MARK = "-- end of block --"


def test_code_blocks_print_what_the_readme_says(tmp_path):
    blocks = BLOCK.findall(README)
    assert len(blocks) >= 3
    script = tmp_path / "readme.py"
    script.write_text(
        "\n".join(f"{code}\nprint({MARK!r}, flush=True)" for code, _ in blocks)
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(MARK + "\n")
    for (code, expected), actual in zip(blocks, printed, strict=False):
        assert actual == expected, code


def test_every_file_the_readme_names_is_there():
    for name in re.findall(
        r"`((?:crypten_espn|benchmarks|patches|tests)/[\w./]+)`", README
    ):
        assert (ROOT / name).exists(), name


def test_links_between_documents_hold():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
