"""As many layers are chosen as a recipe spaces evenly, whether they stay softmax or get a mixer of its own."""

import pytest

from linearize.config import compose
from linearize.select.recipe import spacing


@pytest.mark.parametrize(
    ("recipe", "give", "every"),
    [
        ("best_hybrid", None, 5),
        ("best_constant", "longer", 5),
        ("best_constant", None, 0),
        ("halo", "nope", 4),
        ("halo", "other", 0),
        ("lolcats", None, 0),
        ("lolcats", "longer", 0),
    ],
)
def test_what_a_recipe_spaces_evenly(recipe, give, every):
    assert spacing(compose(recipe).layers, give) == every
