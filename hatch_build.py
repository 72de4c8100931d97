"""Build hook: what an install carries besides the package.

`oprd_tune.pth` makes torchtune's command line know our recipes. `.pth` files run in alphabetical order, and this name
comes after that of hatchling's editable installs. Recipes and configs travel as data below the package, since
torchtune's own wheel occupies the top-level name `recipes`; an editable install finds them in the checkout.
"""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PTH = {"oprd_tune/oprd_tune.pth": "oprd_tune.pth"}
_DATA = {"recipes": "oprd_tune/_shipped/recipes", "configs": "oprd_tune/_shipped/configs"}


class ShipRecipes(BuildHookInterface):
    """Adds the `.pth` line to every install, and the recipes and configs to those that leave the checkout."""

    def initialize(self, version, build_data):
        if version == "editable":
            build_data["force_include_editable"] = _PTH
        else:
            build_data["force_include"] |= _PTH | _DATA
