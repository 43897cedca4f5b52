"""The report of a study: reads finished runs, and writes tables, figures and a page."""
