"""What a run leaves for people: the summary table, the pictures and one self-contained page."""

from wgates_plugin.report.contents import load_report
from wgates_plugin.report.page import write_report
from wgates_plugin.report.tables import headline, summary_table

__all__ = ["headline", "load_report", "summary_table", "write_report"]
