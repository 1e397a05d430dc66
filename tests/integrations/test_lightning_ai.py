"""The packages of Lightning AI, litlogger and litmodels, against a stand-in for the service, which needs an account."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.lightning_service import LightningService
from tests.integrations.times import print_times

ROOT = Path(__file__).parents[2]
# What the packages upload is put into a folder instead: files take another way there, in pieces, to a store.
UPLOADS = """
import os, shutil, sys
from pathlib import Path
from tests.integrations.proxy import Proxy
proxy = Proxy(int(sys.argv[2]))
os.environ["LIGHTNING_CLOUD_URL"] = f"http://127.0.0.1:{proxy.port}"
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
        "LIGHTNING_USER_ID": "u", "LIGHTNING_API_KEY": "k",
        "LIGHTNING_CREDENTIAL_PATH": str(folder / "credentials"), "LIGHTNING_CLOUD_CONNECT_TIMEOUT": "2",
        "LIGHTNING_CLOUD_READ_TIMEOUT": "2",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UPLOADS + program, str(folder), str(port)], capture_output=True, text=True, timeout=400,
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
print(logger.url.replace(str(proxy.port), "port"), logger.name, logger.log_dir)
logger.finalize("success")
"""


def test_litlogger_has_all_of_a_run(service, tmp_path):
    done = run(LOGS, tmp_path, service.server_port)
    assert "http://127.0.0.1:port/org/space/experiments/exp exp ./lightning_logs/exp" in done.stdout
    assert [step for step, _ in service.values["loss"]] == list(range(6))
    tags = {tag["name"]: tag["value"] for tag in service.streams["exp"]["tags"]}
    assert tags == {"team": "a", "lr": "0.1", "sizes/in": "8"}
    assert (tmp_path / "files/experiments/exp/note.txt").read_text() == "hello" and service.artifacts == ["note.txt"]
    # The first file is gone since; it was sent as it was.
    assert sorted(path.name for path in (tmp_path / "models").rglob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["epoch=1.ckpt"]


AWAY = """
import signal, time
from levin.loggers import LitLogger
from tests.integrations.test_loggers import Line, loader, trainer
from tests.integrations.times import Clock
clock = Clock({5: lambda: [proxy.stop(), time.sleep(1)], 30: lambda: [proxy.start(), time.sleep(4)]})
logger = LitLogger(name="exp", teamspace="org/space")
before = signal.getsignal(signal.SIGTERM)
trainer(folder, logger, max_epochs=1, callbacks=[clock]).fit(Line(), loader(60))
assert signal.getsignal(signal.SIGTERM) is before
"""


def test_what_was_logged_while_the_service_was_away_is_sent(service, tmp_path):
    run(AWAY, tmp_path, service.server_port)
    assert sorted(service.values["loss"]) == sorted(set(service.values["loss"]))
    assert [step for step, _ in sorted(service.values["loss"])] == list(range(60))


TIMES = """
import json, time
from levin.loggers import LitLogger
from tests.integrations.test_loggers import Line, loader, trainer
from tests.integrations.times import Clock
conditions = {
    "no logger": {}, "healthy": {}, "slow": {1: lambda: setattr(proxy, "delay_s", 0.3)},
    "deaf": {1: lambda: setattr(proxy, "is_deaf", True)}, "refuses": {1: proxy.stop},
}
times, whole_s = {}, {}
for name, when in conditions.items():
    logger = name != "no logger" and LitLogger(folder / name, name=name, teamspace="org/space")
    clock, began = Clock(when), time.perf_counter()
    trainer(folder, logger, max_epochs=1, callbacks=[clock], enable_checkpointing=False).fit(Line(), loader(400))
    times[name], whole_s[name] = clock.seconds, time.perf_counter() - began
    proxy.delay_s, proxy.is_deaf = 0.0, False
(folder / "times").write_text(json.dumps([times, whole_s]))
"""


def test_a_service_that_is_slow_or_away_slows_nothing(service, tmp_path):
    run(TIMES, tmp_path, service.server_port)
    times, whole_s = json.loads((tmp_path / "times").read_text())
    print_times("Lightning AI", times, whole_s)
    for condition, seconds in times.items():
        # A request that training waited for would take 300 ms or more.
        assert len(seconds) == 399 and sorted(seconds)[-2] < 0.25, condition
        kept = list((tmp_path / condition).rglob("entries.jsonl"))
        assert len(kept) == (condition in ("deaf", "refuses")), condition
    # Of two of the runs everything has arrived.
    steps = [step for step, _ in service.values["loss"]]
    assert all(steps.count(step) >= 2 for step in range(400))


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
