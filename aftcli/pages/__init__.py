"""Results for people: tables, figures, files and pages."""
