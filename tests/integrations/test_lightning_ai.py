"""The packages of Lightning AI, litlogger and litmodels, against a stand-in for the service, which needs an account."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.lightning_service import LightningService
from tests.integrations.proxy import Proxy

ROOT = Path(__file__).parents[2]
# What the packages upload is put into a folder instead: files take another way there, in pieces, to a store.
UPLOADS = """
import shutil, sys
from pathlib import Path
import levin.compat
levin.compat.install()
import lightning_sdk.models, lightning_sdk.teamspace, litlogger.media, litmodels.io.cloud
folder = Path(sys.argv[1])

def upload_file(self, file_path, remote_path, **options):
    (folder / "files" / remote_path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file_path, folder / "files" / remote_path)

def upload_model(name, model=None, path=None, **options):
    target = folder / "models" / name.replace(":", "@")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(model or path, target)

def download_model(name, download_dir, **options):
    shutil.copytree(folder / "models" / name.replace(":", "@"), download_dir)
    return [path.name for path in Path(download_dir).iterdir()]

lightning_sdk.teamspace.Teamspace.upload_file = upload_file
litlogger.media.upload_model = litmodels.io.cloud.sdk_upload_model = upload_model
litmodels.io.cloud.sdk_download_model = download_model
"""


@pytest.fixture
def service() -> Iterator[LightningService]:
    service = LightningService()
    yield service
    service.shutdown()
    service.server_close()


def run(program: str, folder: Path, port: int, status: int = 0) -> subprocess.CompletedProcess[str]:
    account = {
        "LIGHTNING_CLOUD_URL": f"http://127.0.0.1:{port}", "LIGHTNING_USER_ID": "u", "LIGHTNING_API_KEY": "k",
        "LIGHTNING_CREDENTIAL_PATH": str(folder / "credentials"), "LIGHTNING_CLOUD_CONNECT_TIMEOUT": "2",
        "LIGHTNING_CLOUD_READ_TIMEOUT": "2",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UPLOADS + program, str(folder)], capture_output=True, text=True, timeout=400,
        cwd=folder, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **account},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


LOGS = """
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import LitLogger
from tests.integrations.test_loggers import Line, loader, trainer
logger = LitLogger(name="exp", teamspace="org/space", metadata={"team": "a"}, log_model=True)
saved = ModelCheckpoint("saved", filename="{epoch}", monitor="loss")
trainer(folder, logger, callbacks=[saved]).fit(Line(sizes={"in": 8}), loader(3))
Path("note.txt").write_text("hello")
logger.log_file("note.txt")
print(logger.url, logger.name, logger.log_dir)
logger.finalize("success")
"""


def test_litlogger_has_all_of_a_run(service, tmp_path):
    done = run(LOGS, tmp_path, service.server_port)
    assert f"http://127.0.0.1:{service.server_port}/org/space/experiments/exp exp ./lightning_logs/exp" in done.stdout
    assert [step for step, _ in service.values["loss"]] == list(range(6))
    tags = {tag["name"]: tag["value"] for tag in service.streams["exp"]["tags"]}
    assert tags == {"team": "a", "lr": "0.1", "sizes/in": "8"}
    assert (tmp_path / "files/experiments/exp/note.txt").read_text() == "hello" and service.artifacts == ["note.txt"]
    # The first file is gone since; it was sent as it was.
    assert sorted(path.name for path in (tmp_path / "models").rglob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["epoch=1.ckpt"]


def test_what_was_logged_while_the_service_was_away_is_sent(service, tmp_path):
    proxy = Proxy(service.server_port)
    program = f"""
import signal, time
from levin.loggers import LitLogger
from tests.integrations.test_loggers import Line, loader, trainer
from tests.integrations.times import Clock
control = Path({str(tmp_path / "control")!r})
def away(): control.write_text("stop"); time.sleep(1)
def back(): control.unlink(); time.sleep(4)
clock = Clock({{5: away, 30: back}})
logger = LitLogger(name="exp", teamspace="org/space")
before = signal.getsignal(signal.SIGTERM)
trainer(folder, logger, max_epochs=1, callbacks=[clock]).fit(Line(), loader(60))
assert signal.getsignal(signal.SIGTERM) is before
print(f"Lightning away: slowest step {{sorted(clock.seconds)[-3]:.3f}} s")
"""
    is_over = threading.Event()

    def obey() -> None:
        while not is_over.wait(0.05):
            is_told = (tmp_path / "control").exists()
            if is_told and proxy._listener is not None:
                proxy.stop()
            elif not is_told and proxy._listener is None:
                proxy.start()

    threading.Thread(target=obey, daemon=True).start()
    try:
        done = run(program, tmp_path, proxy.port)
    finally:
        is_over.set()
        proxy.stop()
    assert sorted(service.values["loss"]) == sorted(set(service.values["loss"]))
    assert [step for step, _ in sorted(service.values["loss"])] == list(range(60))
    print(done.stdout.splitlines()[-1])


MODELS = """
from lightning.pytorch import Trainer
from litmodels.integrations.checkpoints import LightningModelCheckpoint
from tests.integrations.test_loggers import Line, loader, trainer
saved = LightningModelCheckpoint(model_registry="org/space/net", dirpath="saved", filename="{epoch}", monitor="loss")
first = trainer(folder, False, callbacks=[saved])
first.fit(Line(), loader(3))
again = trainer(folder, False, max_epochs=3, model_registry="org/space/net", enable_checkpointing=False)
again.fit(Line(), loader(3), ckpt_path="registry:version:epoch=1")
print(again.global_step, again.ckpt_path)
"""


def test_litmodels_uploads_what_is_saved_and_the_run_goes_on_from_it(service, tmp_path):
    done = run(MODELS, tmp_path, service.server_port)
    assert f"9 {tmp_path / 'org_space_net_epoch=1' / 'epoch=1.ckpt'}" in done.stdout
    uploaded = sorted(str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").rglob("*.ckpt"))
    assert uploaded == ["org/space/net@epoch=0/epoch=0.ckpt", "org/space/net@epoch=1/epoch=1.ckpt"]
