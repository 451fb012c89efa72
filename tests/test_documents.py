"""README and docs: code runs and prints what they say, and all they name is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# A python block, and the text block right behind it if there is one.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n?```text\n(.*?)```)?", re.DOTALL)
WITH_CODE = [name for name, text in DOCUMENTS.items() if BLOCK.search(text)]
MARK = "-- end of block --"

documents = pytest.mark.parametrize("name", DOCUMENTS)


def test_the_readme_and_the_tutorial_show_code() -> None:
    assert {"README.md", "docs/tutorial.md"} <= set(WITH_CODE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WITH_CODE)
def test_code_blocks_print_what_the_document_says(name: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall(DOCUMENTS[name])
    script = tmp_path / "document.py"
    script.write_text(
        "\n".join(f"{code}\nprint({MARK!r}, flush=True)" for code, _ in blocks)
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # no document may need a file of the checkout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(MARK + "\n")
    for (code, expected), actual in zip(blocks, printed, strict=False):
        assert actual == expected, code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_prints_what_it_shows(tmp_path: Path) -> None:
    """Its words exactly; its counts nearly, for they follow each way to calibrate."""
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    shown = ["".join(out["text"]) for cell in code for out in cell["outputs"]]
    assert len(shown) == len(code) > 3
    script = tmp_path / "notebook.py"
    sources = ["".join(cell["source"]) for cell in code]
    script.write_text("".join(f"{s}\nprint({MARK!r}, flush=True)\n" for s in sources))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(MARK + "\n")
    assert printed.pop() == "" and len(printed) == len(shown)
    number = re.compile(r"\d[\d,]*")
    for text, wanted in zip(printed, shown, strict=True):
        assert number.sub("N", text) == number.sub("N", wanted)
        for one, other in zip(
            number.findall(text), number.findall(wanted), strict=True
        ):
            counted, expected = (int(n.replace(",", "")) for n in (one, other))
            assert abs(counted - expected) <= max(4, expected // 20), text


@documents
def test_every_file_that_is_named_is_there(name: str) -> None:
    pattern = r"`((?:crypten_espn|benchmarks|patches|tests|docs)/[\w./]+)`"
    for file in re.findall(pattern, DOCUMENTS[name]):
        assert (ROOT / file).exists(), file


@documents
def test_links_hold(name: str) -> None:
    for target in re.findall(r"\]\(([^):]+)\)", DOCUMENTS[name]):
        file, _, heading = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        assert path.exists(), target
        if heading:
            known = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", line.lower()) for line in known}
            assert heading in {slug.replace(" ", "-") for slug in slugs}, target


@documents
def test_every_benchmark_that_is_named_can_be_run(name: str) -> None:
    for module in re.findall(r"python -m (benchmarks\.\w+)", DOCUMENTS[name]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@documents
def test_the_claim_is_worded_alike(name: str) -> None:
    text = " ".join(DOCUMENTS[name].split()).lower()
    for found in re.findall(r"semi-honest[^.:|]*", text):
        if "two parties" in found:
            wording = "semi-honest, two parties, a dealer that does not collude"
            assert found.startswith(wording), found
