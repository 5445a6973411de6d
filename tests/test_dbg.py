import sys

sys.path.insert(0, "/tmp/w")
import dbg2


def test_dbg():
    dbg2.go("/tmp/w/toy")
