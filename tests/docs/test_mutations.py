"""The table of mutations speaks of the code and the tests as they are."""

from __future__ import annotations

import re

import pytest

from tests.mutations import MUTATIONS, PAGE, ROOT

TABLE = PAGE.read_text()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: f"{each.promise}: {each.what}")
def test_what_a_mutation_breaks_is_there_to_be_broken(mutation) -> None:
    text = (ROOT / "lightning_aux" / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    assert f"| {mutation.promise} | {mutation.what} |" in TABLE


def test_every_promise_is_broken_at_least_once_and_noticed() -> None:
    promises = {mutation.promise for mutation in MUTATIONS}
    assert promises == {f"C{number}" for number in range(1, 15)}
    assert "survived" not in TABLE.split("<!-- generated -->")[1]


def test_the_tests_that_noticed_exist() -> None:
    for path, test in re.findall(r"`(tests/[^`:]+)::(\w+)`", TABLE):
        assert f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
