"""A machine that is to have every program that the tests want cannot pass by skipping."""

import os
import subprocess
import sys

SKIPS = """
import pytest
from full_disks import NO_MOUNT

@pytest.mark.skipif(True, reason="nginx is not installed")
def test_mark(): ...

def test_inside():
    pytest.skip("nginx is not installed")

def test_disk():
    pytest.skip(NO_MOUNT)

def test_other():
    pytest.skip("no GPU")
"""


def test_a_skip_for_want_of_a_required_program_is_a_failure(tmp_path):
    (tmp_path / "test_skips.py").write_text(SKIPS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", tmp_path]
    environment = {**os.environ, "FEDMED_REQUIRE": "chromium nginx mount"}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert "2 failed, 1 skipped, 1 error" in said.stdout.splitlines()[-1], said.stdout + said.stderr
