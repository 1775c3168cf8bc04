"""Draw runs from their metrics.jsonl and print each run's closing table; or diagnose what α does to saved rollouts.

    python -m openrlhf_apo.cli.report RUN_DIR [RUN_DIR ...] [--out FILE.png]
    python -m openrlhf_apo.cli.report --diag ROLLOUT_DIR [ROLLOUT_DIR ...] [--out FILE.png]

One run gives RUN_DIR/report.png and RUN_DIR/report.html, a page in one file; several are laid over each other, in
overlay.png of the first. A ROLLOUT_DIR is what --apo.save_rollouts wrote, or the directory of a run that saved them;
several are diagnosed together, in diagnostics.png of the first.
"""

import sys
from pathlib import Path

from openrlhf_apo.analysis.report import save_report, summary
from openrlhf_apo.cli.console import Parser, exit_code


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m openrlhf_apo.cli.report",
        description="Draw runs from their metrics.jsonl, or diagnose what α does to the gradient of saved rollouts.",
    )
    parser.add_argument(
        "dirs", nargs="+", metavar="DIR", help="output directory of a run; with --diag, also that of its rollouts"
    )
    parser.add_argument("--out", metavar="FILE.png", help="default: report.png, overlay.png or diagnostics.png in DIR")
    parser.add_argument("--diag", action="store_true", help="diagnose rollouts that --apo.save_rollouts wrote")
    parser.add_argument("--beta_r", type=float, help="with --diag: temperature of the target q (default 1.0)")
    parser.add_argument("--tau_anc", type=float, help="with --diag: temperature of the policy p (default 0.8)")
    args = parser.parse_args(argv)
    if args.out and not args.out.endswith(".png"):
        parser.error(f"--out {args.out}: a picture, so name it .png")
    try:
        _diagnose(args) if args.diag else _report(args)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _report(args) -> None:
    if args.beta_r is not None or args.tau_anc is not None:
        raise ValueError("--beta_r and --tau_anc have no effect without --diag: drop them")
    out = args.out or Path(args.dirs[0]) / ("report.png" if len(args.dirs) == 1 else "overlay.png")
    save_report(args.dirs, out)
    tables = [summary(run_dir) for run_dir in args.dirs]
    for run_dir, table in zip(args.dirs, tables, strict=True):
        print(f"{run_dir}\n{table}\n")
    print(f"drawn: {out}" + (f", written: {Path(out).with_suffix('.html')}" if len(args.dirs) == 1 else ""))


def _diagnose(args) -> None:
    from openrlhf_apo.analysis.diagnosis_report import save_diagnosis  # loads torch, which a report does not need

    out = args.out or Path(args.dirs[0]) / "diagnostics.png"
    beta_r = 1.0 if args.beta_r is None else args.beta_r
    tau_anc = 0.8 if args.tau_anc is None else args.tau_anc
    print(f"{save_diagnosis(args.dirs, out, beta_r, tau_anc)}\n\ndrawn: {out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
