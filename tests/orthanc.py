"""A real Orthanc on loopback, with DICOMweb and a password, filled by dcmtk's storescu."""

import json
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from real_consortium import free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
MISSING = not PLUGIN.exists() or any(
    not (shutil.which(name) or Path("/usr/sbin", name).exists()) for name in ("Orthanc", "storescu")
)
USER, PASSWORD = "fedmed", "test-only"


class Orthanc:
    """The archive, which can be killed and started again over the same objects."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.web, self.dicom = free_port(), free_port()
        self._file = folder / "orthanc.json"
        modality = {"AET": "FEDMED", "Host": "127.0.0.1", "Port": 11112, "AllowGet": True}
        known = {
            "Name": "hospital", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "Plugins": [str(PLUGIN)], "HttpPort": self.web, "RemoteAccessAllowed": False,
            "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}, "DicomAet": "HOSPA",
            "DicomPort": self.dicom, "DicomCheckCalledAet": True, "DicomCheckModalityHost": True,
            "DicomAlwaysAllowEcho": False, "DicomAlwaysAllowStore": False, "DicomModalities": {"fedmed": modality},
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Ssl": False},
        } | settings  # fmt: skip
        self._file.write_text(json.dumps(known))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
        self._process = subprocess.Popen(
            [program, str(self._file)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        for line in self._process.stderr:
            if b"Orthanc has started" in line:
                break
        threading.Thread(target=self._process.stderr.read, daemon=True).start()  # so that it never waits for us
        opener = urllib.request.build_opener(_basic(self.web))
        assert opener.open(f"http://127.0.0.1:{self.web}/system", timeout=60).status == 200

    def store(self, files: Sequence[Path], *tls: str | Path) -> None:
        place = ["-aet", "FEDMED", "-aec", "HOSPA", "localhost" if tls else "127.0.0.1", str(self.dicom)]
        command = ["storescu", *map(str, tls), *place, *map(str, files)]
        subprocess.run(command, check=True, timeout=60)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process.stderr.close()
            self._process = None


def _basic(port: int) -> urllib.request.HTTPBasicAuthHandler:
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, f"http://127.0.0.1:{port}/", USER, PASSWORD)
    return urllib.request.HTTPBasicAuthHandler(passwords)
