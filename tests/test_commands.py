"""Commands of the README and of docs: they run as they are written, and have no flag that is not there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from parity.cli import main

ROOT = Path(__file__).parents[1]
DOCS = (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"{path.relative_to(ROOT)}" for path in DOCS))
STARTS = r"(?:for |torchrun |python -m parity)"
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Of what a page leaves to its reader, what is put in its place here.
PLACEHOLDERS = {
    "FILE": f"{ROOT}/parity/cases/recordings/pydoc.safetensors",
    "--checkpoint FOLDER --layer 3": f"--checkpoint {ROOT}/tests/checkpoints/deepseek_v3 --layer 1",
    "compare FOLDER FOLDER": "compare A B",
    "--tokens T": "--tokens 64",
    "faults NAME": "faults torch-off-by-one-group",
    "docs/results/*": f"{ROOT}/docs/results/*",
    "new mine.py --framework jax": "new mine_in_jax.py --framework jax",
}  # fmt: skip

# Commands that are not run, by a pattern that finds them, and why. Their flags are looked at all the same.
NOT_RUN = {
    "--device cuda": "it needs a GPU",
    "families:": "its environment is another one: make test-published",
    "transformers:": "its environment is another one: make test-published",
    "easydel@": "its environment is another one: make test-published",
    "parity survey": "its environment is another one: make test-published",
    "package.module:": "any package of the reader's own",
    "--coordinator": "any cluster of the reader's own",
    "check --random 1000": "minutes: ten of them in docs/tolerances.md",
    "faults --run": "minutes: tests/test_faults.py plants them",
    "study --learn": "hours",
    "parity.study.pydoc": "it trains a model",
    "parity capture": "minutes: tests/test_capture.py",
    "parity bench": "minutes: tests/test_bench.py",
    "parity layer": "minutes: tests/test_bench.py",
    "parity study": "minutes: tests/test_study_page.py; the quick one runs",
    "check --model deepseek-v3$": "real width, as on a GPU",
    "mine.py:name": "the name of a function of the reader's own",
    "--record gate=": "modules of the reader's own",
    "drop-rank-token drop-expert-token": "the layer above it: tests/test_own_layer.py",
    "docs/results/FILE": "a file among many: tests/test_results.py reads all",
}
ALL_THE_SAME = "--quick"
MISMATCHES = ("zipf ties bfloat16 --backend mine.py",)


def commands(page: str) -> list[str]:
    """Each command of a page once, in order, without the comment that follows it."""
    text = (ROOT / page).read_text()
    blocks = "\n".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
    prose = FENCED.sub("", text)
    indented = re.findall(rf"^    ({STARTS}.*)$", prose.replace("\\\n", " "), re.MULTILINE)
    inline = [" ".join(one.split()) for one in re.findall(rf"`({STARTS}[^`]*)`", prose)]
    lines = [line for line in blocks if re.match(STARTS, line)]
    return list(dict.fromkeys(re.sub(r"\s+# .*", "", line).strip() for line in (*lines, *indented, *inline)))


def runs(command: str) -> bool:
    return ALL_THE_SAME in command or not any(re.search(part, command) for part in NOT_RUN)


def test_every_reason_is_of_some_command():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 50
    for part in (*NOT_RUN, *MISMATCHES, ALL_THE_SAME):
        assert any(re.search(part, command) for command in found), part


@pytest.mark.parametrize("page", PAGES)
def test_their_flags_are_there(page, capsys):
    for command in commands(page):
        for words in re.findall(r"-m parity (\w+)([^;`]*)", command):
            with pytest.raises(SystemExit):
                main([words[0], "--help"])
            told = capsys.readouterr().out
            for flag in re.findall(r"--[a-z-]+", words[1]):
                assert flag in told or flag.replace("--", "--no-") in told, command


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, commands(page)))])
def test_they_run_as_written(page, tmp_path):
    for name, framework in (("mine.py", "torch"), ("theirs.py", "jax"), ("old.py", "torch"), ("new.py", "torch")):
        if page != "README.md" or name != "mine.py":  # which the README has its reader write
            subprocess.run(
                [sys.executable, "-m", "parity", "new", name, "--framework", framework], cwd=tmp_path, check=True
            )
    if any("parity compare" in command for command in commands(page)):  # of traces that two machines saved
        for name, framework in (("A", "torch"), ("B", "jax")):
            saving = [sys.executable, "-m", "parity", "check", "zipf", "--backend", framework, "--save", name]
            subprocess.run(saving, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    for command in filter(runs, commands(page)):
        for word, meant in PLACEHOLDERS.items():
            command = command.replace(word, meant)
        shell = re.sub(r"\bpython\b", shlex.quote(sys.executable), command)
        shell = shell.replace("torchrun", f"{shlex.quote(sys.executable)} -m torch.distributed.run")
        done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        expected = 1 if any(part in command for part in MISMATCHES) else 0
        assert done.returncode == expected, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def anchors(path: Path) -> set[str]:
    """What a link may name after `#`: headings of a page, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = FENCED.sub("", (ROOT / page).read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http:", "https:")):
            name, _, anchor = link.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link
