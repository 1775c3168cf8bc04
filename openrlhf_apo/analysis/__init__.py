"""What runs are looked at with. Each command of cli/ has its own modules here:

- `cli.report RUN_DIR`: report.py, drawn by report_figure.py from report_panels.py; the page is report_page.py's, its
  words verdict.py's
- `cli.report --diag`: diagnosis_report.py, from the maths of diagnosis.py, drawn by diagnosis_figure.py
- `cli.compare FILE.yaml`: compare.py, with the file (compare_file.py), the processes (compare_runs.py), the numbers
  (compare_statistics.py), and what is written (compare_results.py, compare_figure.py)
- `cli.evaluate MODEL DATA`: scores.py

figures.py holds what all figures share. Arguments, printed results and exit codes are cli/'s.
"""
