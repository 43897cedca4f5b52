"""Extension of griffe, which reads the docstrings for the site: `Example:` is shown as code.

Google's style has the section `Examples:`. Here a docstring has one example, and says so.
"""

import re
from typing import Any

import griffe


class SingleExample(griffe.Extension):
    """Let griffe read the section `Example:` as `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in an object's docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
