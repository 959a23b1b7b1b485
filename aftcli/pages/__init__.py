"""An evaluation for people: tables, figures, files and a page."""
