"""What libraries say of a mistake, in one line."""

from typing import Annotated

import pytest

from nanogpt.config.errors import one_line


def test_an_error_is_its_first_line_or_its_name():
    """Reference: written out here."""
    assert one_line(RuntimeError("\n  no room\nhere is why:\n" * 3)) == "no room"
    assert one_line(RuntimeError("backend raised:\nImportError: a.so: file too short\n\nMore")) == (
        "backend raised: ImportError: a.so: file too short"
    )
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    errors = ValueError("two mistakes")
    errors.errors = "not a method"
    assert one_line(errors) == "two mistakes"


def test_pydantic_s_first_mistake_is_the_line():
    """Reference: its own list of them; what was found, which may be a secret, is shown only where it is asked for."""
    pydantic = pytest.importorskip("pydantic")

    def refuse(tag: str) -> str:
        raise ValueError(f"{len(tag)} characters\nare too few")

    class Settings(pydantic.BaseModel):
        stage: int
        tag: Annotated[str, pydantic.AfterValidator(refuse)] = "none"

    with pytest.raises(pydantic.ValidationError) as number:
        Settings(stage="secret")
    assert one_line(number.value, with_input=True) == f"stage: {number.value.errors()[0]['msg']} (found 'secret')"
    assert one_line(number.value) == number.value.errors()[0]["msg"]
    with pytest.raises(pydantic.ValidationError) as own:
        Settings(stage=1, tag="a")
    assert one_line(own.value) == "1 characters are too few"
