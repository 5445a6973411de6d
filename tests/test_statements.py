"""The core stays small: see `tests/statements.py`, whose command prints the counts by folder."""

from tests.statements import by_folder, statements


def test_what_counts_as_a_statement():
    assert (
        statements(
            '"""Doc."""\nimport a\n\ndef f():\n    """Doc."""\n    x = (1,\n         2)\n    return x\n'
        )
        == 4
    )
    assert statements("x = 1; y = 2\n'a string of its own'\n") == 3


def test_the_core_and_what_opens_a_file_stay_small():
    counts = by_folder()
    # 1,300 for networks and loop; 80 for files and settings of torch that would otherwise pass as
    # something else
    assert counts["(core)"] <= 1380
    # 1,500 for the layouts of Wan; 800 for LoRA dialects, quantised files, any Wan-shaped config,
    # hostile files
    assert counts["(opening a file)"] <= 2300
