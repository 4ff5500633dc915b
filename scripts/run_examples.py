"""Run every Python example of the pages: what a reader is told to type must work.

A page's ```python blocks are one program, run in a scratch folder; line numbers in its tracebacks are the page's own.
Blocks in any other language are not run.

    python scripts/run_examples.py [PAGE ...]        (default: README.md, CONTRIBUTING.md and docs/)
"""

from __future__ import annotations

import argparse
import linecache
import os
import re
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The pages that stand in the repository, in reading order."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    inner = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
    return [p for p in top if p.exists()] + inner


def program(text: str) -> tuple[int, str]:
    """(number of blocks, their code with blank lines in place of the text between them)."""
    code, end, count = "", 0, 0
    for count, block in enumerate(FENCE.finditer(text), 1):  # noqa: B007
        code += "\n" * text.count("\n", end, block.start(1)) + block.group(1)
        end = block.end(1)
    return count, code


def run_page(page: Path) -> int:
    """Run the page's blocks; the number of them. Lets a failure through."""
    text = page.read_text(encoding="utf-8")
    name = str(page)
    count, code = program(text)
    # Tracebacks look the source up by name, dataclasses their module: give them the page and a module of its own.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType(f"example_{page.stem.replace('-', '_')}")
    sys.modules[module.__name__] = module
    exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)
    return count


def main() -> int:
    """Exit status: 0 if all examples ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", type=Path)
    chosen = [p.resolve() for p in parser.parse_args().page] or pages()
    failed = 0
    for page in chosen:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            try:
                count = run_page(page)
            except Exception:
                traceback.print_exc()
                print(f"examples: {page.relative_to(ROOT)} FAILED", file=sys.stderr)
                failed += 1
                continue
            finally:
                os.chdir(ROOT)
        if count:
            print(f"examples: {page.relative_to(ROOT)}: {count} blocks, {time.perf_counter() - began:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
