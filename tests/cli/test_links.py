"""Links that stand in a configuration."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

import levin
from levin.cli import LightningCLI

LINKS = [
    {"source": "data.width", "target": "model.width"},
    {"source": "data.classes", "target": "model.classes", "apply_on": "instantiate"},
]
QUIET = ["--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.fast_dev_run=true"]


class Net(levin.LightningModule):
    def __init__(self, width: int, classes: int = 2):
        super().__init__()
        self.sizes = (width, classes)


class Data(levin.LightningDataModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.classes = 10


class CLI(LightningCLI):
    """Runs nothing: the objects are what is looked at."""

    def fit(self, **kwargs):
        pass


def run(args=None, **kwargs):
    return CLI(Net, Data, args=args, save_config_callback=None, **kwargs)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"links": LINKS}))
    return path


def ways(file):
    """The same links, in each way that a configuration can be given in."""
    whole = json.dumps({"fit": {"links": LINKS}})
    defaults = {"default_config_files": [str(file)]}
    return {
        "file of the subcommand": (["fit", f"--config={file}", *QUIET], {}),
        "file of the subcommand, short and after others": (["fit", *QUIET, "-c", str(file)], {}),
        "text before the subcommand": ([f"--config={whole}", "fit", *QUIET], {}),
        "words": (["fit", f"--links={json.dumps(LINKS)}", *QUIET], {}),
        "file that is read by default": (["fit", *QUIET], {"parser_kwargs": {"fit": defaults}}),
        "without subcommands": ([f"--config={file}", *QUIET], {"run": False}),
        "default without subcommands": (QUIET, {"run": False, "parser_kwargs": defaults}),
        "object": ({"fit": {"links": LINKS, "trainer": {"logger": False, "accelerator": "cpu"}}}, {}),
        "object without subcommands": ({"links": LINKS, "trainer": {"logger": False}}, {"run": False}),
    }


@pytest.mark.parametrize("way", ways("file"))
def test_links_hold_however_a_configuration_is_given(file, way):
    args, kwargs = ways(file)[way]
    cli = run(args, seed_everything_default=1, **kwargs)
    assert cli.model.sizes == (8, 10)
    # What is written builds the same again, with another value at the source too.
    parser = cli._parser(cli.subcommand)
    config = cli.config if cli.subcommand is None else cli.config[cli.subcommand]
    file.write_text(parser.dump(config, skip_unset=False))
    assert "width" not in yaml.safe_load(file.read_text()).get("model", {})
    again = run(["fit", f"--config={file}", "--data.width=3"])
    assert again.model.sizes == (3, 10)


def test_links_in_a_file_that_the_environment_names(file, monkeypatch):
    whole = file.with_name("whole.yaml")
    whole.write_text(yaml.safe_dump({"fit": {"links": LINKS[1:]}}))
    file.write_text(yaml.safe_dump({"links": LINKS[:1]}))
    monkeypatch.setenv("PL_FIT__CONFIG", str(file))
    monkeypatch.setenv("PL_CONFIG", str(whole))
    cli = run(["fit", *QUIET], parser_kwargs={"default_env": True, "fit": {"default_env": True}})
    assert cli.model.sizes == (8, 10)


def test_a_link_to_an_argument_of_a_chosen_class(file):
    file.write_text(yaml.safe_dump({
        "links": [{"source": "data.init_args.width", "target": "model.init_args.width"}],
        "model": {"class_path": f"{__name__}.Net"}, "data": {"class_path": f"{__name__}.Data", "init_args": {"width": 5}},
    }))  # fmt: skip
    cli = CLI(args=["fit", f"--config={file}", *QUIET], save_config_callback=None)
    assert cli.model.sizes == (5, 2)


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ([{"source": "data.widht", "target": "model.width"}], "Did you mean data.width?"),
        ([{"source": "data.width", "target": "model.widht"}], "Did you mean model.width?"),
        ([LINKS[0], LINKS[0]], "already a target of another link"),
        ([{"source": "data.width"}], "Missing required keys: {'target'}"),
        ([{**LINKS[0], "apply": "parse"}], "Unexpected keys: {'apply'}"),
        ([{**LINKS[0], "apply_on": "later"}], "cannot be made. apply_on must be"),
        ([{"source": ["data.width"], "target": "model.width"}], "Got value: ['data.width']"),
        ("data.width", 'Parser key "links"'),
        (3, 'Parser key "links"'),
    ],
)
def test_a_link_that_cannot_be_made_is_told(file, capsys, links, said):
    file.write_text(yaml.safe_dump({"links": links}))
    with pytest.raises(SystemExit) as ended:
        run(["fit", f"--config={file}", *QUIET])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["links: [", "nothing.yaml", "nowhere://config.yaml"])
def test_a_configuration_that_cannot_be_read_is_told_by_the_parser(file, capsys, text):
    with pytest.raises(SystemExit) as ended:
        run(["fit", f"--config={text}", *QUIET])
    assert ended.value.code == 2 and 'Parser key "config":' in capsys.readouterr().err


def test_the_target_of_a_link_is_not_set_otherwise(file, capsys):
    with pytest.raises(SystemExit):
        run(["fit", f"--config={file}", "--model.width=3", *QUIET])
    assert 'Linked "model.width" must be given via "data.width"' in capsys.readouterr().err
