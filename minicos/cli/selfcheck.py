"""`minicos selfcheck`: do these weights run correctly here?"""

import argparse
import json
from typing import Any

from minicos.cli import opening, options, values

EXAMPLES = """\
  minicos selfcheck  # the embedded model: a minute
  minicos selfcheck --model Wan2.2-I2V-A14B  # your weights on your card: about ten minutes
  minicos selfcheck --json > report.json
prints a report and writes it to report.txt and report.json in --out: attach it to an issue. It
contains versions, the card, names, sizes and a fingerprint of the files, agreement with diffusers
if that is installed, and one short run. The exit code is 0 if all checks pass
"""


def add(verbs: Any) -> None:
    parser = options.add_parser(
        verbs, "selfcheck", "Check a model on this machine; one report.", EXAMPLES, run
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, that of report.json"
    )
    parser.add_argument(
        "--frames", type=values.frames, help="frames of the short run, 4n + 1 (default: 9)"
    )
    options.add_model_options(parser, out="runs/selfcheck")


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 if all checks pass, else 1."""
    from minicos.runs import replace_file, write_json
    from minicos.selfcheck import FRAMES, as_text, selfcheck

    layout = opening.layout(args)
    parts = {name: part.files for name, part in layout.experts.items()}
    parts |= {"vae": layout.vae.files, "text": layout.text.files}
    files = {
        f"{name} {path.name}": f"{path.stat().st_size:,} bytes"
        for name, paths in parts.items()
        for path in paths
    }
    args.frames = args.frames or FRAMES  # memory is planned for them
    wan = opening.load_wan(args, layout)
    report = {"command": args.command, **selfcheck(wan, files, args.frames)}
    text = as_text(report) + "\n"
    write_json(args.out / "report.json", report)
    replace_file(args.out / "report.txt", lambda temporary: temporary.write_text(text, "utf-8"))
    said = f"all is well: {report['ok']}. {args.out / 'report.txt'}"
    print(json.dumps(report, ensure_ascii=False) if args.json else text + said)
    return int(not report["ok"])
