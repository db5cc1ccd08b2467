"""Run notebooks from top to bottom and store what a reader needs: sources, tags, stable outputs. Usage: store.py NB..."""
import os
import re
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", DIFFUSION_LIT_STATIC="1", MPLBACKEND="module://matplotlib_inline.backend_inline")

import nbformat
from nbclient import NotebookClient
from nbdev.clean import clean_nb


def stable(path, i, output):
    "The output without memory addresses, or None for what does not belong in a book."
    if output.get("name") == "stderr":
        print(f"{path}, code cell {i}, stderr not stored: {output.text.strip()[:200]}", file=sys.stderr)
        return None
    for kind, text in output.get("data", {}).items():
        if kind.startswith("text/"): output.data[kind] = re.sub(r" at 0x[0-9a-f]+", "", text)
    return output


def store(path):
    "Execute one notebook in its own folder and write it back; an error leaves the file as it was."
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=300, kernel_name="python3", extra_arguments=["--log-level=ERROR"], record_timing=False,
                   coalesce_streams=True, resources={"metadata": {"path": path.parent}}).execute()
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for i, cell in enumerate(code): cell.outputs = [o for output in cell.outputs if (o := stable(path, i, output))]
    nb.metadata.pop("widgets", None)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    nbformat.write(nb, path)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]): store(path)
