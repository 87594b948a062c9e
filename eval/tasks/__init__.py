"""Tasks that suites can name."""
