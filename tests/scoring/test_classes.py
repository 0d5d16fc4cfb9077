"""Which class a name means: exactly, by spelling, by index, by synset, or none, and why."""

import re

import pytest

from batchclf.models.labels import imagenet_labels, imagenet_synsets
from batchclf.scoring.classes import Classes, Match, Name, Namer, NoMatch

IMAGENET = Classes(dict(enumerate(imagenet_labels())), 1000, "")
HUB = Classes(
    {index: f"{name}, {imagenet_synsets()[index]}" for index, name in IMAGENET.labels.items()},
    1000,
    "",
)
"""As models of the hub have them: several names each."""

NAMELESS = Classes({index: str(index) for index in range(1000)}, 1000, "")


def classes(*labels: str) -> Classes:
    return Classes(dict(enumerate(labels)), len(labels), "")


def test_there_are_a_thousand_synsets_in_the_order_of_the_labels() -> None:
    known = {"n01440764": "tench", "n02123045": "tabby", "n15075141": "toilet tissue"}
    assert len(set(imagenet_synsets())) == 1000
    assert {one: imagenet_labels()[imagenet_synsets().index(one)] for one in known} == known


@pytest.mark.parametrize(
    ("name", "own", "expected"),
    [
        ("dog", classes("cat", "dog"), Match(1, "exact")),
        ("Golden_Retriever", classes("cat", "golden retriever"), Match(1, "spelling")),
        ("golden-retriever", classes("cat", "Golden Retriever"), Match(1, "spelling")),
        ("Dog", classes("dog", "Dog"), Match(1, "exact")),
        ("tinca tinca", classes("hen", "tench, Tinca tinca"), Match(1, "synonym")),
        ("tench, Tinca tinca", classes("hen", "Tench"), Match(1, "synonym")),
        ("crane", classes("crane, tower", "heron, crane"), Match(0, "synonym")),
        ("1", classes("cat", "dog"), Match(1, "index")),
        ("1", classes("1", "0"), Match(0, "exact")),
        ("n01440764", classes("hen", "tench"), Match(1, "synset")),
        ("n01440764", classes("hen", "n01440764"), Match(1, "exact")),
        ("n02123045", IMAGENET, Match(281, "synset")),
        ("n02123045", HUB, Match(281, "synset")),
        ("n02123045", NAMELESS, Match(281, "synset")),
        ("great_white_shark", NAMELESS, Match(2, "spelling")),
        ("281", NAMELESS, Match(281, "index")),
        ("n02012849", HUB, Match(134, "synset")),  # a crane; so is 517
    ],
)
def test_a_name_means_a_class(name: str, own: Classes, expected: Match) -> None:
    assert Namer(own)(Name(name)) == expected


@pytest.mark.parametrize(
    ("name", "own", "why"),
    [
        ("tabbi", classes("dog", "tabby"), "is no class; did you mean 'tabby'?"),
        ("xyz", classes("dog", "tabby"), "is no class of the model"),
        ("", classes("dog", "tabby"), "is no class of the model"),
        ("DOG", classes("dog", "Dog"), r"may be class 0 \(dog\) or 1 \(Dog\): give its index"),
        ("dog", classes("dog", "dog"), r"may be class 0 \(dog\) or 1 \(dog\): give its index"),
        ("2", classes("cat", "dog"), "is no index of the model's classes, 0 to 1"),
        ("3", classes("cat", "7"), "is no class of the model"),
        ("n99999999", IMAGENET, "is none of the 1,000 synsets"),
        ("n02123045", classes("cat", "dog"), "is ImageNet's 'tabby', and that is no class"),
        ("dog", classes("0", "1"), "is no index, and the model's classes have no names"),
        ("0", Classes({1: "dog"}, None, ""), "is the index of a class that no record names"),
    ],
)
def test_a_name_that_means_none_or_several_is_told_why(name: str, own: Classes, why: str) -> None:
    found = Namer(own)(Name(name))
    assert isinstance(found, NoMatch)
    assert re.search(why, found.why), found.why


def test_a_number_that_is_meant_as_an_index_is_no_name() -> None:
    own = classes("1", "0")
    assert Namer(own)(Name("1", is_index=True)) == Match(1, "index")
    assert Namer(own)(Name("1")) == Match(0, "exact")
    assert isinstance(Namer(own)(Name("-1", is_index=True)), NoMatch)


def test_synsets_do_not_follow_classes_in_another_order() -> None:
    turned = classes(*reversed(imagenet_labels()))
    assert Namer(turned)(Name("n01440764")) == Match(999, "synset")
