"""The report of a run: `report.json` for programs and one self-contained `report.html` for people.

inputs.py reads what the run folder holds; fac.py, richness.py and synthetic.py turn it into numbers, and numbers.py
puts them into one dictionary. page.py sets the page with charts.py and words.py; it shows that dictionary alone.
"""

from fac_ray.report.numbers import build_report
from fac_ray.report.page import render_report

__all__ = ["build_report", "render_report"]
