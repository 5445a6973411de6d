"""`tests.kill` ends every verb that writes."""

import argparse

from minicos.cli import parser
from tests.kill import COMMANDS, UNTESTED


def test_every_verb_that_writes_is_killed():
    (verbs,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    writing = {
        name for name, verb in verbs.choices.items() if any(a.dest == "out" for a in verb._actions)
    }
    assert {given[0] for given in COMMANDS.values()} | UNTESTED.keys() == writing
