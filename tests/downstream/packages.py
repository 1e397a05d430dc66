"""The released packages whose tests run on Lightning and on levin, pinned."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """One package.

    Args:
        name: On the package index.
        version: Pinned.
        tests: Arguments of pytest, relative to the unpacked source distribution; ``usage/...`` is a script of ours, where
            none are shipped.
        requirements: What its tests need besides.
        without: Tests left out: part of the name -> the reason.
        differs: Tests with another outcome on levin: name -> the reason.
        removed: What it pulls in and its tests do without, since it needs another torch.
        made: A script of ours that makes what the tests lack; it gets their folder.
        note: What the table says about the choice.
    """

    name: str
    version: str
    tests: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    without: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    made: str = ""
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the tests are a script of ours."""
        return self.tests[0].startswith("usage/")


_REFUSED = (
    "the package pins Lightning 2.5.2, which unpickles whatever is in a file; Lightning 2.6.6 refuses it as levin does"
)
_OLD_MODELS = "reads models that the source distribution leaves out"

PACKAGES = (
    Package(
        "optuna-integration",
        "5.0.0",
        ("usage/optuna_integration.py",),
        ("optuna==5.0.0",),
        note="ships no tests for Lightning; used as its documentation says",
    ),
    Package("chemprop", "2.3.1", ("usage/chemprop.py",), note="ships no tests; used as its documentation says"),
    Package(
        "pytorch-forecasting",
        "1.8.0",
        (
            "tests/test_callbacks.py",
            "tests/test_models/test_nbeats.py",
            "tests/test_models/test_baseline.py",
            "tests/test_models/test_temporal_fusion_transformer.py",
            "tests/test_models/test_dlinear_v2.py",
            "tests/test_models/test_tft_v2.py",
            "tests/test_models/test_base_model_v2.py",
            "tests/test_models/test_deepar.py",
            "tests/test_models/test_nhits.py",
            "tests/test_models/test_mlp.py",
        ),
        ("pyarrow",),
        made="made/stallion.py",
        note="its tests download a data set; here it is a made one with the same columns. Seven fail on both, "
        "six while the data set is made and one in a loss; on some machines one more, while its output is pickled",
    ),
    Package(
        "cellarium-ml",
        "0.0.15",
        (
            "tests/test_callbacks.py",
            "tests/test_logistic_regression.py",
            "tests/test_contrastive_mlp.py",
            "tests/test_geneformer.py",
            "tests/test_onepass_mean_var_std.py",
            "tests/test_geometric_sketch.py",
            "tests/test_ols.py::test_lightning_integration",
            "tests/test_ols.py::test_lightning_integration_with_intercept",
            "tests/test_socam.py::test_load_from_checkpoint_multi_device",
            "tests/test_tdigest.py::test_load_from_checkpoint_multi_device",
            "tests/test_ipca.py::test_load_from_checkpoint_multi_device",
            "tests/test_ppca.py",
        ),
        ("lightning==2.5.2",),
        without={"tests/test_cli.py": "downloads its data"},
        differs=dict.fromkeys(
            (
                "tests/test_contrastive_mlp.py::test_load_from_checkpoint_multi_device",
                "tests/test_geneformer.py::test_load_from_checkpoint_multi_device",
                "tests/test_geometric_sketch.py::test_checkpoint_restores_bucket_state_and_sketch_obs_names",
                "tests/test_ipca.py::test_load_from_checkpoint_multi_device",
                "tests/test_logistic_regression.py::test_load_from_checkpoint_multi_device",
                "tests/test_onepass_mean_var_std.py::test_load_from_checkpoint_multi_device[naive]",
                "tests/test_onepass_mean_var_std.py::test_load_from_checkpoint_multi_device[shifted_data]",
                "tests/test_ppca.py::test_load_from_checkpoint_multi_device",
                "tests/test_socam.py::test_load_from_checkpoint_multi_device",
            ),
            _REFUSED,
        ),
        made="made/cellarium_common.py",
        note="its tests import a helper file that the source distribution leaves out; here it is one of ours. "
        "The one of test_tdigest.py compares random data; it fails on both, and has passed on Lightning in another run",
    ),
    Package(
        "neuralforecast",
        "3.3.0",
        (
            "tests/test_sample_weight.py",
            "tests/test_categorical.py",
            "tests/test_core_serialization.py",
            "tests/test_malicious_artifacts.py",
            "tests/test_core.py",
        ),
        ("pandas<3", "polars", "s3fs", "captum", "gitpython"),
        without={
            "tests/test_core.py::test_explainability": "long, and about captum",
            "tests/test_core.py::test_auto": "long, and about ray",
            "tests/test_core_serialization.py::test_v1": _OLD_MODELS,
            "tests/test_malicious_artifacts.py::test_a_malicious_sidecar": _OLD_MODELS,
            "tests/test_malicious_artifacts.py::test_a_malicious_dataset": _OLD_MODELS,
            "tests/test_malicious_artifacts.py::test_pickle_load_is_never_reached": _OLD_MODELS,
            "tests/test_migrate.py": _OLD_MODELS,
        },
        made="made/neuralforecast_conftest.py",
        note="its tests use a fixture that the source distribution leaves out; here it is one of ours",
    ),
    Package(
        "darts",
        "0.48.1",
        ("usage/darts.py",),
        note="ships no tests; used as its documentation says",
    ),
    Package(
        "scvi-tools",
        "1.4.2",
        ("tests/train", "tests/model/test_linear_scvi.py"),
        note="its trainer, callbacks and training plans and one model, chosen beforehand; in 12 minutes only 61 of some 470 tests ran",
    ),
    Package("pina-mathlab", "0.3.2", ("tests",), ("scipy",)),
    Package(
        "gluonts",
        "0.17.0",
        ("usage/gluonts.py",),
        note="ships no tests; used as its documentation says",
    ),
    Package(
        "pytorch-tabular",
        "1.2.0",
        ("usage/pytorch_tabular.py",),
        note="ships no tests; used as its documentation says",
    ),
    Package(
        "finetuning-scheduler",
        "2.14.1",
        ("usage/finetuning_scheduler.py",),
        note="ships no tests; used as its documentation says. It restores parts of checkpoints in the middle of a fit",
    ),
    Package(
        "litgpt",
        "0.5.13",
        ("usage/litgpt.py",),
        ("safetensors", "tokenizers"),
        removed=("torchvision",),
        note="its loops are those of Fabric. Its tests need files that the source distribution leaves out; used as its "
        "documentation says",
    ),
)
