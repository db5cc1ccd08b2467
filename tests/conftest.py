"""What several test files share: the notebooks, and one strict build of the book."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def book(testrun_uid):
    "The strict build's exit code and output; made once, whichever worker comes first."
    build = ROOT / "_build"
    build.mkdir(exist_ok=True)
    record = build / "strict.json"
    with FileLock(build / "strict.lock"):
        if not record.exists() or json.loads(record.read_text())["run"] != testrun_uid:
            shutil.rmtree(build / "html", ignore_errors=True)
            jb = Path(sys.executable).with_name("jb")
            done = subprocess.run([jb, "build", "--all", ".", "-W", "-n", "--keep-going"], cwd=ROOT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            record.write_text(json.dumps({"run": testrun_uid, "code": done.returncode, "output": done.stdout}))
        return json.loads(record.read_text())
