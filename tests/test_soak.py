"""What the soak says of memory that it measured, in a hundred looks of a process or of two after each other."""

import pytest
from soak import Memory, report


@pytest.mark.parametrize(("grown_mib", "status"), [(0.0, 0), (50.0, 1)])
def test_a_process_that_was_started_again_is_measured_on(capsys, grown_mib, status):
    old = [(float(at), frozenset({11}), 100.0) for at in range(50)]
    new = [(float(at), frozenset({22}), 100.0 + grown_mib) for at in range(50, 100)]
    memory: Memory = {"a-40: fedmed.deployment.warm": [*old, *new]}
    assert report(memory, 100.0) == status
    assert "started again 1 times" in capsys.readouterr().out


def test_a_program_of_two_processes_at_once_was_not_started_again(capsys):
    memory: Memory = {"server: nginx": [(float(at), frozenset({1, 2}), 10.0) for at in range(100)]}
    assert report(memory, 100.0) == 0
    assert "again" not in capsys.readouterr().out
