import importlib
import logging
import warnings

import pytest

from slm.command.flags import explain_parser_error
from slm.messages import LOG_LINES, WARNINGS, silence_notices


def test_an_unknown_warning_still_appears(recwarn: pytest.WarningsRecorder) -> None:
    silence_notices()
    warnings.warn("something nobody has seen before", UserWarning, stacklevel=1)
    warnings.warn_explicit("from lightning", UserWarning, "fit_loop.py", 1, module="lightning.pytorch.loops.fit_loop")
    assert [str(warning.message) for warning in recwarn] == ["something nobody has seen before", "from lightning"]


def test_a_known_notice_is_silenced_in_its_own_module_alone(recwarn: pytest.WarningsRecorder) -> None:
    silence_notices()
    message = "The number of training batches (5) is smaller than the logging interval"
    warnings.warn_explicit(message, UserWarning, "fit_loop.py", 1, module="lightning.pytorch.loops.fit_loop")
    assert not recwarn
    warnings.warn_explicit(message, UserWarning, "mine.py", 1, module="mine")
    assert len(recwarn) == 1


def test_an_unknown_log_line_still_appears_and_a_known_one_does_not(caplog: pytest.LogCaptureFixture) -> None:
    silence_notices()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.info("GPU available: False, used: False")
    logger.info("a new thing to know")
    logging.getLogger("mine").warning("GPU available: False")
    assert caplog.messages == ["a new thing to know", "GPU available: False"]


def test_every_logger_and_module_named_is_one_that_the_libraries_have() -> None:
    for name in {*LOG_LINES, *WARNINGS}:
        assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "Parser key \"trainer.max_epochs\":\n  Expected a <class 'int'>. Got value: abc",
            "trainer.max_epochs=abc: expected int",
        ),
        (
            "unrecognized arguments: --model.embed 3",
            "unknown setting model.embed; the nearest known one is model.embed_dim",
        ),
        ("something\n  new and   unforeseen", "something new and unforeseen"),
    ],
)
def test_a_parser_error_becomes_one_line(message: str, expected: str) -> None:
    assert explain_parser_error(message, {"model.embed_dim": "", "trainer.max_epochs": ""}, []) == expected
