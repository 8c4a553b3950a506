"""One check that every message of the data room must pass."""

from collections.abc import Callable

import pytest

from rdtrain.errors import UserError


@pytest.fixture
def fault() -> Callable[[Callable[[], object]], str]:
    """Calls a function that must raise UserError and returns the message, which must be one line."""
    def message(call: Callable[[], object]) -> str:
        with pytest.raises(UserError) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text, text
        return text
    return message
