"""From finished runs to tables, figures and a page."""
