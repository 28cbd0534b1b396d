"""Every file of TOML that people write is refused in one line, which names the key, and the nearest known one."""

from pathlib import Path

import pytest

from fedmed import config as run_file
from fedmed.deployment.consortium import read_consortium
from fedmed.errors import ConfigError
from fedmed.federated.site_config import read_site_config
from fedmed.intake.labels import read_label_rules
from fedmed.privacy.policy import read_policy

SITE = 'name = "north"\nmanifest = "m.csv"\n'
LABELS = 'join = "image"\ncolumn = "file"\n'
EFFUSION = '[labels.effusion]\ncolumns = ["e"]\npositive = ["1"]\nnegative = ["0"]\n'
CONSORTIUM = 'name = "chest"\naddresses = ["localhost"]\n'


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (read_site_config, SITE + "opt_out_list = 1", "unknown key opt_out_list; did you mean opt-out?"),
        (read_site_config, SITE + "[polcy]\npaused = true", "unknown key polcy; did you mean policy?"),
        (
            read_site_config,
            SITE + "[policy.privacy]\nepsilonn = 1.0",
            "unknown key policy.privacy.epsilonn; did you mean policy.privacy.epsilon?",
        ),
        (read_site_config, SITE + "epsilon = 1.0", "unknown key epsilon; did you mean policy.privacy.epsilon?"),
        (read_site_config, 'name = "north"', "manifest is missing"),
        (
            read_site_config,
            SITE + 'device = 3\nlog-to = "disk"',
            "device: should be a valid string, got 3 (and 1 more)",
        ),
        (read_site_config, SITE + '[policy]\nhours = ["9-5"]', 'policy.hours.0: expected hours as "HH:MM-HH:MM", in'),
        (read_policy, "[policy]\npausd = true", "unknown key policy.pausd; did you mean policy.paused?"),
        (read_policy, '[policy]\nhours = ["9-5"]', 'policy.hours.0: expected hours as "HH:MM-HH:MM", in'),
        (read_policy, "policy = 3", "policy: "),
        (read_consortium, CONSORTIUM + "prot = 1", "unknown key prot; did you mean port?"),
        (read_consortium, CONSORTIUM + "loopback-port = 8443", "loopback-port must not be port"),
        (read_consortium, 'name = "c"\naddresses = ["A:1"]', "addresses.0: expected DNS names in lower case"),
        (
            read_label_rules,
            LABELS + EFFUSION + 'postive = ["2"]',
            "unknown key labels.effusion.postive; did you mean labels.effusion.positive?",
        ),
        (read_label_rules, LABELS + "[label.e]", "unknown key label; did you mean labels?"),
        (run_file.load, 'name = "r"\n[task]\nlabels = ["a", "b", "a"]', 'task.labels names "a" twice'),
        (run_file.load, 'name = "r"\n[data]\nspacing-mm = [1.0]', "data.spacing-mm: expected three numbers"),
        (
            run_file.load,
            'name = "r"\n[train]\nbatchsize = 3',
            "unknown key train.batchsize; did you mean train.batch-size",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_key(read, text, said, tmp_path):
    path = tmp_path / "file.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: {said}"), message
    assert "\n" not in message and "Value error" not in message


@pytest.mark.parametrize("read", [read_site_config, read_policy, read_consortium, read_label_rules, run_file.load])
def test_a_file_that_is_missing_or_no_toml_is_named(read, tmp_path):
    path = Path(tmp_path / "file.toml")
    with pytest.raises(ConfigError, match="no such"):
        read(path)
    path.write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(path)


@pytest.mark.parametrize("read", [read_site_config, read_policy, read_label_rules, run_file.load])
def test_a_folder_is_refused_in_plain_words(read, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_site_config, read_policy, read_consortium, read_label_rules, run_file.load])
def test_a_file_that_is_not_utf8_is_refused_in_plain_words(read, tmp_path):
    path = tmp_path / "file.toml"
    path.write_bytes('name = "Zürich"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8; save it so"):
        read(path)
