"""Run the Python of a page of the documentation, block after block: ``python -m tests.support.run_page PAGE``.

The models of a hub are those of the package here, and a GPU is the CPU. A comment before a block changes what becomes
of it: ``<!-- not run: REASON -->``, or ``<!-- file: NAME.py -->``, where the text says to save it. Blocks in comments
(``<!-- invisible-code-block: python ... -->``) are run too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

from fp8_compile.embedded import default_pipeline_dir

NOTE = re.compile(r"<!-- (not run|file): ([^\n]+) -->\n\s*$")


def stand_ins() -> dict[str, str]:
    return {
        '"Qwen/Qwen-Image"': repr(str(default_pipeline_dir("qwen-image"))),
        '"Tongyi-MAI/Z-Image-Turbo"': repr(str(default_pipeline_dir("z-image"))),
        '"cuda"': '"cpu"',
        "height=1024, width=1024": "height=64, width=64",
    }


def main(page: Path) -> None:
    text = page.read_text("utf-8")
    document = Document(text, str(page))
    module = sys.modules["page"] = ModuleType("page")  # where Dynamo looks up the names of its functions
    sys.path.insert(0, "")
    found = CodeBlockParser("python", lambda example: None)(document)
    for region in sorted(found, key=lambda region: region.start):
        line, source = text.count("\n", 0, region.start) + 1, str(region.parsed)
        for name, other in stand_ins().items():
            source = source.replace(name, other)
        note = NOTE.search(text, 0, region.start)
        if note is None:
            torch.compiler.reset()  # else Dynamo's limit on graphs would come into the later blocks
            exec(compile("\n" * line + source, page.name, "exec"), vars(module))
        elif note[1] == "file":
            Path(note[2]).write_text(source, "utf-8")
        print(f"{page.name}:{line} {'run' if note is None else note[0].strip()}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
