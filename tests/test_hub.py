"""Saved models in the Hub's layout, without a network connection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import ROOT, run_python

import resunet_fast as rf
from resunet_fast import checkpoint
from resunet_fast.checkpoint import CheckpointError, ModelConfig, Normalisation, SavedModel
from resunet_fast.hub import HubModel


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved() -> SavedModel:
    torch.manual_seed(0)
    config = ModelConfig(
        name="unet_transpose",
        in_channels=3,
        num_classes=1,
        arguments={"base_width": 2, "width_factors": (1, 2)},
        normalisation=Normalisation((0.5, 0.4, 0.3), (0.2, 0.2, 0.25)),
        training={"data": "digits | photographs", "steps": 280, "learning_rate": 0.002},
    )
    network = config.build()
    network.train()(torch.rand(2, 3, 8, 8))
    return SavedModel(network.eval(), config)


def assert_same_model(actual: SavedModel, expected: SavedModel) -> None:
    assert actual.config == expected.config
    state, other = actual.network.state_dict(), expected.network.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert not actual.network.training


def test_a_round_trip_through_a_folder(saved: SavedModel, tmp_path: Path) -> None:
    assert rf.save_pretrained(saved, tmp_path / "new" / "model") is None
    written = sorted(path.name for path in (tmp_path / "new" / "model").iterdir())
    assert written == ["README.md", "config.json", "model.safetensors"]
    assert_same_model(rf.from_pretrained(tmp_path / "new" / "model"), saved)


def test_both_ways_of_saving_write_the_same_format(saved: SavedModel, tmp_path: Path) -> None:
    rf.save_pretrained(saved, tmp_path / "hub")
    checkpoint.save(tmp_path / "plain", saved.network, saved.config)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert_same_model(checkpoint.load(tmp_path / "hub"), saved)
    assert_same_model(rf.from_pretrained(tmp_path / "plain"), saved)


def test_the_class_has_the_mixins_methods(saved: SavedModel, tmp_path: Path) -> None:
    HubModel(saved.network, saved.config).save_pretrained(tmp_path)
    assert_same_model(HubModel.from_pretrained(tmp_path).saved, saved)
    assert callable(HubModel.push_to_hub)


def test_the_card_carries_the_training_facts(saved: SavedModel, tmp_path: Path) -> None:
    rf.save_pretrained(saved, tmp_path)
    card = (tmp_path / "README.md").read_text()
    header, _, text = card.removeprefix("---\n").partition("---\n")
    assert "library_name: resunet_fast" in header
    assert "pipeline_tag: image-segmentation" in header
    parameters = sum(parameter.numel() for parameter in saved.network.parameters())
    for line in (
        "| network | unet_transpose |",
        f"| parameters | {parameters:,} |",
        "| width_factors | [1, 2] |",
        "| mean | [0.5, 0.4, 0.3] |",
        "| data | digits \\| photographs |",
        "| steps | 280 |",
    ):
        assert line in text.splitlines()


def test_a_model_without_facts_says_so(saved: SavedModel, tmp_path: Path) -> None:
    config = ModelConfig(
        **{name: getattr(saved.config, name) for name in vars(saved.config) if name != "training"}
    )
    rf.save_pretrained(SavedModel(saved.network, config), tmp_path)
    assert "How it was trained is not recorded." in (tmp_path / "README.md").read_text()


def test_a_card_that_was_edited_is_kept(saved: SavedModel, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    rf.save_pretrained(saved, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_from_the_cache_of_the_hub(saved: SavedModel, tmp_path: Path) -> None:
    """A repository that was downloaded earlier is found without a connection."""
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    rf.save_pretrained(saved, repository / "snapshots" / ("0" * 40))
    assert_same_model(rf.from_pretrained("someone/model", cache_dir=tmp_path / "cache"), saved)


@pytest.mark.parametrize("content", ["{", "[]", '{"name": 5}'])
def test_a_damaged_config_in_the_cache_is_one_sentence(
    content: str, saved: SavedModel, tmp_path: Path
) -> None:
    repository = tmp_path / "cache" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    rf.save_pretrained(saved, snapshot)
    (snapshot / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        rf.from_pretrained("someone/model", cache_dir=tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


def test_pickled_weights_are_not_read(saved: SavedModel, tmp_path: Path) -> None:
    rf.save_pretrained(saved, tmp_path)
    torch.save(saved.network.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        rf.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing", "no such folder", "a/b/c"])
def test_what_is_nowhere_is_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor readable") as caught:
        rf.from_pretrained(name, cache_dir=tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 1


def test_the_import_stays_light(tmp_path: Path) -> None:
    heavy = ["huggingface_hub", "safetensors", "PIL", "resunet_fast.testing", "resunet_fast.hub"]
    program = f"import sys, resunet_fast; print([n for n in {heavy} if n in sys.modules])"
    result = run_python("-c", program, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert result.stdout.strip() == "[]", result.stderr


def test_the_import_brings_nothing_but_this_package_beside_torch(tmp_path: Path) -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import resunet_fast\n"
        "new = {name.partition('.')[0] for name in sys.modules.keys() - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    result = run_python("-c", program, cwd=tmp_path)
    assert result.stdout.strip() == "['resunet_fast']", result.stderr


def test_without_the_package_the_sentence_names_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import resunet_fast as rf\n"
        "rf.from_pretrained('x')"
    )
    result = run_python("-c", program, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert 'pip install "resunet_fast[hub]"' in result.stderr.splitlines()[-1]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'from_pretraind'"):
        rf.from_pretraind  # noqa: B018


def test_weights_are_never_unpickled_in_the_package() -> None:
    sources = (ROOT / "resunet_fast").rglob("*.py")
    calls = [
        line for path in sources for line in path.read_text().splitlines() if "torch.load(" in line
    ]
    assert all("weights_only=True" in line for line in calls)
