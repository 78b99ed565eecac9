"""jgrpo.study.variants: what a name changes, whatever the base."""

from pathlib import Path

import pytest

from jgrpo.config import Config, load_config
from jgrpo.errors import InputError
from jgrpo.study.variants import Variant, parts_of, read_variants, with_references

CONFIGS = Path(__file__).parents[2] / "configs"


def changes(name: str) -> dict:
    [variant] = read_variants((name,), CONFIGS)
    return variant.changes


def test_a_variant_is_what_its_file_changes_of_rank1():
    assert changes("rank1") == {}
    assert changes("rank4") == {"lora_r": 4}
    assert changes("clip") == {"use_clip": True}  # clip_eps=0.2 is the default
    assert changes("dr_grpo") == {"loss_type": "dr_grpo", "use_std_norm": False}


def test_parts_add_up_and_a_field_may_be_named():
    assert changes("four_updates+clip") == {"updates_per_epoch": 4, "use_clip": True}
    assert changes("lora_r=2+lr=1e-3") == {"lora_r": 2, "lr": 1e-3}
    assert changes("loss_type=gspo") == {"loss_type": "gspo"}


def test_the_changes_apply_to_any_base():
    base = load_config(CONFIGS / "tiny.py")
    [variant] = read_variants(("length_penalty",), CONFIGS)
    config = variant.apply(base)
    assert config.use_length_penalty
    assert config.expected_maximum_length == base.expected_maximum_length == 48
    assert variant.about == "rank1.py with the soft length penalty in the reward (DAPO)"


def test_the_baseline_is_the_config_itself_whatever_that_is_for():
    [rank1] = read_variants(("rank1",), CONFIGS)
    assert rank1.about == "the config as it is"


def test_a_variant_is_compared_with_what_it_builds_on():
    a, b, c = read_variants(("rank1", "four_updates", "four_updates+clip"), CONFIGS)
    assert [v.reference for v in (a, b, c)] == ["rank1", "rank1", "four_updates"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("nothing",), r"variant nothing: there is no .*nothing.py; there are .*rank1"),
        (("lora_rank=3",), "Config has no field lora_rank"),
        (("clip", "clip"), "given twice"),
        (("rank4+rank16",), r"variant rank4\+rank16: two of its parts set lora_r"),
    ],
)
def test_what_is_no_variant_is_refused(names, message):
    with pytest.raises(InputError, match=message):
        read_variants(names, CONFIGS)


def test_parts_that_contradict_each_other_are_named():
    [variant] = read_variants(("cispo+clip",), CONFIGS)
    with pytest.raises(
        InputError, match=r"(?s)variant cispo\+clip: .*use_clip with loss_type=cispo"
    ):
        variant.apply(Config())


def test_a_folder_of_one_s_own_has_the_shipped_variants_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from jgrpo.config import Config\nconfig = Config(lora_r=2)\n"
    )
    names = [v.name for v in read_variants(("rank1", "rank4", "mine"), tmp_path)]
    assert names == ["rank1", "rank4", "mine"]


def test_what_is_compared_with_comes_by_itself_and_first():
    assert with_references(("rank4", "lr=2e-3")) == ("rank1", "rank4", "lr=2e-3")
    assert with_references(("rank4", "rank1")) == ("rank4", "rank1")
    assert with_references(("a+b+c", "a")) == ("rank1", "a+b", "a+b+c", "a")
    for names in (("a+b+c",), ("a+b", "c+d"), ("rank1+a",)):
        variants = {name: Variant(name, {}, "") for name in with_references(names)}
        assert all(v.reference in variants for v in variants.values())
        assert [n for n, v in variants.items() if v.reference == n] == ["rank1"]


def test_the_plus_of_a_number_joins_nothing():
    assert parts_of("lr=1e+0") == ["lr=1e+0"]
    assert parts_of("clip+lr=1e+0+kl") == ["clip", "lr=1e+0", "kl"]
    assert Variant("lr=2e+3", {}, "").reference == "rank1"
