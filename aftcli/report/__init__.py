"""Output for people: pictures, tables, pages."""
