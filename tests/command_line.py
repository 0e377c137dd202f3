"""The command line, run in the process of the tests: `invoke`, `sora`, `refused`."""

from typer.testing import CliRunner, Result

from sora_model.cli import app


def invoke(*args: object, typed: str | None = None) -> Result:
    """typed: what a user types."""
    return CliRunner().invoke(app, [str(arg) for arg in args], typed, catch_exceptions=False)


def sora(*args: object, code: int = 0) -> str:
    """What a command that ends with `code` prints."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    return result.output


def refused(*args: object) -> str:
    """The one line that a command ends with."""
    output = sora(*args, code=2)
    assert "Traceback" not in output
    return " ".join(output.replace("│", " ").split())
